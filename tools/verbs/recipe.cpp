#include <iostream>

#include "base/error.h"
#include "base/json.h"
#include "data/runs/table.h"
#include "recipes/schema.h"
#include "recipes/shipped.h"
#include "recipes/write.h"
#include "tools/paths.h"
#include "tools/recipe_inputs.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

/// Every key as written in YAML, with its origin: {"lora.rank": {"value": "8", "origin":
/// "default"}}.
Json keys_json(const RecipeFile& file) {
  Json out = Json::object();
  for (const RecipeKey& key : recipe_keys()) {
    const auto origin = file.origins.find(key.path);
    out[key.path] = {{"value", key.write(file.recipe)},
                     {"origin", origin == file.origins.end() ? "default" : origin->second.text}};
  }
  return out;
}

/// The recipe fitted to its model, or as read where the model is not here.
struct Checked {
  RecipeFile file;
  std::vector<std::string> notes;
  bool model_found = false;
};
Checked check(const std::string& asked, const std::vector<std::string>& overrides) {
  RecipeFile file = open_recipe(asked, overrides);
  try {
    ResolvedRecipe resolved = resolve_recipe(file);
    return {std::move(resolved.file), std::move(resolved.notes), true};
  } catch (const Error& error) {
    if (error.fault() != Fault::usage || !error.parts().what.starts_with("no such model")) throw;
    return {std::move(file),
            {"base_model " + file.recipe.base_model +
             " is not on this machine: what depends on it was not checked"},
            false};
  }
}

}  // namespace

int run_recipe_list(const RecipeListArguments& arguments) {
  const std::vector<ShippedRecipe> recipes = shipped_recipes(recipes_folder());
  if (arguments.json) {
    Json out = Json::array();
    for (const ShippedRecipe& recipe : recipes) {
      out.push_back({{"name", recipe.name},
                     {"path", recipe.path.string()},
                     {"description", recipe.description}});
    }
    std::cout << out.dump(2) << "\n";
    return 0;
  }
  TextTable table({"recipe", "what it is"});
  for (const ShippedRecipe& recipe : recipes) table.add({recipe.name, recipe.description});
  std::cout << table.text();
  return 0;
}

int run_recipe_show(const RecipeShowArguments& arguments) {
  const fs::path path = find_recipe(arguments.recipe, recipes_folder());
  if (!arguments.json && !arguments.resolved && arguments.overrides.empty()) {
    std::cout << read_text(path);
    return 0;
  }
  const Checked checked = check(arguments.recipe, arguments.overrides);
  if (arguments.json) {
    std::cout << Json{{"path", path.string()},
                      {"text", read_text(path)},
                      {"keys", keys_json(checked.file)}}
                     .dump(2)
              << "\n";
  } else {
    std::cout << resolved_text(checked.file);
  }
  return 0;
}

int run_recipe_copy(const RecipeCopyArguments& arguments) {
  const fs::path to = copy_recipe(arguments.recipe, recipes_folder(), arguments.destination);
  if (arguments.json) {
    std::cout << Json{{"path", to.string()}}.dump(2) << "\n";
  } else {
    std::cout << "wrote " << to.string() << "\n";
  }
  return 0;
}

int run_recipe_validate(const RecipeValidateArguments& arguments) {
  const Checked checked = check(arguments.recipe, arguments.overrides);
  if (arguments.json) {
    std::cout << Json{{"valid", true},
                      {"recipe", checked.file.name},
                      {"name", checked.file.recipe.name},
                      {"base_model", checked.file.recipe.base_model},
                      {"model_found", checked.model_found},
                      {"notes", checked.notes},
                      {"keys", keys_json(checked.file)}}
                     .dump(2)
              << "\n";
    return 0;
  }
  std::cout << checked.file.name << " is a good recipe, " << checked.file.given.size()
            << " keys given\n";
  for (const std::string& note : checked.notes) std::cout << "  note: " << note << "\n";
  return 0;
}

}  // namespace tailor
