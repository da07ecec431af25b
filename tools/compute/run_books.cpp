#include "tools/compute/run_books.h"

#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "base/environment.h"
#include "base/file.h"
#include "base/launcher.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/text.h"
#include "base/units.h"
#include "base/url.h"
#include "recipes/schema.h"

namespace tailor {
namespace {

std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "unknown";
}

std::string ledger_place(const Recipe& recipe) {
  return recipe.cost.ledger.value_or(Ledger::default_place());
}

BudgetLimits own_limits(const BudgetRecipe& budget) {
  BudgetLimits limits{budget.usd_micros, std::nullopt};
  if (budget.gpu_hours) limits.device_ms = std::llround(*budget.gpu_hours * 3.6e6);
  return limits;
}

/// The plan's share for the steps that are still to come.
PlannedUse planned_use(const Plan& plan, std::int64_t first_step, std::int64_t steps) {
  PlannedUse out;
  const double share =
      steps > 0 ? static_cast<double>(steps - first_step) / static_cast<double>(steps) : 0;
  if (plan.gpu_hours.value) out.device_ms = std::llround(*plan.gpu_hours.value * share * 3.6e6);
  if (plan.usd.value) {
    out.usd_micros = std::llround(*plan.usd.value * share * static_cast<double>(kMicrosPerUsd));
  }
  return out;
}

}  // namespace

void refuse_plan_over_budget(const Recipe& recipe, const Plan& plan, const std::string& run,
                             std::int64_t first_step, std::int64_t steps, const Clock& clock) {
  if (recipe.budget.action == BudgetAction::warn) return;
  std::unique_ptr<Ledger> ledger;
  try {
    ledger = Ledger::open_existing(ledger_place(recipe), clock);
  } catch (const Error& error) {
    if (error.fault() != Fault::io && error.fault() != Fault::bad_file) throw;
  }
  if (!ledger) ledger = Ledger::in_memory(clock);
  PlannedUse left = planned_use(plan, first_step, steps);
  if (first_step > 0) {
    left.left = "the " + count_text(steps - first_step) + " steps left, as planned,";
    if (auto known =
            left_at_pace(*ledger, run, first_step, steps, plan.price.usd_micros_per_device_hour)) {
      left = std::move(*known);
    }
  }
  refuse_over_budget(*ledger, run, recipe.cost.project.value_or(""), own_limits(recipe.budget),
                     left);
}

RunBooks::RunBooks(const Recipe& recipe, const Plan& plan, const RunFolder& folder,
                   const RunRanks& ranks, const Clock& clock, const Facts& facts)
    : recipe_(recipe),
      plan_(plan),
      folder_(folder),
      facts_(facts),
      devices_(ranks.size()),
      ledger_(std::make_unique<JournaledLedger>(
          ledger_place(recipe), folder.path(), clock,
          folder.resumed() ? JournaledLedger::Start::wait : JournaledLedger::Start::refuse)),
      clock_(clock) {
  RunFacts run;
  run.run = folder.run();
  run.name = recipe.name;
  run.project = recipe.cost.project.value_or("");
  run.owner = user_name();
  run.output_dir = folder.path();
  run.base_model = recipe.base_model;
  run.dataset_sha256 = facts.dataset_sha256;
  run.recipe_text = facts.recipe_text;
  run.recipe_sha256 = sha256_hex(facts.recipe_text);
  run.code_version = TAILOR_VERSION;
  run.seed = recipe.seed;
  const BudgetLimits limits = own_limits(recipe.budget);
  run.usd_micros_limit = limits.usd_micros;
  run.device_ms_limit = limits.device_ms;
  ledger_->begin_run(run);
  AttemptFacts attempt;
  const Launcher launcher = read_launcher();
  attempt.launcher = launcher.name;
  attempt.launcher_job = launcher.job_id;
  attempt.world_size = ranks.size();
  attempt.nodes = ranks.nodes();
  attempt.devices = devices_;
  attempt.host = host_name();
  attempt.device_kind = "cpu";
  attempt.sku = facts.sku;
  attempt.usd_micros_per_device_hour = plan.price.usd_micros_per_device_hour;
  attempt.no_price_reason = plan.price.reason;
  attempt.price_id = plan.price.id;
  attempt.price_kind = plan.price.kind;
  attempt.price_source = plan.price.source;
  attempt.resumed_from_step = facts.first_step;
  const PlannedUse planned = planned_use(plan, facts.first_step, facts.steps);
  attempt.planned_device_ms = planned.device_ms;
  attempt.planned_usd_micros = planned.usd_micros;
  attempt_ = ledger_->begin_attempt(folder.run(), attempt);
  if (facts.over_budget) {
    ledger_->event(attempt_, std::nullopt, "budget_overridden",
                   "started with --over-budget: the plan may exceed the budget");
  }
  budget_ = std::make_unique<BudgetWatch>(
      *ledger_, attempt_,
      BudgetWatch::Options{limits, recipe.budget.warn, run.project, devices_,
                           plan.price.usd_micros_per_device_hour, facts.first_step, facts.steps});
  SegmentTimer::Extras extras;
  extras.after_heartbeat = [this] { budget_->refresh(); };
  // The first rank sees its own machine: half of a sum is no sum.
  if (ranks.nodes() == 1) extras.energy = EnergyMeter::rapl();
  if (ranks.size() == 1) extras.busy = BusyMeter::process(at::get_num_threads());
  timer_ = std::make_unique<SegmentTimer>(
      *ledger_, attempt_, Phase::load, SegmentTimer::Heartbeats::thread,
      launcher.paid_since_steady_ms(clock, facts.began_steady_ms), std::move(extras));
  if (folder.resumed() && !ledger_->connected()) count_earlier_attempts();
}

/// While the ledger is away, what earlier attempts spent is known from the metrics' last line.
void RunBooks::count_earlier_attempts() {
  const Metrics metrics = read_metrics(folder_.metrics());
  if (metrics.steps.empty()) return;
  const StepMetrics& last = metrics.steps.back();
  SegmentTimer::Spent before{std::llround(last.gpu_hours * 3.6e6), std::nullopt};
  if (last.usd) before.usd_micros = std::llround(*last.usd * static_cast<double>(kMicrosPerUsd));
  timer_->spent_before_at_least(before);
}

void RunBooks::open_metrics() {
  metrics_ = std::make_unique<MetricsWriter>(
      folder_.resumed() ? MetricsWriter::resume(folder_.metrics(), facts_.first_step)
                        : MetricsWriter::create(folder_.metrics()));
  if (recipe_.logging.mlflow) open_mlflow();
  if (!recipe_.logging.tensorboard) return;
  tensorboard_ = std::make_unique<TensorboardWriter>(folder_.path(), clock_, facts_.first_step);
  if (facts_.first_step == 0) {
    tensorboard_->text("recipe", "```yaml\n" + facts_.recipe_text + "```");
  }
}

LiveMoney RunBooks::money() const {
  const SegmentTimer::Spent spent = timer_->spent();
  LiveMoney out;
  out.gpu_hours = spent.gpu_hours();
  out.usd = spent.usd();
  out.devices = devices_;
  out.hours_word = "device-hours";  // as its ledger has it: the attempt's kind is cpu
  if (const auto rate = plan_.price.usd_micros_per_device_hour) {
    out.usd_per_second = static_cast<double>(*rate) * devices_ / 3.6e9;
  }
  if (const auto usd = recipe_.budget.usd_micros) {
    out.usd_budget = static_cast<double>(*usd) / 1e6;
  }
  out.gpu_hours_budget = recipe_.budget.gpu_hours;
  if (const auto shared = budget_->shared()) {
    out.shared.project = recipe_.cost.project.value_or("");
    if (const auto usd = shared->limits.usd_micros) {
      out.shared.usd_budget = static_cast<double>(*usd) / 1e6;
    }
    if (const auto ms = shared->limits.device_ms) {
      out.shared.gpu_hours_budget = static_cast<double>(*ms) / 3.6e6;
    }
    out.shared.others_usd = shared->others_usd_micros / 1e6;
    out.shared.others_gpu_hours = shared->others_device_ms / 3.6e6;
  }
  return out;
}

void RunBooks::step(const StepRecord& record) {
  timer_->step_done({record.step, record.tokens, record.trained_tokens, record.stall_seconds});
  if (!record.expert_rows.empty()) write_experts(record);
  const bool log_it =
      record.step % recipe_.logging.metrics_every_steps == 0 || record.step == facts_.steps;
  if (!log_it) return;
  StepMetrics line;
  line.step = record.step;
  line.loss = record.loss;
  line.learning_rate = record.learning_rate;
  line.grad_norm = record.grad_norm;
  line.tokens = record.tokens;
  line.trained_tokens = record.trained_tokens;
  line.seconds = record.seconds;
  line.tokens_per_second = static_cast<double>(record.tokens) / record.seconds;
  line.stream_bytes = record.stream_bytes;
  line.stall_seconds = record.stall_seconds;
  if (devices_ > 1) {
    line.exchange = {record.exchange_weight_bytes, record.exchange_factor_bytes,
                     record.exchange_gradient_bytes, record.exchange_seconds,
                     record.exchange_exposed_seconds};
  }
  line.host_bytes_peak = resident_bytes_peak();
  const SegmentTimer::Spent spent = timer_->spent();
  line.gpu_hours = spent.gpu_hours();
  line.usd = spent.usd();
  metrics_->write(line);
  scalar("train/loss", line.loss, line.step);
  scalar("train/learning_rate", line.learning_rate, line.step);
  scalar("train/grad_norm", line.grad_norm, line.step);
  scalar("train/tokens_per_second", line.tokens_per_second, line.step);
  if (line.usd) scalar("cost/usd", *line.usd, line.step);
  if (tensorboard_) tensorboard_->flush();
}

void RunBooks::scalar(const std::string& name, double value, std::int64_t step) {
  if (tensorboard_) tensorboard_->scalar(name, value, step);
  if (mlflow_) mlflow_->metric(name, value, step);
}

void RunBooks::open_mlflow() {
  MlflowSink::Options options;
  options.address = *recipe_.logging.mlflow;
  options.experiment = recipe_.cost.project.value_or("tailor");
  options.name = recipe_.name;
  options.run = folder_.run();
  for (const RecipeKey& key : recipe_keys()) {
    options.params[key.path] = without_password(key.write(recipe_));
  }
  mlflow_ = std::make_unique<MlflowSink>(std::move(options), clock_);
}

void RunBooks::write_experts(const StepRecord& record) {
  ExpertMetrics line{record.step, {}};
  const auto experts =
      static_cast<std::ptrdiff_t>(record.expert_rows.size() / facts_.moe_layers.size());
  auto rows = record.expert_rows.begin();
  for (const int layer : facts_.moe_layers) {
    line.layers.push_back({layer, {rows, rows + experts}});
    rows += experts;
  }
  metrics_->write(line);
}

void RunBooks::evaluation(std::int64_t step, const Evaluation& result) {
  EvalMetrics line;
  line.step = step;
  line.eval_loss = result.loss;
  line.tokens = result.tokens;
  line.seconds = result.seconds;
  const SegmentTimer::Spent spent = timer_->spent();
  line.gpu_hours = spent.gpu_hours();
  line.usd = spent.usd();
  metrics_->write(line);
  scalar("eval/loss", result.loss, step);
  scalar("eval/token_accuracy", result.token_accuracy, step);
  if (tensorboard_) tensorboard_->flush();
}

void RunBooks::checkpoint(const SavedCheckpoint& saved, double seconds) {
  checkpoint_seconds_ = seconds;
  ledger_->artifact(attempt_,
                    {"checkpoint", saved.folder.string(), saved.step, saved.bytes, saved.sha256});
}

bool RunBooks::over_budget(std::int64_t step, RunProgress& progress) {
  constexpr double kLeavingSeconds = 2;
  const BudgetWatch::Verdict verdict =
      budget_->after_step(timer_->spent(), step, checkpoint_seconds_ + kLeavingSeconds);
  if (!verdict.event.empty()) {
    progress.say("warning: " + verdict.say);
    ledger_->event(attempt_, step, verdict.event, verdict.say);
  }
  return verdict.stop && recipe_.budget.action == BudgetAction::checkpoint_stop;
}

void RunBooks::adapter(const fs::path& file, std::int64_t step) {
  ledger_->artifact(attempt_, {"adapter", file.string(), step,
                               static_cast<std::int64_t>(fs::file_size(file)), sha256_file(file)});
}

RunReport RunBooks::finish(RunStatus status, int exit_code, const std::string& reason) {
  timer_->finish(status, exit_code, reason);
  if (mlflow_) {
    mlflow_->finish(status == RunStatus::succeeded ? "FINISHED"
                    : status == RunStatus::failed  ? "FAILED"
                                                   : "KILLED");
  }
  return write_report(*ledger_, folder_.run());
}

void RunBooks::fail(const Error& error) {
  try {
    finish(RunStatus::failed, error.exit_code(), error.parts().what);
  } catch (const Error& second) {
    log_warning("the ledger could not be closed: " + second.parts().what);
  }
}

}  // namespace tailor
