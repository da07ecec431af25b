#include "tools/recipe_inputs.h"

#include <algorithm>

#include "base/error.h"
#include "base/text.h"
#include "data/checkpoint/checkpoint.h"
#include "data/store/fingerprint.h"
#include "recipes/choices.h"
#include "recipes/shipped.h"
#include "tools/data_memo.h"
#include "tools/paths.h"
#include "tools/terminal.h"

namespace tailor {
namespace {

/// read_model_facts, which knows nothing of the models that ./tools/demo makes.
ModelFacts find_facts(const std::string& base_model) {
  try {
    return read_model_facts(base_model, recipes_folder() / "models");
  } catch (const Error& error) {
    if (error.fault() != Fault::usage || !base_model.starts_with("models/smollm2-")) throw;
    Error::Parts parts = error.parts();
    const bool dense = base_model == "models/smollm2-135m";
    parts.mend =
        "Make it first, out of a download of 93 MB: ./tools/demo, or after tools/setup "
        "tools/demo_model/make_demo_model.py " +
        base_model + (dense ? " --arch dense" : "");
    throw Error(error.fault(), std::move(parts));
  }
}

void check_targets(const RecipeFile& file, const ModelFacts& model) {
  const bool given = std::any_of(file.given.begin(), file.given.end(), [](const std::string& key) {
    return key.starts_with("lora.targets");
  });
  if (!given) return;  // the default targets are those of any model
  const LoraTargets& targets = file.recipe.lora.targets;
  std::vector<std::string> groups = {"attention"};
  if (model.dense_layers > 0) groups.emplace_back("dense_mlp");
  if (model.shared_experts > 0) groups.emplace_back("shared_expert");
  if (model.experts > 0) groups.insert(groups.end(), {"experts", "router"});
  const auto need = [&](bool wanted, const std::string& group) {
    if (!wanted || std::find(groups.begin(), groups.end(), group) != groups.end()) return;
    const auto origin = file.origins.find("lora.targets");
    throw Error(
        Fault::usage,
        {"LoRA target '" + group + "' matches no matrix of " + model.name,
         "lora.targets" + (origin == file.origins.end() ? "" : " (" + origin->second.text + ")"),
         "This model has: " + join(groups, ", ") + ". `tailor model inspect` lists its matrices."});
  };
  // `all` is every group there is; it sets the five flags.
  const bool all = targets.attention && targets.dense_mlp && targets.shared_expert &&
                   targets.experts && targets.router;
  if (all) return;
  need(targets.dense_mlp, "dense_mlp");
  need(targets.shared_expert, "shared_expert");
  need(targets.experts, "experts");
  need(targets.router, "router");
}

/// A store made from other weights than the recipe's model, where those are here to compare.
void check_same_model(const Recipe& recipe, const Store& store) {
  if (!recipe.base.store) return;
  fs::path folder;
  try {
    folder = find_model_folder(recipe.base_model);
  } catch (const Error&) {  // only the store is here
    return;
  }
  if (Store::is_store(folder)) {
    std::error_code error;
    if (fs::equivalent(folder, store.folder(), error)) return;
    throw Error(Fault::usage, {"base_model and base.store are two stores", store.folder().string(),
                               "Name one of them."});
  }
  if (fingerprint(Checkpoint::open(folder), store.spec()) == store.fingerprint()) return;
  throw Error(
      Fault::bad_file,
      {"the store was made from another model than base_model", store.folder().string(),
       "It was packed from " + store.source() +
           ". Name that as base_model, or pack this one: tailor model pack " + recipe.base_model});
}

bool all_tokenized(const DataRecipe& data) {
  const auto tokenized = [&](const DataSource& source) {
    return source.format.value_or(data.format) == RecordFormat::tokenized;
  };
  return std::all_of(data.train.begin(), data.train.end(), tokenized) &&
         std::all_of(data.validation.begin(), data.validation.end(), tokenized);
}

std::vector<DataFile> data_files(const std::vector<DataSource>& sources) {
  std::vector<DataFile> out;
  out.reserve(sources.size());
  for (const DataSource& source : sources) {
    out.push_back({source.path, source.weight, source.format});
  }
  return out;
}

/// Ids of a store against the model's vocabulary; tokenised rows may come from another model.
void check_ids(const fs::path& path, std::int64_t vocab) {
  const TokenStore store = TokenStore::open(path);
  const auto ids = store.ids();
  const auto highest = std::max_element(ids.begin(), ids.end());
  if (highest == ids.end() || *highest < vocab) return;
  const auto place = highest - ids.begin();
  const auto starts = store.document_start();
  const auto after = std::upper_bound(starts.begin(), starts.end(), place);
  const auto document = static_cast<std::size_t>(after - starts.begin() - 1);
  const Json files = store.manifest().value("files", Json::array());
  const auto file = static_cast<std::size_t>(store.document_file()[document]);
  const std::string name =
      file < files.size() ? files[file].value("path", std::string("data")) : std::string("data");
  throw Error(Fault::bad_file,
              {"token id " + std::to_string(*highest) + " is outside the model's vocabulary of " +
                   count_text(vocab),
               name + ":" + std::to_string(store.document_line()[document]),
               "Tokenise the data with this model's own tokenizer, or train the model it was made "
               "for."});
}

}  // namespace

RecipeFile open_recipe(const std::string& asked, std::span<const std::string> overrides) {
  return read_recipe(find_recipe(asked, recipes_folder()), overrides);
}

fs::path recipe_store(const Recipe& recipe) {
  if (recipe.base.store) return *recipe.base.store;
  std::error_code error;
  const bool folder = fs::is_directory(recipe.base_model, error);
  return folder && Store::is_store(recipe.base_model) ? fs::path(recipe.base_model) : fs::path();
}

void apply_store(RecipeFile& file) {
  Recipe& recipe = file.recipe;
  const fs::path folder = recipe_store(recipe);
  if (folder.empty()) return;
  const Store store = Store::open(folder);
  check_same_model(recipe, store);
  const auto settle = [&](BaseFormat& format, const WeightFormat& stored, const std::string& key) {
    const bool plain = stored.kind == WeightKind::f32;
    const BaseFormat found = stored.kind == WeightKind::int4  ? BaseFormat::int4
                             : stored.kind == WeightKind::nf4 ? BaseFormat::nf4
                             : stored.kind == WeightKind::fp8 ? BaseFormat::fp8
                             : plain                          ? BaseFormat::as_is
                                                              : BaseFormat::bf16;
    if (format != BaseFormat::as_is && format != found) {
      throw Error(Fault::usage,
                  {key + " is " + std::string(choice_word(format)) + ", the store holds " +
                       format_text(stored),
                   folder.string(), "Leave " + key + " out, or name a store of that format."});
    }
    format = found;
    file.origins[key] = {Origin::Kind::model, "by the store"};
  };
  recipe.base.store = folder.string();  // also where base_model is the store itself
  const WeightFormat experts = store.expert_format(), others = store.other_format();
  if (store.spec().experts > 0) settle(recipe.base.format, experts, "base.format");
  settle(recipe.base.non_expert_format, others, "base.non_expert_format");
  const WeightFormat& int4 = experts.kind == WeightKind::int4 ? experts : others;
  if (int4.kind == WeightKind::int4) {
    if (recipe.base.group_size && *recipe.base.group_size != int4.group) {
      throw Error(Fault::usage, {"base.group_size is " + std::to_string(*recipe.base.group_size) +
                                     ", the store holds " + format_text(int4),
                                 folder.string(), "Leave base.group_size out."});
    }
    recipe.base.group_size = static_cast<int>(int4.group);
    file.origins["base.group_size"] = {Origin::Kind::model, "by the store"};
  }
}

RoutedModel read_routed_model(const fs::path& folder) {
  if (Store::is_store(folder)) {
    const Store store = Store::open(folder);
    RoutedModel out = routed_model(store.spec());
    out.fingerprint = store.fingerprint();
    return out;
  }
  const ModelSpec spec = read_model_spec(folder);
  RoutedModel out = routed_model(spec);
  out.fingerprint = fingerprint(Checkpoint::open(folder), spec);
  return out;
}

std::optional<ExpertSelection> apply_selection(Recipe& recipe, const RoutedModel& model,
                                               std::vector<std::string>& notes) {
  recipe.lora.chosen_experts.reset();
  if (!recipe.lora.experts || model.experts == 0) return std::nullopt;
  const std::string& path = *recipe.lora.experts;
  ExpertSelection selection = read_selection(path);
  check_selection(selection, model, path);
  recipe.lora.chosen_experts = {selection.expert_count(), selection.tokens_covered()};
  const int rank = recipe.lora.expert_rank.value_or(0);
  if (selection.expert_rank != rank) {
    notes.push_back("lora.expert_rank is " + std::to_string(rank) + ", " + path +
                    " was reckoned with " + std::to_string(selection.expert_rank) +
                    ": its factors are not of the size given there");
  }
  return selection;
}

StoreFormats store_formats(const BaseRecipe& base) {
  const auto choice = [&](BaseFormat format) -> FormatChoice {
    switch (format) {
      case BaseFormat::as_is:
        return {};
      case BaseFormat::int4:
        return {false, WeightKind::int4, base.group_size.value_or(0)};
      case BaseFormat::nf4:
        return {false, WeightKind::nf4, 0};
      case BaseFormat::fp8:
        return {false, WeightKind::fp8, 0};
      case BaseFormat::bf16:
        return {false, WeightKind::bf16, 0};
    }
    return {};
  };
  return {choice(base.format), choice(base.non_expert_format)};
}

ResolvedRecipe resolve_recipe(RecipeFile file) {
  apply_store(file);
  ModelFacts facts = find_facts(file.recipe.base_model);
  check_targets(file, facts);
  std::vector<std::string> notes = resolve(file, facts.traits());
  apply_selection(file.recipe, facts.routed, notes);
  return {std::move(file), std::move(facts), std::move(notes)};
}

ResolvedRecipe resolve_recipe(const std::string& asked, std::span<const std::string> overrides) {
  return resolve_recipe(open_recipe(asked, overrides));
}

DataOptions data_options(const Recipe& recipe) {
  const DataRecipe& data = recipe.data;
  DataOptions out;
  out.train = data_files(data.train);
  out.validation = data_files(data.validation);
  out.validation_split = data.validation_split.value_or(0);
  out.format = data.format;
  out.chat_template = data.chat_template.kind == ChatTemplateChoice::Kind::model
                          ? "model"
                          : data.chat_template.value;
  out.train_on = data.train_on;
  out.sequence_len = data.sequence_len;
  out.packing = data.packing;
  out.too_long = data.too_long;
  if (data.store) out.store = *data.store;
  out.cache = cache_folder();
  return out;
}

Tokenizer load_tokenizer(const fs::path& model_folder, std::int64_t vocab) {
  Tokenizer tokenizer = Tokenizer::load(model_folder);
  if (tokenizer.vocab_size() > vocab) {
    throw Error(Fault::bad_file, {"the tokenizer has " + count_text(tokenizer.vocab_size()) +
                                      " tokens, the model's vocabulary " + count_text(vocab),
                                  (model_folder / "tokenizer.json").string(),
                                  "Use the tokenizer.json that was published with these weights."});
  }
  return tokenizer;
}

std::optional<Tokenizer> model_tokenizer(const fs::path& model_folder, std::int64_t vocab) {
  std::error_code error;
  if (!fs::exists(model_folder / "tokenizer.json", error)) return std::nullopt;
  return load_tokenizer(model_folder, vocab);
}

PrepareReport prepare_data(const DataOptions& options, const std::optional<Tokenizer>& tokenizer,
                           std::optional<std::int64_t> vocab) {
  PrepareReport report;
  {
    ProgressLine line;
    report = prepare(options, tokenizer ? &*tokenizer : nullptr,
                     [&](std::int64_t records, std::int64_t bytes, std::int64_t total) {
                       line.show("preparing data: " + count_text(records) + " records, " +
                                 bytes_text(bytes) + " of " + bytes_text(total));
                     });
  }
  // With a tokenizer, ids are bounded by its vocabulary, and that by the model's.
  if (!tokenizer && vocab) {
    check_ids(report.train.store, *vocab);
    if (report.validation) check_ids(report.validation->store, *vocab);
  }
  return report;
}

std::optional<Tokenizer> recipe_tokenizer(const Recipe& recipe) {
  fs::path folder;
  try {
    folder = find_model_folder(recipe.base_model);
  } catch (const Error&) {
    if (!all_tokenized(recipe.data)) throw;
    return std::nullopt;
  }
  return model_tokenizer(folder, read_model_spec(folder).vocab);
}

PrepareReport prepare_recipe_data(const Recipe& recipe) {
  const std::optional<Tokenizer> tokenizer = recipe_tokenizer(recipe);
  std::optional<std::int64_t> vocab;
  try {
    vocab = read_model_spec(find_model_folder(recipe.base_model)).vocab;
  } catch (const Error& error) {
    if (error.fault() != Fault::usage) throw;  // the model is not here: its vocabulary is unknown
  }
  PrepareReport report = prepare_data(data_options(recipe), tokenizer, vocab);
  remember_data(recipe, report);
  return report;
}

}  // namespace tailor
