#include "recipes/schema.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "recipes/choices.h"
#include "recipes/fields.h"

namespace tailor {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr NumberRange kAboveZero{0, kInfinity, true, false};
constexpr NumberRange kZeroOrMore{0, kInfinity, false, false};
constexpr NumberRange kZeroToBelowOne{0, 1, false, true};
constexpr NumberRange kInsideZeroOne{0, 1, true, true};
constexpr NumberRange kAboveZeroToOne{0, 1, true, false};
constexpr NumberRange kZeroToOne{0, 1, false, false};

template <class T>
using Field = T& (*)(Recipe&);

/// The same field of a const recipe, for writing: the accessors only form a reference.
template <class T>
const T& get(Field<T> field, const Recipe& recipe) {
  return field(const_cast<Recipe&>(recipe));
}

// ------------------------------------------------------------------------- kinds of keys
// `none` is the word for nullopt: null or auto.

template <class I>
RecipeKey integer_key(std::string path, Field<I> field, std::int64_t low, std::int64_t high,
                      std::string meaning) {
  RecipeKey key{path, "whole number >= " + std::to_string(low), "", std::move(meaning), false, {},
                {}};
  key.read = [=](Recipe& recipe, const YamlNode& node, Problems& problems) {
    if (const auto value = read_integer(node, path, low, high, problems)) {
      field(recipe) = static_cast<I>(*value);
    }
  };
  key.write = [=](const Recipe& recipe) { return std::to_string(get(field, recipe)); };
  return key;
}

bool is_none(const YamlNode& node, const std::string& none) {
  return none == "null" ? node.is_null() : is_word(node, none);
}

template <class I>
RecipeKey integer_or_key(std::string path, Field<std::optional<I>> field, std::string none,
                         std::int64_t low, std::int64_t high, std::string meaning) {
  RecipeKey key{
      path, none + " or whole number >= " + std::to_string(low), "", std::move(meaning), false, {},
      {}};
  key.read = [=](Recipe& recipe, const YamlNode& node, Problems& problems) {
    if (is_none(node, none)) {
      field(recipe).reset();
    } else if (const auto value = read_integer(node, path, low, high, problems)) {
      field(recipe) = static_cast<I>(*value);
    }
  };
  key.write = [=](const Recipe& recipe) {
    const auto& value = get(field, recipe);
    return value ? std::to_string(*value) : none;
  };
  return key;
}

RecipeKey number_key(std::string path, Field<double> field, NumberRange range,
                     std::string meaning) {
  RecipeKey key{path, "number, " + range.text(), "", std::move(meaning), false, {}, {}};
  key.read = [=](Recipe& recipe, const YamlNode& node, Problems& problems) {
    if (const auto value = read_number(node, path, range, problems)) field(recipe) = *value;
  };
  key.write = [=](const Recipe& recipe) { return exact_text(get(field, recipe)); };
  return key;
}

RecipeKey number_or_null_key(std::string path, Field<std::optional<double>> field,
                             NumberRange range, std::string meaning) {
  RecipeKey key{path, "null or number, " + range.text(), "", std::move(meaning), false, {}, {}};
  key.read = [=](Recipe& recipe, const YamlNode& node, Problems& problems) {
    if (node.is_null()) {
      field(recipe).reset();
    } else if (const auto value = read_number(node, path, range, problems)) {
      field(recipe) = *value;
    }
  };
  key.write = [=](const Recipe& recipe) {
    const auto& value = get(field, recipe);
    return value ? exact_text(*value) : std::string("null");
  };
  return key;
}

RecipeKey boolean_key(std::string path, Field<bool> field, std::string meaning) {
  RecipeKey key{path, "true or false", "", std::move(meaning), false, {}, {}};
  key.read = [=](Recipe& recipe, const YamlNode& node, Problems& problems) {
    if (const auto value = read_boolean(node, path, problems)) field(recipe) = *value;
  };
  key.write = [=](const Recipe& recipe) { return get(field, recipe) ? "true" : "false"; };
  return key;
}

template <class E>
std::vector<std::string> words_of() {
  std::vector<std::string> words;
  for (const auto& [word, value] : Choices<E>::kWords) words.emplace_back(word);
  return words;
}

template <class E>
RecipeKey choice_key(std::string path, Field<E> field, std::string meaning) {
  RecipeKey key{path, join(words_of<E>(), ", "), "", std::move(meaning), false, {}, {}};
  key.read = [=](Recipe& recipe, const YamlNode& node, Problems& problems) {
    if (const auto index = read_word(node, path, words_of<E>(), problems)) {
      field(recipe) = Choices<E>::kWords.at(*index).second;
    }
  };
  key.write = [=](const Recipe& recipe) { return std::string(choice_word(get(field, recipe))); };
  return key;
}

RecipeKey string_key(std::string path, Field<std::string> field, bool required, std::string type,
                     std::string meaning) {
  RecipeKey key{path, std::move(type), "", std::move(meaning), required, {}, {}};
  key.read = [=](Recipe& recipe, const YamlNode& node, Problems& problems) {
    if (auto value = read_string(node, path, problems)) field(recipe) = *std::move(value);
  };
  key.write = [=](const Recipe& recipe) { return yaml_text(get(field, recipe)); };
  return key;
}

RecipeKey string_or_key(std::string path, Field<std::optional<std::string>> field, std::string none,
                        std::string type, std::string meaning) {
  RecipeKey key{path, none + " or " + type, "", std::move(meaning), false, {}, {}};
  key.read = [=](Recipe& recipe, const YamlNode& node, Problems& problems) {
    if (is_none(node, none)) {
      field(recipe).reset();
    } else if (auto value = read_string(node, path, problems)) {
      field(recipe) = *std::move(value);
    }
  };
  key.write = [=](const Recipe& recipe) {
    const auto& value = get(field, recipe);
    if (!value) return none;
    return *value == none ? "\"" + *value + "\"" : yaml_text(*value);
  };
  return key;
}

RecipeKey bytes_or_auto_key(std::string path, Field<std::optional<std::int64_t>> field,
                            std::string meaning) {
  RecipeKey key{path, "auto or size such as 24GiB", "", std::move(meaning), false, {}, {}};
  key.read = [=](Recipe& recipe, const YamlNode& node, Problems& problems) {
    if (is_word(node, "auto")) {
      field(recipe).reset();
    } else if (const auto value = read_bytes(node, path, problems)) {
      field(recipe) = *value;
    }
  };
  key.write = [=](const Recipe& recipe) {
    const auto& value = get(field, recipe);
    return value ? std::to_string(*value) : std::string("auto");
  };
  return key;
}

// ------------------------------------------------------------------------- keys of their own shape

struct Group {
  std::string_view word;
  bool LoraTargets::*flag;
};
constexpr std::array<Group, 5> kGroups = {{{"attention", &LoraTargets::attention},
                                           {"dense_mlp", &LoraTargets::dense_mlp},
                                           {"shared_expert", &LoraTargets::shared_expert},
                                           {"experts", &LoraTargets::experts},
                                           {"router", &LoraTargets::router}}};
/// Module names of the supported models; others are taken as they are and must match a tensor
/// later.
constexpr std::array kModules = {"q_proj",    "k_proj",   "v_proj",       "o_proj",
                                 "gate_proj", "up_proj",  "down_proj",    "gate_up_proj",
                                 "q_a_proj",  "q_b_proj", "kv_b_proj",    "kv_a_proj_with_mqa",
                                 "gate",      "lm_head",  "embed_tokens", "qkv_proj"};

void read_targets(Recipe& recipe, const YamlNode& node, Problems& problems) {
  const std::string key = "lora.targets";
  const auto items = read_list(node, key, true, problems);
  if (!items) return;
  LoraTargets targets{false, false, false, false, false, {}};
  std::vector<std::string> groups{"all"}, seen;
  for (const Group& group : kGroups) groups.emplace_back(group.word);
  for (const YamlNode* item : *items) {
    const auto word = read_string(*item, key, problems);
    if (!word) continue;
    if (std::find(seen.begin(), seen.end(), *word) != seen.end()) {
      problems.add("lora.targets names " + *word + " twice", item->place, key,
                   "Keep one of the two.");
      continue;
    }
    seen.push_back(*word);
    bool known = *word == "all";
    for (const Group& group : kGroups) {
      if (*word != "all" && *word != group.word) continue;
      targets.*group.flag = true;
      known = true;
    }
    if (known) continue;
    const bool is_module = std::find(kModules.begin(), kModules.end(), *word) != kModules.end();
    std::string near = *word == "all-linear" || *word == "all_linear" ? "all"
                       : *word == "mlp"                               ? "dense_mlp"
                       : *word == "shared_experts"                    ? "shared_expert"
                                                                      : nearest_name(*word, groups);
    const bool odd = word->find_first_of(" \t/*") != std::string::npos;
    if (!is_module && (!near.empty() || odd)) {
      problems.add("unknown target '" + *word + "'", item->place, key,
                   near.empty() ? "Known groups: " + join(groups, ", ") +
                                      "; or a module name as PEFT writes it, such as q_proj."
                                : "Did you mean " + near + "?");
      continue;
    }
    targets.modules.push_back(*word);
  }
  recipe.lora.targets = targets;
}

std::string write_targets(const Recipe& recipe) {
  std::vector<std::string> words;
  for (const Group& group : kGroups) {
    if (recipe.lora.targets.*group.flag) words.emplace_back(group.word);
  }
  for (const std::string& module : recipe.lora.targets.modules) words.push_back(yaml_text(module));
  return "[" + join(words, ", ") + "]";
}

std::optional<DataSource> read_source_entry(const YamlNode& node, const std::string& key,
                                            Problems& problems) {
  DataSource source;
  if (!node.is_map()) {
    auto path = read_string(node, key, problems);
    if (!path) return std::nullopt;
    source.path = *std::move(path);
    return source;
  }
  const std::size_t before = problems.count();
  refuse_unknown_keys(node, key, {"path", "weight", "format"}, problems);
  const YamlNode* path = node.find("path");
  if (path == nullptr) {
    problems.add(key + " has an entry without path", node.place, key,
                 "Write {path: FILE, weight: 1.0, format: auto}.");
  } else if (auto text = read_string(*path, key + ".path", problems)) {
    source.path = *std::move(text);
  }
  if (const YamlNode* weight = node.find("weight")) {
    source.weight = read_number(*weight, key + ".weight", kAboveZero, problems).value_or(1);
  }
  if (const YamlNode* format = node.find("format")) {
    const auto index = read_word(*format, key + ".format", words_of<RecordFormat>(), problems);
    if (index) source.format = Choices<RecordFormat>::kWords.at(*index).second;
  }
  if (problems.count() != before) return std::nullopt;
  return source;
}

std::vector<DataSource> read_sources(const YamlNode& node, const std::string& key,
                                     Problems& problems) {
  std::vector<DataSource> sources;
  const auto items = read_list(node, key, true, problems);
  if (!items) return sources;
  for (const YamlNode* item : *items) {
    if (auto source = read_source_entry(*item, key, problems))
      sources.push_back(*std::move(source));
  }
  return sources;
}

std::string write_sources(const std::vector<DataSource>& sources) {
  std::vector<std::string> entries;
  for (const DataSource& source : sources) {
    std::string entry = yaml_text(source.path);
    if (source.weight != 1 || source.format) {
      entry = "{path: " + entry + ", weight: " + exact_text(source.weight);
      if (source.format) entry += ", format: " + std::string(choice_word(*source.format));
      entry += "}";
    }
    entries.push_back(std::move(entry));
  }
  return "[" + join(entries, ", ") + "]";
}

void read_validation(Recipe& recipe, const YamlNode& node, Problems& problems) {
  const std::string key = "data.validation";
  recipe.data.validation.clear();
  recipe.data.validation_split.reset();
  if (node.is_null()) return;
  const YamlNode* split = node.is_map() ? node.find("split") : nullptr;
  if (split != nullptr) {
    refuse_unknown_keys(node, key, {"split"}, problems);
    recipe.data.validation_split = read_number(*split, key + ".split", kInsideZeroOne, problems);
  } else if (node.kind == YamlNode::Kind::scalar && parse_number(node.text)) {
    problems.add(key + " is " + node.shown() + ", files or {split: ...} are needed", node.place,
                 key, "Write {split: " + node.text + "} to take that share of data.train.");
  } else {
    recipe.data.validation = read_sources(node, key, problems);
  }
}

std::string write_validation(const Recipe& recipe) {
  if (recipe.data.validation_split)
    return "{split: " + exact_text(*recipe.data.validation_split) + "}";
  return recipe.data.validation.empty() ? "null" : write_sources(recipe.data.validation);
}

void read_template(Recipe& recipe, const YamlNode& node, Problems& problems) {
  const auto text = read_string(node, "data.chat_template", problems);
  if (!text) return;
  using Kind = ChatTemplateChoice::Kind;
  if (*text == "model") {
    recipe.data.chat_template = {};
  } else {
    recipe.data.chat_template = {text->ends_with(".jinja") ? Kind::file : Kind::named, *text};
  }
}

std::string write_template(const Recipe& recipe) {
  const ChatTemplateChoice& choice = recipe.data.chat_template;
  return choice.kind == ChatTemplateChoice::Kind::model ? "model" : yaml_text(choice.value);
}

const std::vector<std::string> kTrainOnWords = {"assistant", "last_assistant", "all"};

void read_train_on(Recipe& recipe, const YamlNode& node, Problems& problems) {
  const std::string key = "data.train_on";
  using Kind = TrainOn::Kind;
  TrainOn train_on;
  if (node.kind != YamlNode::Kind::sequence) {
    const auto index = read_word(node, key, kTrainOnWords, problems);
    if (!index) return;
    train_on.kind = *index == 0 ? Kind::assistant : *index == 1 ? Kind::last_assistant : Kind::all;
  } else {
    train_on.kind = Kind::roles;
    const auto items = read_list(node, key, false, problems);
    if (!items) return;
    for (const YamlNode* item : *items) {
      if (auto role = read_string(*item, key, problems)) train_on.roles.push_back(*std::move(role));
    }
  }
  recipe.data.train_on = train_on;
}

std::string write_train_on(const Recipe& recipe) {
  const TrainOn& train_on = recipe.data.train_on;
  if (train_on.kind != TrainOn::Kind::roles) {
    return kTrainOnWords[static_cast<std::size_t>(train_on.kind)];
  }
  std::vector<std::string> roles;
  for (const std::string& role : train_on.roles) roles.push_back(yaml_text(role));
  return "[" + join(roles, ", ") + "]";
}

void read_price(Recipe& recipe, const YamlNode& node, Problems& problems) {
  const std::string key = "cost.price";
  using Kind = PriceChoice::Kind;
  if (is_word(node, "auto")) {
    recipe.cost.price = {};
    return;
  }
  if (node.is_map()) {
    refuse_unknown_keys(node, key, {"usd_per_gpu_hour"}, problems);
    const YamlNode* usd = node.find("usd_per_gpu_hour");
    if (usd == nullptr) {
      problems.add(key + " has no usd_per_gpu_hour", node.place, key,
                   "Write {usd_per_gpu_hour: 1.19}.");
    } else if (const auto micros = read_usd(*usd, key + ".usd_per_gpu_hour", true, problems)) {
      recipe.cost.price = {Kind::usd, "", *micros};
    }
    return;
  }
  if (node.kind == YamlNode::Kind::scalar && parse_micros(node.text)) {
    problems.add(key + " is the bare number " + node.text + ", which says not of what", node.place,
                 key, "Write {usd_per_gpu_hour: " + node.text + "}.");
  } else if (auto id = read_string(node, key, problems)) {
    recipe.cost.price = {Kind::id, *std::move(id), 0};
  }
}

std::string write_price(const Recipe& recipe) {
  const PriceChoice& price = recipe.cost.price;
  switch (price.kind) {
    case PriceChoice::Kind::automatic:
      return "auto";
    case PriceChoice::Kind::id:
      return price.id == "auto" ? "\"auto\"" : yaml_text(price.id);
    case PriceChoice::Kind::usd:
      break;
  }
  return "{usd_per_gpu_hour: " + micros_text(price.usd_micros_per_gpu_hour) + "}";
}

void read_budget_usd(Recipe& recipe, const YamlNode& node, Problems& problems) {
  if (node.is_null()) {
    recipe.budget.usd_micros.reset();
  } else if (const auto micros = read_usd(node, "budget.usd", false, problems)) {
    recipe.budget.usd_micros = *micros;
  }
}

std::string write_budget_usd(const Recipe& recipe) {
  const auto& micros = recipe.budget.usd_micros;
  return micros ? micros_text(*micros) : "null";
}

/// Takes the place of warmup_ratio's default where it is set.
void read_warmup_steps(Recipe& recipe, const YamlNode& node, Problems& problems) {
  if (node.is_null()) {
    recipe.training.warmup_steps.reset();
  } else if (const auto steps =
                 read_integer(node, "training.warmup_steps", 0, 1'000'000'000, problems)) {
    recipe.training.warmup_steps = *steps;
    recipe.training.warmup_ratio.reset();
  }
}

std::vector<RecipeKey> make_keys() {
  using R = Recipe;
  constexpr std::int64_t kMany = 1'000'000'000;
  constexpr std::int64_t kLong = 1 << 24;
  constexpr std::int64_t kWide = 1 << 16;
  std::vector<RecipeKey> keys = {
      string_key(
          "name", [](R& r) -> std::string& { return r.name; }, false, "text",
          "Name of the run in listings and reports."),
      string_key(
          "base_model", [](R& r) -> std::string& { return r.base_model; }, true, "text",
          "The frozen model: a folder, or a Hugging Face repository name found in the local "
          "cache."),
      string_key(
          "output_dir", [](R& r) -> std::string& { return r.output_dir; }, true, "path",
          "Folder of the run: metrics, checkpoints, the adapter and the report."),
      integer_key<std::int64_t>(
          "seed", [](R& r) -> std::int64_t& { return r.seed; }, 0,
          std::numeric_limits<std::int64_t>::max(),
          "Start of every random number: factors, order of rows, dropout."),

      integer_key<int>(
          "lora.rank", [](R& r) -> int& { return r.lora.rank; }, 1, kWide,
          "Rank of the factors, except of routed experts. Higher: more to learn with, more "
          "memory."),
      number_key(
          "lora.alpha", [](R& r) -> double& { return r.lora.alpha; }, kAboveZero,
          "Scale of the update: alpha / rank, or alpha / sqrt(rank) with rslora."),
      number_key(
          "lora.dropout", [](R& r) -> double& { return r.lora.dropout; }, kZeroToBelowOne,
          "Share of the factors' inputs set to zero while training."),
      boolean_key(
          "lora.rslora", [](R& r) -> bool& { return r.lora.rslora; },
          "Scale by alpha / sqrt(rank), which keeps high ranks learning."),
      {"lora.targets",
       "list of attention, dense_mlp, shared_expert, experts, router, all, module names", "",
       "Where factors are put: groups, or modules by their PEFT name such as q_proj. all is all "
       "five groups.",
       false, read_targets, write_targets},
      integer_or_key<int>(
          "lora.expert_rank", [](R& r) -> std::optional<int>& { return r.lora.expert_rank; },
          "null", 1, kWide,
          "Rank of the routed experts' factors. null: rank / experts per token, at least 1."),
      number_or_null_key(
          "lora.expert_alpha", [](R& r) -> std::optional<double>& { return r.lora.expert_alpha; },
          kAboveZero, "Alpha of the routed experts. null: keeps alpha / rank."),
      string_or_key(
          "lora.experts", [](R& r) -> std::optional<std::string>& { return r.lora.experts; }, "all",
          "file", "Which routed experts get factors: all, or a file of `tailor experts scan`."),
      choice_key<StateHome>(
          "lora.expert_state", [](R& r) -> StateHome& { return r.lora.expert_state; },
          "Where factors, gradients and moments of routed experts live. disk: in scratch files "
          "below "
          "output_dir, paged layer by layer. auto: memory where it fits, else disk."),
      number_key(
          "lora.learning_rate_ratio_b",
          [](R& r) -> double& { return r.lora.learning_rate_ratio_b; }, kAboveZero,
          "LoRA+: learning rate of B over that of A."),
      string_or_key(
          "lora.init_from", [](R& r) -> std::optional<std::string>& { return r.lora.init_from; },
          "null", "folder", "An adapter to go on from, ours or PEFT's."),

      {"data.train", "file, glob, or list of those or of {path, weight, format}", "",
       "Rows to learn from, as JSON lines. weight: share of the source's rows an epoch takes.",
       true,
       [](R& r, const YamlNode& node, Problems& problems) {
         r.data.train = read_sources(node, "data.train", problems);
       },
       [](const R& r) { return write_sources(r.data.train); }},
      {"data.validation", "null, as data.train, or {split: number above 0 and below 1}", "",
       "Rows the loss is measured on. split: taken from train by content hash.", false,
       read_validation, write_validation},
      choice_key<RecordFormat>(
          "data.format", [](R& r) -> RecordFormat& { return r.data.format; },
          "Shape of the rows. auto: by the first row's keys."),
      {"data.chat_template", "model, a name, or a .jinja file", "",
       "How messages become text. model: the model's own template.", false, read_template,
       write_template},
      {"data.train_on", "assistant, last_assistant, all, or list of roles", "",
       "Which messages carry loss.", false, read_train_on, write_train_on},
      integer_key<std::int64_t>(
          "data.sequence_len", [](R& r) -> std::int64_t& { return r.data.sequence_len; }, 2, kLong,
          "Tokens a row. Longer: more context, more memory for activations."),
      boolean_key(
          "data.packing", [](R& r) -> bool& { return r.data.packing; },
          "Several documents a row, which never see each other. false: one a row, padded; slower, "
          "equal loss."),
      choice_key<TooLong>(
          "data.too_long", [](R& r) -> TooLong& { return r.data.too_long; },
          "What happens to documents longer than sequence_len."),
      string_or_key(
          "data.store", [](R& r) -> std::optional<std::string>& { return r.data.store; }, "null",
          "file", "The token store. null: <cache>/tokens/<digest>.h5."),

      integer_key<std::int64_t>(
          "training.micro_batch_size",
          [](R& r) -> std::int64_t& { return r.training.micro_batch_size; }, 1, kWide,
          "Rows that pass a block together, per rank. Higher: faster matrices, more memory."),
      integer_key<std::int64_t>(
          "training.gradient_accumulation_steps",
          [](R& r) -> std::int64_t& { return r.training.gradient_accumulation_steps; }, 1,
          1'000'000,
          "Micro-batches a step, per rank; all share one read of the weights. Higher: "
          "faster when streaming, fewer updates."),
      integer_or_key<std::int64_t>(
          "training.global_batch_rows",
          [](R& r) -> std::optional<std::int64_t>& { return r.training.global_batch_rows; }, "null",
          1, kMany,
          "Rows a step over all ranks. null: micro_batch_size x gradient_accumulation_steps x "
          "ranks, frozen at the "
          "run's first start."),
      integer_key<std::int64_t>(
          "training.num_epochs", [](R& r) -> std::int64_t& { return r.training.num_epochs; }, 1,
          kMany, "Passes over the data."),
      integer_or_key<std::int64_t>(
          "training.max_steps",
          [](R& r) -> std::optional<std::int64_t>& { return r.training.max_steps; }, "null", 1,
          kMany, "Stops after this many steps. null: after num_epochs."),
      boolean_key(
          "training.shuffle", [](R& r) -> bool& { return r.training.shuffle; },
          "Another order of rows each epoch. false: file order, repeated."),
      choice_key<Optimizer>(
          "training.optimizer", [](R& r) -> Optimizer& { return r.training.optimizer; },
          "The update rule."),
      number_key(
          "training.learning_rate", [](R& r) -> double& { return r.training.learning_rate; },
          kAboveZero,
          "Peak step size. Higher learns faster until it diverges; LoRA bears about ten times that "
          "of full "
          "training."),
      number_key(
          "training.adam_beta1", [](R& r) -> double& { return r.training.adam_beta1; },
          kZeroToBelowOne, "Decay of the mean of gradients."),
      number_key(
          "training.adam_beta2", [](R& r) -> double& { return r.training.adam_beta2; },
          kZeroToBelowOne, "Decay of the mean of squared gradients."),
      number_key(
          "training.adam_epsilon", [](R& r) -> double& { return r.training.adam_epsilon; },
          kAboveZero, "Added to the root of the squared mean."),
      number_key(
          "training.weight_decay", [](R& r) -> double& { return r.training.weight_decay; },
          kZeroOrMore, "Decoupled decay, on every factor."),
      choice_key<LrScheduler>(
          "training.lr_scheduler", [](R& r) -> LrScheduler& { return r.training.lr_scheduler; },
          "Course of the learning rate after warm-up; linear and cosine end at 0."),
      number_or_null_key(
          "training.warmup_ratio",
          [](R& r) -> std::optional<double>& { return r.training.warmup_ratio; }, kZeroToOne,
          "Share of the steps in which the learning rate climbs from 0. Or warmup_steps."),
      {"training.warmup_steps", "null or whole number >= 0", "",
       "Steps in which the learning rate climbs, in place of warmup_ratio.", false,
       read_warmup_steps,
       [](const R& r) {
         return r.training.warmup_steps ? std::to_string(*r.training.warmup_steps) : "null";
       }},
      number_or_null_key(
          "training.max_grad_norm",
          [](R& r) -> std::optional<double>& { return r.training.max_grad_norm; }, kAboveZero,
          "Gradients are scaled down to this norm, taken over all factors of all ranks. null: "
          "never."),
      integer_key<std::int64_t>(
          "training.eval_every_steps",
          [](R& r) -> std::int64_t& { return r.training.eval_every_steps; }, 0, kMany,
          "Steps between measurements on data.validation. 0: only at the end."),

      choice_key<DeviceChoice>(
          "compute.device", [](R& r) -> DeviceChoice& { return r.compute.device; },
          "auto: CUDA where a usable card is, else the CPU."),
      choice_key<ComputeType>(
          "compute.dtype", [](R& r) -> ComputeType& { return r.compute.dtype; },
          "Arithmetic of the blocks; factors and moments are float32. bfloat16: half the memory, "
          "faster."),
      integer_or_key<int>(
          "compute.threads", [](R& r) -> std::optional<int>& { return r.compute.threads; }, "auto",
          1, 4096, "CPU threads a rank. auto: all cores it may use."),
      choice_key<KeepActivations>(
          "compute.keep_activations",
          [](R& r) -> KeepActivations& { return r.compute.keep_activations; },
          "none: layers are computed again in the backward pass. all: faster, far more memory."),

      choice_key<BaseFormat>(
          "base.format", [](R& r) -> BaseFormat& { return r.base.format; },
          "Form of the routed experts in the stream. int4, nf4: a quarter of the bytes of bf16, "
          "slightly rounded."),
      choice_key<BaseFormat>(
          "base.non_expert_format", [](R& r) -> BaseFormat& { return r.base.non_expert_format; },
          "The same choice for everything else that is frozen."),
      integer_or_key<int>(
          "base.group_size", [](R& r) -> std::optional<int>& { return r.base.group_size; }, "auto",
          8, kWide,
          "Inputs that share a scale in int4. auto: 128, else the larger of 64 and 32 that divides "
          "the width, else one group a row."),
      string_or_key(
          "base.store", [](R& r) -> std::optional<std::string>& { return r.base.store; }, "null",
          "folder",
          "A store of `tailor model pack`. null: the published weights, in memory; another format, "
          "or weights that do not fit or have a budget, are packed into <cache>/stores/<digest> "
          "first."),
      bytes_or_auto_key(
          "base.device_memory",
          [](R& r) -> std::optional<std::int64_t>& { return r.base.device_memory; },
          "Weights kept on the device; the first 320 MiB of slots come on top. More: less to "
          "stream. With "
          "host_memory 0 too, every tile comes from disk whenever it is used."),
      bytes_or_auto_key(
          "base.host_memory",
          [](R& r) -> std::optional<std::int64_t>& { return r.base.host_memory; },
          "Weights kept in RAM; the rest comes from disk. On the CPU it adds to device_memory."),
      choice_key<ActivationHome>(
          "base.activations", [](R& r) -> ActivationHome& { return r.base.activations; },
          "Where kept layer inputs wait for the backward pass."),

      string_or_key(
          "machine.profile", [](R& r) -> std::optional<std::string>& { return r.machine.profile; },
          "auto", "name",
          "A file of recipes/machines, such as a100-40gb, or a .yaml path. auto: this machine."),
      integer_key<int>(
          "machine.ranks", [](R& r) -> int& { return r.machine.ranks; }, 1, kWide,
          "Processes that train together, one a device."),

      {"cost.price", "auto, a price book id, or {usd_per_gpu_hour: number}", "",
       "What a device hour costs. auto: by the machine profile's SKU.", false, read_price,
       write_price},
      string_or_key(
          "cost.project", [](R& r) -> std::optional<std::string>& { return r.cost.project; },
          "null", "text", "Tag to add costs up by."),
      string_or_key(
          "cost.ledger", [](R& r) -> std::optional<std::string>& { return r.cost.ledger; }, "null",
          "file or postgresql:// address",
          "Where runs and costs are recorded. null: <data dir>/ledger.db."),

      {"budget.usd", "null or amount above 0", "",
       "The run stops at a checkpoint before it costs more dollars.", false, read_budget_usd,
       write_budget_usd},
      number_or_null_key(
          "budget.gpu_hours", [](R& r) -> std::optional<double>& { return r.budget.gpu_hours; },
          kAboveZero, "The run stops at a checkpoint before it holds devices longer."),
      number_key(
          "budget.warn", [](R& r) -> double& { return r.budget.warn; }, kAboveZeroToOne,
          "Share of the budget at which a warning comes."),
      choice_key<BudgetAction>(
          "budget.action", [](R& r) -> BudgetAction& { return r.budget.action; },
          "What happens when the budget is reached, and at the start where the plan exceeds it. "
          "checkpoint_stop: the start is refused, the run is saved and stopped. warn: it goes on."),

      integer_or_key<std::int64_t>(
          "checkpoint.every_steps",
          [](R& r) -> std::optional<std::int64_t>& { return r.checkpoint.every_steps; }, "null", 1,
          kMany, "Steps between checkpoints. null: not by steps."),
      number_or_null_key(
          "checkpoint.every_minutes",
          [](R& r) -> std::optional<double>& { return r.checkpoint.every_minutes; }, kAboveZero,
          "Minutes between checkpoints: what a crash can lose. null: not by time."),
      integer_key<std::int64_t>(
          "checkpoint.keep", [](R& r) -> std::int64_t& { return r.checkpoint.keep; }, 1, kMany,
          "Newest checkpoints that are kept."),

      boolean_key(
          "logging.tensorboard", [](R& r) -> bool& { return r.logging.tensorboard; },
          "Writes events.out.tfevents.* into output_dir."),
      string_or_key(
          "logging.mlflow", [](R& r) -> std::optional<std::string>& { return r.logging.mlflow; },
          "null", "tracking address", "MLflow server to report to."),
      integer_key<std::int64_t>(
          "logging.metrics_every_steps",
          [](R& r) -> std::int64_t& { return r.logging.metrics_every_steps; }, 1, kMany,
          "Steps between lines of metrics.jsonl."),
  };
  const Recipe defaults;
  for (RecipeKey& key : keys) {
    key.default_value = key.required         ? "required"
                        : key.path == "name" ? "the file's name"
                                             : key.write(defaults);
  }
  return keys;
}

}  // namespace

const std::vector<RecipeKey>& recipe_keys() {
  static const std::vector<RecipeKey> keys = make_keys();
  return keys;
}

const RecipeKey* find_recipe_key(std::string_view path) {
  for (const RecipeKey& key : recipe_keys()) {
    if (key.path == path) return &key;
  }
  return nullptr;
}

const std::vector<std::string>& recipe_sections() {
  static const std::vector<std::string> sections = [] {
    std::vector<std::string> found;
    for (const RecipeKey& key : recipe_keys()) {
      const std::size_t dot = key.path.find('.');
      if (dot == std::string::npos) continue;
      std::string section = key.path.substr(0, dot);
      if (found.empty() || found.back() != section) found.push_back(std::move(section));
    }
    return found;
  }();
  return sections;
}

}  // namespace tailor
