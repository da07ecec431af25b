#pragma once

#include <functional>
#include <string>
#include <vector>

#include "recipes/plan.h"
#include "recipes/read.h"

namespace tailor {

/// A shipped recipe with overrides, planned for a shipped machine at the shipped prices.
struct PlannedRun {
  Recipe recipe;
  ModelFacts model;
  Machine machine;
  PlanExtras extras;
  Plan plan;
};

inline const fs::path& shipped_folder() {
  static const fs::path folder = fs::path(TAILOR_SOURCE_DIR) / "recipes";
  return folder;
}

inline const PriceBook& shipped_prices() {
  static const PriceBook book = PriceBook::read(shipped_folder() / "prices.yaml");
  return book;
}

inline PlannedRun planned_run(const std::string& recipe, const std::vector<std::string>& overrides,
                              PlanExtras extras = {},
                              const std::function<void(Machine&)>& change = {}) {
  RecipeFile file = read_recipe(shipped_folder() / (recipe + ".yaml"), overrides);
  PlannedRun out;
  out.model = read_model_facts(file.recipe.base_model, shipped_folder() / "models");
  resolve(file, out.model.traits());
  out.recipe = file.recipe;
  out.machine = find_machine(*out.recipe.machine.profile, shipped_folder() / "machines");
  if (change) change(out.machine);
  out.extras = std::move(extras);
  if (out.extras.at_unix_ms == 0) out.extras.at_unix_ms = 1'772'800'000'000;  // 2026-03-06
  out.plan = make_plan(out.recipe, out.model, out.machine, shipped_prices(), out.extras);
  return out;
}

}  // namespace tailor
