#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "recipes/recipe.h"
#include "recipes/yaml.h"

namespace tailor {

/// One key of the recipe: how it is read, written and explained. The reader, the writer, messages
/// and docs/recipes.md all follow this one table.
struct RecipeKey {
  std::string path;           ///< "lora.rank"
  std::string type;           ///< for people: "whole number >= 1"
  std::string default_value;  ///< as YAML; "required" where there is none
  std::string meaning;
  bool required = false;
  /// Sets the field from `node`, or reports why not. Never called for a required key's null.
  std::function<void(Recipe&, const YamlNode& node, Problems&)> read;
  /// The field's value as YAML on one line, such that read() gives the same value back.
  std::function<std::string(const Recipe&)> write;
};

/// Every key, in the order of the recipe's structs.
const std::vector<RecipeKey>& recipe_keys();
const RecipeKey* find_recipe_key(std::string_view path);

/// Names of the sections, in order: lora, data, ...
const std::vector<std::string>& recipe_sections();

/// What an unknown key most likely meant, as a sentence for `mend`: by what other trainers call it
/// (lora_r, cutoff_len, ...), by a known key in another section, or by spelling.
std::string unknown_key_hint(std::string_view path);

}  // namespace tailor
