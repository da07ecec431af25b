#pragma once

#include <string>

#include "recipes/read.h"

namespace tailor {

/// The text of recipe.resolved.yaml: every key with its value, and where that value comes from as a
/// comment. Reading it back gives the same Recipe, except that addresses lose their passwords: run
/// folders are passed around.
std::string resolved_text(const RecipeFile& file);

}  // namespace tailor
