#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "recipes/recipe.h"

namespace tailor {

/// Where a value of the recipe comes from.
struct Origin {
  enum class Kind { default_value, file, override_value, model };
  Kind kind = Kind::default_value;
  std::string text =
      "default";  ///< "default", "recipes/x.yaml:12", "override lora.rank=4", "by the model"
};

/// A recipe as read.
struct RecipeFile {
  Recipe recipe;
  std::map<std::string, Origin> origins;  ///< of every key, by its dotted name
  std::vector<std::string> given;         ///< keys set by the file or an override, in schema order
  std::string name;                       ///< the file's path as given
};

/// Reads a recipe file strictly, `key=value` overrides applied on top (dotted keys, YAML values,
/// the last one wins). Relative paths stay as they are: they start at the working directory.
///
///   null      is a value where the key's type names it; elsewhere it is an error. An empty section
///             is fine. A required key must be there and not null.
///   numbers   1e-3, 0.001, 1.0e-3; 010 and 0x10 are refused as ambiguous, like yes, no, on, off.
///   sizes     24GiB (2^30), 24GB (10^9), 24000000 (bytes).
///
/// Throws one Error{usage} that lists every problem: place, excerpt with caret, nearest known name.
RecipeFile read_recipe(const fs::path& path, std::span<const std::string> overrides = {});

/// As read_recipe for text in memory; `name` stands for the path in messages.
RecipeFile read_recipe_text(std::string_view text, const std::string& name,
                            std::span<const std::string> overrides = {});

/// As resolve(Recipe&, ...), with the origins of what it sets.
std::vector<std::string> resolve(RecipeFile& file, const ModelTraits& model);

}  // namespace tailor
