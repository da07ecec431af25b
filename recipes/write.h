#pragma once

#include <string>

#include "recipes/read.h"

namespace tailor {

/// The text of recipe.resolved.yaml: every key with its value, and where that value comes from as a
/// comment. Reading it back gives the same Recipe, except that passwords in addresses are written
/// as
/// ***: run folders are passed around.
std::string resolved_text(const RecipeFile& file);

/// "postgresql://me:secret@host/db" with the password as ***.
std::string without_password(const std::string& address);

}  // namespace tailor
