#include "recipes/write.h"

#include <algorithm>

#include "base/url.h"
#include "recipes/schema.h"

namespace tailor {

std::string resolved_text(const RecipeFile& file) {
  Recipe shown = file.recipe;
  if (shown.cost.ledger) shown.cost.ledger = without_password(*shown.cost.ledger);
  if (shown.logging.mlflow) shown.logging.mlflow = without_password(*shown.logging.mlflow);

  std::string out = "# Every key of the recipe with its value and where the value comes from.\n";
  std::string section;
  constexpr std::size_t kCommentColumn = 44;
  for (const RecipeKey& key : recipe_keys()) {
    const std::size_t dot = key.path.find('.');
    std::string line;
    if (dot != std::string::npos) {
      if (const std::string own = key.path.substr(0, dot); own != section) {
        section = own;
        out += "\n" + section + ":\n";
      }
      line = "  " + key.path.substr(dot + 1);
    } else {
      line = key.path;
    }
    line += ": " + key.write(shown);
    const auto origin = file.origins.find(key.path);
    std::string comment = origin == file.origins.end() ? "default" : origin->second.text;
    comment = without_password(comment);  // an override is quoted with its value
    std::replace_if(
        comment.begin(), comment.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20; },
        ' ');
    line.append(std::max<std::size_t>(2, kCommentColumn - std::min(kCommentColumn, line.size())),
                ' ');
    out += line + "# " + comment + "\n";
  }
  return out;
}

}  // namespace tailor
