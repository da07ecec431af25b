#pragma once

#include <optional>
#include <string>
#include <vector>

#include "recipes/measured_step.h"
#include "tools/recipe_inputs.h"

namespace tailor {

/// What a step of a recipe took on this machine when it was measured, kept in the cache under
/// everything that a step's time depends on: the model's shape, formats and budgets of the base,
/// the factors' sizes, rows and their length, dtype and threads, Tailor's version, the processor.
/// Another recipe with the same step finds it too.
fs::path step_memo_path(const Recipe& recipe, const ModelFacts& model);

/// Nothing where it was not measured, or the file is damaged (a warning says so).
std::optional<MeasuredStep> recall_step(const Recipe& recipe, const ModelFacts& model);

/// Writes it, but for what a busy machine gave where a quiet one's is there. Returns whether it
/// did.
bool remember_step(const Recipe& recipe, const ModelFacts& model, const MeasuredStep& step);

/// Runs `tailor-compute calibrate` for a recipe as the user named it, its text on our stderr; what
/// it measured can then be recalled. Throws Error with the fault it ended with, Error{usage} where
/// the program is missing.
void measure_step(const std::string& recipe, const std::vector<std::string>& overrides);

}  // namespace tailor
