#pragma once

#include <string>
#include <vector>

#include "base/file.h"

namespace tailor {

/// A recipe that comes with Tailor.
struct ShippedRecipe {
  std::string name;  ///< "demo-maverick"
  fs::path path;
  std::string description;  ///< the file's first comment line
};

/// The recipes in `folder` (not below it), by name.
std::vector<ShippedRecipe> shipped_recipes(const fs::path& folder);

/// The recipe a user means: a file that exists, else a shipped one by name ("demo-maverick", with
/// or without .yaml). Throws Error{usage} with the nearest name.
fs::path find_recipe(const std::string& asked, const fs::path& folder);

/// Copies a recipe to `destination` (a file, or a folder that exists). Throws Error{usage} when the
/// file is there already.
fs::path copy_recipe(const std::string& asked, const fs::path& folder, const fs::path& destination);

}  // namespace tailor
