#pragma once

#include "recipes/measured_step.h"
#include "tools/recipe_inputs.h"

namespace tailor {

/// Measures steps of a recipe on this machine for some seconds, with the trainer's own step: a
/// model of as many of the recipe's layers as that time allows, of random weights, in the recipe's
/// formats and held in memory or read from disk as the run would hold them; the recipe's factors,
/// rows and data, where that is prepared. Writes a store of at most 3 GB into the cache and removes
/// it.
///
/// Throws Error: does_not_fit (the plan does not, or one layer of each kind is too large to measure
/// so), usage (the recipe is for another machine), io (no room in the cache).
MeasuredStep measure_recipe_step(const ResolvedRecipe& resolved);

}  // namespace tailor
