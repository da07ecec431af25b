#include "recipes/read.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "base/text.h"
#include "recipes/fields.h"
#include "recipes/schema.h"
#include "recipes/yaml.h"

namespace tailor {
namespace {

bool is_section(std::string_view name) {
  const auto& sections = recipe_sections();
  return std::find(sections.begin(), sections.end(), name) != sections.end();
}

/// Puts `value` at the dotted `names` below `node`, making maps on the way.
void set_path(YamlNode& node, std::span<const std::string> names, YamlNode value) {
  if (names.empty()) {
    // A section given as a whole changes the keys it names and leaves the others.
    const bool merge = node.is_map() && value.is_map();
    if (!merge) {
      node = std::move(value);
      return;
    }
    for (std::size_t i = 0; i < value.keys.size(); ++i) {
      const std::string name = value.keys[i].text;
      if (node.find(name) == nullptr) {
        node.keys.push_back(value.keys[i]);
        node.items.push_back(std::move(value.items[i]));
      } else {
        *node.find(name) = std::move(value.items[i]);
      }
    }
    return;
  }
  if (!node.is_map()) {
    const Place place = value.place;
    node = YamlNode();
    node.kind = YamlNode::Kind::map;
    node.place = place;
  }
  YamlNode* child = node.find(names.front());
  if (child == nullptr) {
    YamlNode key;
    key.kind = YamlNode::Kind::scalar;
    key.text = names.front();
    key.place = {value.place.source, 1, 1};
    YamlNode empty;
    empty.place = value.place;
    node.keys.push_back(std::move(key));
    node.items.push_back(std::move(empty));
    child = &node.items.back();
  }
  set_path(*child, names.subspan(1), std::move(value));
}

/// The longest known beginning of `names` that is a key: validation of {split} is a key's own
/// value.
bool is_known(const std::vector<std::string>& names) {
  if (names.size() == 1) return is_section(names[0]) || find_recipe_key(names[0]) != nullptr;
  return find_recipe_key(names[0] + "." + names[1]) != nullptr;
}

void apply_override(YamlNode& root, const std::string& text, Problems& problems) {
  auto source = std::make_shared<TextSource>(TextSource{text, text, true});
  const std::size_t equals = text.find('=');
  const Place start{source, 1, 1};
  if (equals == std::string::npos) {
    problems.add("an override without '='", start, "",
                 "Write key=value, such as training.max_steps=20.");
    return;
  }
  const std::string key(trim(std::string_view(text).substr(0, equals)));
  const std::vector<std::string> names = split(key, '.');
  if (std::any_of(names.begin(), names.end(),
                  [](const std::string& name) { return name.empty(); })) {
    problems.add("an override without a key's name", start, "",
                 "Write key=value, such as training.max_steps=20.");
    return;
  }
  if (!is_known(names)) {
    problems.add("unknown key '" + key + "'", start, key, unknown_key_hint(key));
    return;
  }
  if (trim(std::string_view(text).substr(equals + 1)).empty()) {
    problems.add(key + " has no value after '='", {source, 1, static_cast<int>(equals) + 2}, key,
                 "Write a value, or null where it may be null.");
    return;
  }
  std::optional<YamlNode> value = parse_yaml(source, problems, equals + 1);
  if (!value) return;
  set_path(root, names, std::move(*value));
}

/// Walks the tree, handing every known value to its key.
class Reader {
 public:
  Reader(RecipeFile& file, Problems& problems) : file_(file), problems_(problems) {}

  void read(const YamlNode& root) {
    if (!root.is_map()) {
      problems_.add("a recipe is a map of keys, found " + root.shown(), root.place, "",
                    "Start with `base_model: ...`; `tailor recipe ls` lists recipes to copy.");
      return;
    }
    for (std::size_t i = 0; i < root.keys.size(); ++i) {
      const std::string& name = root.keys[i].text;
      if (is_section(name)) {
        read_section(name, root.keys[i], root.items[i]);
      } else {
        read_key(name, root.keys[i], root.items[i]);
      }
    }
  }

  const YamlNode* given(const std::string& path) const {
    const auto found = given_.find(path);
    return found == given_.end() ? nullptr : found->second;
  }

 private:
  void read_section(const std::string& name, const YamlNode& key, const YamlNode& section) {
    if (section.is_null()) return;
    if (!section.is_map()) {
      problems_.add(
          name + " is " + section.shown() + ", a section of keys is needed", section.place, name,
          name == "base" ? "The model is named by base_model; base: holds format, store, ..."
                         : "Write its keys below `" + key.text + ":`, indented.");
      return;
    }
    for (std::size_t i = 0; i < section.keys.size(); ++i) {
      read_key(name + "." + section.keys[i].text, section.keys[i], section.items[i]);
    }
  }

  void read_key(const std::string& path, const YamlNode& key, const YamlNode& value) {
    const RecipeKey* known = find_recipe_key(path);
    if (known == nullptr) {
      problems_.add("unknown key '" + key.text + "'", key.place, path, unknown_key_hint(path));
      return;
    }
    given_[path] = &value;
    if (known->required && value.is_null()) return;  // reported as missing, with its place
    known->read(file_.recipe, value, problems_);
    const bool is_override = value.place.source && value.place.source->is_override;
    file_.origins[path] = {is_override ? Origin::Kind::override_value : Origin::Kind::file,
                           place_text(value.place)};
  }

  RecipeFile& file_;
  Problems& problems_;
  std::map<std::string, const YamlNode*> given_;
};

void check_required(const Reader& reader, const Place& file, Problems& problems) {
  const std::map<std::string, std::string> how = {
      {"base_model", "Write `base_model: FOLDER`, or a Hugging Face repository name."},
      {"output_dir", "Write `output_dir: runs/NAME`, the folder the run writes to."},
      {"data.train", "Write `train: [FILE.jsonl]` in the section `data:`."},
  };
  for (const RecipeKey& key : recipe_keys()) {
    if (!key.required) continue;
    const YamlNode* value = reader.given(key.path);
    if (value != nullptr && !value->is_null()) continue;
    problems.add(key.path + (value != nullptr ? " has no value, and it is required"
                                              : " is missing, and it is required"),
                 value != nullptr ? value->place : file, key.path, how.at(key.path));
  }
}

/// What only several keys together show.
void check_together(const Reader& reader, const Recipe& recipe, const Place& file,
                    Problems& problems) {
  const YamlNode* ratio = reader.given("training.warmup_ratio");
  const YamlNode* steps = reader.given("training.warmup_steps");
  if (ratio != nullptr && steps != nullptr && !ratio->is_null() && !steps->is_null()) {
    problems.add("warmup_ratio and warmup_steps are both given", steps->place,
                 "training.warmup_steps", "Keep one; set the other to null or leave it out.");
  }
  const auto place_of = [&](const std::string& key) {
    const YamlNode* node = reader.given(key);
    return node != nullptr ? node->place : file;
  };
  const double tokens = static_cast<double>(recipe.training.micro_batch_size) *
                        static_cast<double>(recipe.training.gradient_accumulation_steps) *
                        static_cast<double>(recipe.machine.ranks) *
                        static_cast<double>(recipe.data.sequence_len);
  const double rows_given = static_cast<double>(recipe.training.global_batch_rows.value_or(0)) *
                            static_cast<double>(recipe.data.sequence_len);
  if (std::max(tokens, rows_given) > 1e12) {
    problems.add(
        "a step has " + number_text(std::max(tokens, rows_given), 3) +
            " tokens, at most 1e12 can be counted",
        place_of(rows_given > tokens ? "training.global_batch_rows" : "training.micro_batch_size"),
        rows_given > tokens ? "training.global_batch_rows" : "training.micro_batch_size",
        "Lower micro_batch_size, gradient_accumulation_steps or sequence_len.");
  }
  const LoraTargets& targets = recipe.lora.targets;
  const bool names_experts =
      targets.experts ||
      std::any_of(targets.modules.begin(), targets.modules.end(), [](const std::string& module) {
        return module.find("experts") != std::string::npos;
      });
  if (recipe.lora.expert_state == StateHome::disk && !names_experts) {
    problems.add("lora.expert_state is disk, but no routed expert is trained",
                 place_of("lora.expert_state"), "lora.expert_state",
                 "Add experts to lora.targets, or leave lora.expert_state at auto.");
  }
  if (recipe.base.group_size && *recipe.base.group_size % 8 != 0) {
    problems.add("base.group_size is " + std::to_string(*recipe.base.group_size) +
                     ", a multiple of 8 is needed",
                 place_of("base.group_size"), "base.group_size", "Write 128, 64 or 32.");
  }
}

RecipeFile read_source_text(const std::shared_ptr<const TextSource>& source,
                            std::span<const std::string> overrides) {
  RecipeFile file;
  file.name = source->name;
  file.recipe.name = fs::path(source->name).stem().string();
  Problems problems;
  std::optional<YamlNode> root = parse_yaml(source, problems);
  const Place whole{source, 0, 0};
  if (root) {
    if (root->is_null()) {
      root->kind = YamlNode::Kind::map;
      root->place = whole;
    }
    if (root->is_map()) {
      for (const std::string& text : overrides) apply_override(*root, text, problems);
    }
    Reader reader(file, problems);
    reader.read(*root);
    if (root->is_map()) {
      check_required(reader, whole, problems);
      check_together(reader, file.recipe, whole, problems);
    }
  }
  problems.throw_if_any(
      Fault::usage, "recipe " + source->name,
      "Mend them all; `tailor recipe validate " + source->name + "` checks without running.");
  for (const RecipeKey& key : recipe_keys()) {
    if (file.origins.contains(key.path)) {
      file.given.push_back(key.path);
    } else {
      file.origins[key.path] = {};
    }
  }
  return file;
}

}  // namespace

RecipeFile read_recipe(const fs::path& path, std::span<const std::string> overrides) {
  return read_source_text(read_source(path.string(), "recipe"), overrides);
}

RecipeFile read_recipe_text(std::string_view text, const std::string& name,
                            std::span<const std::string> overrides) {
  return read_source_text(std::make_shared<TextSource>(TextSource{name, std::string(text), false}),
                          overrides);
}

std::vector<std::string> resolve(RecipeFile& file, const ModelTraits& model) {
  const bool rank_open = !file.recipe.lora.expert_rank;
  const bool alpha_open = !file.recipe.lora.expert_alpha;
  std::vector<std::string> not_applied = resolve(file.recipe, model);
  const Origin by_model{Origin::Kind::model, "by the model's experts per token"};
  if (rank_open) file.origins["lora.expert_rank"] = by_model;
  if (alpha_open) file.origins["lora.expert_alpha"] = by_model;
  return not_applied;
}

}  // namespace tailor
