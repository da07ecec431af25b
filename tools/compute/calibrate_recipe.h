#pragma once

#include "base/json.h"
#include "tools/compute_verbs.h"

namespace tailor {

/// What a step of the recipe takes on this machine, from steps of a few of its layers: random
/// weights in its shapes and formats, its factors, its micro-batches. Steps of one layer of each
/// kind and of some more give what a layer costs, the model's layers add up.
/// {gflops, step_seconds, tokens, layers_measured, source}. Writes a store of those layers below
/// the cache folder and removes it. Throws Error{does_not_fit} when they have more than 2 GB.
Json calibrate_recipe(const CalibrateArguments& arguments);

}  // namespace tailor
