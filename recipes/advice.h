#pragma once

#include <vector>

#include "recipes/plan.h"

namespace tailor {

/// What to change in a recipe, each change planned again: where the plan does not fit what makes it
/// fit, else what makes the same tokens at least a tenth cheaper. Best first, three at most; empty
/// when nothing does. `plan` is make_plan() of the other arguments.
std::vector<Advice> advise(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
                           const PriceBook& prices, const PlanExtras& extras, const Plan& plan);

}  // namespace tailor
