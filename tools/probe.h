#pragma once

#include "tools/planning.h"

namespace tailor {

/// Measures this machine for `recipe`, some seconds: steps of layers of its shapes and formats in a
/// child process (`tailor-compute calibrate RECIPE`), reads past the page cache in the cache
/// folder. Throws Error{usage} when the recipe is planned for another machine, Error{device} when
/// the child is not there or fails.
MachineProbe probe(const ResolvedRecipe& recipe, const std::optional<DataStats>& data);

}  // namespace tailor
