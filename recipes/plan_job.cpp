#include <algorithm>
#include <cmath>

#include "recipes/choices.h"
#include "recipes/plan_text.h"
#include "recipes/planner.h"

namespace tailor {
namespace {

// Published bytes that a core packs a second, measured on bfloat16 (docs/benchmarks.md, Packing):
// int4 looks for its scales.
constexpr double kPackInt4 = 0.25e9, kPackOther = 0.4e9;

std::string per_second(double bytes) { return gb(bytes) + "/s"; }

/// The first price of a tier, without falling back to another.
PriceQuote tier_quote(const PriceBook& book, const std::string& sku, const std::string& tier,
                      std::int64_t at) {
  for (const Price* price : book.find_sku(sku, at)) {
    if (price->tier == tier)
      return {price->usd_micros_per_device_hour(), "", price->id, tier, price->source};
  }
  PriceQuote none;
  none.reason = "no " + tier + " price for sku '" + sku + "' in the price book";
  return none;
}

double base_published(const Recipe& recipe, const ModelFacts& model) {
  Recipe published = recipe;
  published.base.format = published.base.non_expert_format = BaseFormat::as_is;
  return base_bytes(published, model).all();
}

}  // namespace

/// Forward passes over the validation rows: every eval_every_steps and after the last step.
Figure Planner::evaluation(double steps) const {
  const bool wanted = !recipe_.data.validation.empty() || recipe_.data.validation_split;
  if (!extras_.data || !wanted) {
    return {0.0, "seconds",
            wanted ? "evaluations, not counted before the data is tokenised" : "no evaluation"};
  }
  const double every = as_double(recipe_.training.eval_every_steps);
  const double times = every > 0 ? std::ceil(steps / every) : 1.0;
  const DataStats& data = *extras_.data;
  const double tokens =
      as_double(data.validation_tokens > 0 ? data.validation_tokens
                                           : data.validation_rows * recipe_.data.sequence_len);
  const double each = tokens * forward_seconds_per_token_;
  return {times * each, "seconds",
          whole(times) + (times == 1 ? " evaluation" : " evaluations") + " x " + short_text(each) +
              " s (" + whole(tokens) + " tokens forward)"};
}

Figure Planner::job_steps() const {
  Figure out{std::nullopt, "steps",
             "the data is not tokenised yet and training.max_steps is null; run `tailor data "
             "prepare`, or set it"};
  if (extras_.data && extras_.data->rows > 0) {
    const double rows = as_double(extras_.data->rows) * as_double(recipe_.training.num_epochs);
    out.value = std::ceil(rows / as_double(recipe_.global_batch_rows()));
    out.working = whole(as_double(extras_.data->rows)) + " rows x " +
                  whole(as_double(recipe_.training.num_epochs)) + " epochs / " +
                  whole(as_double(recipe_.global_batch_rows())) + " rows a step";
  }
  const auto& max_steps = recipe_.training.max_steps;
  if (max_steps && (!out.value || as_double(*max_steps) < *out.value)) {
    out.value = as_double(*max_steps);
    out.working = "training.max_steps";
  }
  return out;
}

/// Whether a streaming store is made: of another form than the published one, or because weights
/// are read in the course of a step.
bool Planner::packs() const {
  return !recipe_.base.store && (recipe_.base.format != BaseFormat::as_is ||
                                 recipe_.base.non_expert_format != BaseFormat::as_is ||
                                 plan.stream_bytes_per_step.value.value_or(0) > 0);
}

JobPhase Planner::download() const {
  JobPhase out{"download", false, 0.0, std::nullopt, "the weights are on this machine"};
  if (extras_.weights_here || extras_.store_here) return out;
  const bool store = recipe_.base.store.has_value();
  const double bytes = store ? base_.all() : base_published(recipe_, model_);
  out.seconds = bytes / machine_.download_bytes_per_second;
  out.working = gb(bytes) + (store ? " of the packed store" : " of published weights") + " / " +
                per_second(machine_.download_bytes_per_second) +
                " of the machine's download_bytes_per_second, an assumption";
  return out;
}

JobPhase Planner::packing() const {
  JobPhase out{"packing", false, 0.0, std::nullopt, "the run reads the weights as published"};
  if (recipe_.base.store || extras_.store_here) {
    out.working = "the store is packed already";
    return out;
  }
  if (!packs()) return out;
  const double published = base_published(recipe_, model_), moved = published + base_.all();
  const bool int4 =
      recipe_.base.format == BaseFormat::int4 || recipe_.base.non_expert_format == BaseFormat::int4;
  const double core = int4 ? kPackInt4 : kPackOther;
  const double compute = published / (core * machine_.cores);
  const double disk = moved / machine_.disk_bytes_per_second;
  out.seconds = std::max(compute, disk);
  out.working = "max(" + gb(published) + " / (" + whole(machine_.cores) +
                (machine_.cores == 1 ? " core x " : " cores x ") + per_second(core) +
                ") = " + short_text(compute) + " s, " + gb(moved) + " read and written / " +
                per_second(machine_.disk_bytes_per_second) + " = " + short_text(disk) + " s)";
  return out;
}

void Planner::add_job(const PriceBook& prices) {
  plan.steps = job_steps();
  const double load = load_bytes_ / machine_.disk_bytes_per_second;
  const JobPhase loading{
      "loading", true, load, std::nullopt,
      gb(load_bytes_) + " of frozen weights / " + per_second(machine_.disk_bytes_per_second)};
  const JobPhase fetch = download(), pack = packing();
  if (plan.steps.value) {
    const double steps = *plan.steps.value, step = *plan.seconds_per_step.value;
    const Figure evaluations = evaluation(steps);
    plan.phases = {{"training", true, steps * step, std::nullopt,
                    whole(steps) + " steps x " + short_text(step) + " s"},
                   {"evaluation", true, evaluations.value, std::nullopt, evaluations.working},
                   loading,
                   pack,
                   fetch};
    double run = 0, all = 0;
    for (const JobPhase& phase : plan.phases) {
      all += *phase.seconds;
      if (phase.in_hours) run += *phase.seconds;
    }
    const std::string apart =
        *pack.seconds + *fetch.seconds > 0
            ? "; download and packing are not in, hours_with_preparation has them"
            : "; there is nothing to download or to pack";
    plan.hours = {run / 3600, "hours",
                  "(" + whole(steps) + " steps x " + short_text(step) + " s + " +
                      evaluations.working + " + " + short_text(load) + " s to load) / 3600" +
                      apart};
    plan.gpu_hours = {run / 3600 * ranks_, "device hours",
                      short_text(run / 3600) + " h x " + whole(ranks_) +
                          (ranks_ == 1 ? " rank" : " ranks") + apart};
    plan.hours_with_preparation = {all / 3600, "hours",
                                   short_text(run / 3600) + " h of the run + " +
                                       short_text(*pack.seconds / 3600) + " h of packing + " +
                                       short_text(*fetch.seconds / 3600) + " h of download"};
  } else {
    plan.phases = {{"training", true, std::nullopt, std::nullopt, plan.steps.working},
                   {"evaluation", true, std::nullopt, std::nullopt, plan.steps.working},
                   loading,
                   pack,
                   fetch};
    const std::string& unknown = plan.steps.working;
    plan.hours = {std::nullopt, "hours", unknown};
    plan.gpu_hours = {std::nullopt, "device hours", unknown};
    plan.hours_with_preparation = {std::nullopt, "hours", unknown};
  }
  add_prices(prices);
  warn_of_budget();
}

void Planner::add_prices(const PriceBook& prices) {
  plan.price = quote(prices, recipe_.cost.price, machine_.sku, machine_.tier, extras_.at_unix_ms);
  const auto usd_of = [&](const Figure& hours, const PriceQuote& price, bool prepared) -> Figure {
    if (!price.usd_micros_per_device_hour) return {std::nullopt, "usd", price.reason};
    if (!hours.value) return {std::nullopt, "usd", hours.working};
    const double devices = *hours.value * ranks_;
    const double rate = as_double(*price.usd_micros_per_device_hour) / 1e6;
    return {devices * rate, "usd",
            short_text(devices) + " device hours x " + usd_text(*price.usd_micros_per_device_hour) +
                " (" + price.id + ", " + price.kind + ")" +
                (prepared ? "; download and packing on this machine are in"
                          : "; download and packing are not in")};
  };
  plan.usd = usd_of(plan.hours, plan.price, false);
  plan.usd_with_preparation = usd_of(plan.hours_with_preparation, plan.price, true);
  for (const char* tier : {"spot", "on-demand"}) {
    const PriceQuote price = tier_quote(prices, machine_.sku, tier, extras_.at_unix_ms);
    plan.tiers.push_back({tier, price, usd_of(plan.hours, price, false),
                          usd_of(plan.hours_with_preparation, price, true)});
  }
  if (!plan.price.usd_micros_per_device_hour) return;
  const double rate = as_double(*plan.price.usd_micros_per_device_hour) / 1e6;
  for (JobPhase& phase : plan.phases) {
    if (phase.seconds) phase.usd = *phase.seconds / 3600 * ranks_ * rate;
  }
}

void Planner::warn_of_budget() {
  const auto& budget = recipe_.budget;
  if (budget.usd_micros && plan.usd.value.value_or(0) > as_double(*budget.usd_micros) / 1e6) {
    plan.warnings.push_back("the run is forecast to cost more than budget.usd " +
                            usd_text(*budget.usd_micros) + ": it will stop at a checkpoint");
  }
  if (budget.gpu_hours && plan.gpu_hours.value.value_or(0) > *budget.gpu_hours) {
    plan.warnings.push_back("the run is forecast to take more than budget.gpu_hours " +
                            short_text(*budget.gpu_hours) + ": it will stop at a checkpoint");
  }
}

}  // namespace tailor
