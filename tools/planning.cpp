#include "tools/planning.h"

#include <algorithm>

#include "base/clock.h"
#include "base/log.h"
#include "base/text.h"
#include "data/checkpoint/checkpoint.h"
#include "recipes/advice.h"
#include "tools/compute_program.h"
#include "tools/data_memo.h"
#include "tools/paths.h"
#include "tools/step_memo.h"

namespace tailor {
namespace {

constexpr std::int64_t kReadBytesMax = 64'000'000;

/// Runs `tailor-compute calibrate`, its result on our stderr. False when it could not.
bool calibrate() {
  log_info("measuring what a training step reaches on this machine, once (a few seconds)");
  try {
    return run_compute({"calibrate"}) == 0;
  } catch (const Error&) {
    return false;
  }
}

std::int64_t bytes_of(const std::vector<DataSource>& sources) {
  std::int64_t total = 0;
  for (const DataSource& source : sources) {
    for (const fs::path& path : expand_files(source.path)) {
      total += static_cast<std::int64_t>(fs::file_size(path));
    }
  }
  return total;
}

bool has_weights(const std::string& base_model) {
  try {
    find_model_folder(base_model);
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace

fs::path MachineCalibration::path() { return cache_folder() / "machine-calibration.json"; }

std::optional<MachineCalibration> MachineCalibration::read() {
  std::error_code error;
  if (!fs::exists(path(), error)) return std::nullopt;
  try {
    const Json json = read_json(path());
    const JsonReader reader(json, path().string());
    MachineCalibration out{reader.number("gflops_bfloat16"), reader.number("gflops_float32"),
                           reader.text("measured", "an unknown day"),
                           reader.number("busy_share", 0)};
    if (!(out.gflops_bfloat16 > 0) || !(out.gflops_float32 > 0)) return std::nullopt;
    return out;
  } catch (const Error& broken) {
    log_warning("leaving " + path().string() + " aside: " + broken.parts().what);
    return std::nullopt;
  }
}

std::optional<Calibration> calibration_of(const Recipe& recipe, const ModelFacts& model,
                                          const Machine& machine, Measure measure) {
  if (machine.kind != Machine::Kind::cpu || recipe.machine.profile) return std::nullopt;
  if (std::optional<MeasuredStep> step = recall_step(recipe, model)) {
    Calibration out{0, step->source(), step->busy_share > kBusyShare};
    out.step = std::move(step);
    return out;
  }
  std::optional<MachineCalibration> found = MachineCalibration::read();
  if (!found && measure == Measure::once && calibrate()) found = MachineCalibration::read();
  if (!found) return std::nullopt;
  const bool wide = recipe.compute.dtype == ComputeType::float32;
  return Calibration{wide ? found->gflops_float32 : found->gflops_bfloat16,
                     "measured on this machine on " + found->measured,
                     found->busy_share > kBusyShare};
}

PriceBook price_books() {
  std::vector<fs::path> paths;
  const fs::path own = config_folder();
  std::error_code error;
  if (fs::exists(own / "prices.yaml", error)) paths.push_back(own / "prices.yaml");
  std::vector<fs::path> more;
  for (fs::directory_iterator it(own / "prices", error), end; !error && it != end;
       it.increment(error)) {
    if (it->path().extension() == ".yaml") more.push_back(it->path());
  }
  std::sort(more.begin(), more.end());
  paths.insert(paths.end(), more.begin(), more.end());
  paths.push_back(recipes_folder() / "prices.yaml");
  std::vector<PriceBook> books;
  for (const fs::path& path : paths) books.push_back(PriceBook::read(path));
  return PriceBook::join(books);
}

Machine recipe_machine(const Recipe& recipe) {
  return recipe.machine.profile
             ? find_machine(*recipe.machine.profile, recipes_folder() / "machines")
             : this_machine(recipe.output_dir);
}

PriceQuote recipe_price(const Recipe& recipe, const Machine& machine) {
  return quote(price_books(), recipe.cost.price, machine.sku, machine.tier, RealClock().unix_ms());
}

PlannedRecipe plan_recipe(const ResolvedRecipe& resolved, const std::optional<DataStats>& data,
                          const PlanChoices& choices) {
  const Recipe& recipe = resolved.file.recipe;
  PlannedRecipe out{recipe_machine(recipe), {}};
  PlanExtras extras;
  extras.data = data;
  extras.calibration = calibration_of(recipe, resolved.facts, out.machine, choices.measure);
  if (extras.calibration && extras.calibration->step) {
    out.machine.disk_bytes_per_second = extras.calibration->step->disk_bytes_per_second;
  }
  extras.at_unix_ms = RealClock().unix_ms();
  extras.oracle_assumptions = choices.oracle_assumptions;
  if (!recipe.machine.profile) {  // of other machines nothing is known
    extras.weights_here = has_weights(recipe.base_model);
    extras.store_here = !recipe_store(recipe).empty();
  }
  const PriceBook prices = price_books();
  out.plan = make_plan(recipe, resolved.facts, out.machine, prices, extras);
  if (choices.advice) {
    out.plan.advice = advise(recipe, resolved.facts, out.machine, prices, extras, out.plan);
  }
  return out;
}

PlannedRecipe plan_recipe(const ResolvedRecipe& recipe, const std::optional<DataStats>& data,
                          Measure measure) {
  PlanChoices choices;
  choices.measure = measure;
  return plan_recipe(recipe, data, choices);
}

std::optional<DataStats> data_stats(const Recipe& recipe, CountData count) {
  if (const auto known = recall_data(recipe)) return known;
  if (count == CountData::always) return stats_of(prepare_recipe_data(recipe));
  if (recipe.training.max_steps && count == CountData::for_steps) return std::nullopt;
  try {
    if (bytes_of(recipe.data.train) + bytes_of(recipe.data.validation) > kReadBytesMax) {
      log_info("the data is large: `tailor plan --data` reads it");
      return std::nullopt;
    }
    find_model_folder(recipe.base_model);
  } catch (const Error&) {  // a plan needs neither data nor weights
    return std::nullopt;
  }
  return stats_of(prepare_recipe_data(recipe));
}

}  // namespace tailor
