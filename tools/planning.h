#pragma once

#include <optional>

#include "recipes/plan.h"
#include "tools/data_memo.h"
#include "tools/recipe_inputs.h"

namespace tailor {

/// Above this share of its cores in others' use, what is measured on a machine says little.
constexpr double kBusyShare = 0.15;

/// What training steps reach on this machine, as `tailor calibrate` measured it.
struct MachineCalibration {
  double gflops_bfloat16 = 0, gflops_float32 = 0;
  std::string measured;   ///< date
  double busy_share = 0;  ///< of the cores that others used meanwhile

  /// <cache>/machine-calibration.json.
  static fs::path path();
  /// Nothing where the file is missing or damaged.
  static std::optional<MachineCalibration> read();
};

/// Whether a calibration that is missing is measured, once, in a child process.
enum class Measure { once, never };

/// The calibration for a recipe: of this machine and only where the plan is for it. What was
/// measured of its own layers comes first.
std::optional<Calibration> calibration_of(const Recipe& recipe, const ModelFacts& model,
                                          const Machine& machine, Measure measure);

/// The user's price books (prices.yaml and prices/*.yaml of the config folder), then the shipped
/// one.
PriceBook price_books();

/// The machine the recipe names, or this one.
Machine recipe_machine(const Recipe& recipe);

/// What an hour of that machine costs the recipe's user today.
PriceQuote recipe_price(const Recipe& recipe, const Machine& machine);

struct PlannedRecipe {
  Machine machine;
  Plan plan;
};

struct PlanChoices {
  Measure measure = Measure::never;
  bool oracle_assumptions = false;
  bool advice = false;  ///< Plan::advice as well
};
PlannedRecipe plan_recipe(const ResolvedRecipe& recipe, const std::optional<DataStats>& data,
                          const PlanChoices& choices);
/// make_plan() with the recipe's machine, the shipped prices of today and what is measured.
PlannedRecipe plan_recipe(const ResolvedRecipe& recipe, const std::optional<DataStats>& data,
                          Measure measure);

/// When data that was not prepared yet is tokenised to be counted.
enum class CountData {
  for_steps,  ///< 64 MB or less, where training.max_steps does not say how long the run is
  if_small,   ///< 64 MB or less
  always,
};
/// Rows of the recipe's data: of its prepared store where there is one, else as `count` says.
std::optional<DataStats> data_stats(const Recipe& recipe, CountData count);

}  // namespace tailor
