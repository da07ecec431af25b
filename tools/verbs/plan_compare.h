#pragma once

#include <string>
#include <vector>

#include "tools/planning.h"

namespace tailor {

/// A recipe and the machine it was planned for.
struct ComparedPlan {
  std::string recipe, machine;
  int ranks = 1;
  PlannedRecipe planned;
  std::vector<std::string> notes;
};

/// The recipe on all devices of a machine profile ("auto": this machine), the same rows a step. A
/// price that the recipe pins belongs to its own machine and gives way to that of the machine's
/// SKU. Throws Error{usage} for an unknown profile, naming the nearest.
ResolvedRecipe on_machine(const ResolvedRecipe& recipe, const std::string& profile);

/// One line a plan, a table.
std::string compare_text(const std::vector<ComparedPlan>& plans);
/// {plans: [...]}, each as `tailor plan --json` gives one.
Json compare_json(const std::vector<ComparedPlan>& plans);

/// plan_json() with what the verb adds to it.
Json named_plan_json(const ComparedPlan& plan);

}  // namespace tailor
