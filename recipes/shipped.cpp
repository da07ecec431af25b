#include "recipes/shipped.h"

#include <algorithm>

#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

std::string first_comment(const fs::path& path) {
  for (const std::string& line : split(read_text(path), '\n')) {
    std::string_view text = trim(line);
    if (text.empty()) continue;
    if (text.front() != '#') break;
    text.remove_prefix(std::min(text.find_first_not_of('#'), text.size()));
    if (!trim(text).empty()) return std::string(trim(text));
  }
  return {};
}

}  // namespace

std::vector<ShippedRecipe> shipped_recipes(const fs::path& folder) {
  std::vector<ShippedRecipe> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const fs::path& path = entry.path();
    if (path.extension() != ".yaml" || path.filename() == "prices.yaml" || !entry.is_regular_file())
      continue;
    found.push_back({path.stem().string(), path, first_comment(path)});
  }
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  return found;
}

fs::path find_recipe(const std::string& asked, const fs::path& folder) {
  std::error_code error;
  if (fs::is_regular_file(asked, error)) return asked;
  const std::string name = asked.ends_with(".yaml") ? asked.substr(0, asked.size() - 5) : asked;
  std::vector<std::string> names;
  for (const ShippedRecipe& recipe : shipped_recipes(folder)) {
    if (recipe.name == name) return recipe.path;
    names.push_back(recipe.name);
  }
  const std::string near = nearest_name(fs::path(name).filename().string(), names);
  throw Error(Fault::usage, {"there is no recipe '" + asked + "'",
                             "files from " + fs::current_path(error).string() +
                                 " and shipped recipes in " + folder.string(),
                             (near.empty() ? "Shipped: " + join(names, ", ") + "."
                                           : "Did you mean " + near + "?") +
                                 " `tailor recipe ls` lists them."});
}

fs::path copy_recipe(const std::string& asked, const fs::path& folder,
                     const fs::path& destination) {
  const fs::path from = find_recipe(asked, folder);
  std::error_code error;
  fs::path to = fs::is_directory(destination, error) ? destination / from.filename() : destination;
  if (fs::exists(to, error)) {
    throw Error(Fault::usage,
                {"there is a file already", to.string(), "Name another file, or remove it first."});
  }
  if (to.has_parent_path()) make_folders(to.parent_path());
  write_atomically(to, read_text(from));
  return to;
}

}  // namespace tailor
