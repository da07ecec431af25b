#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/checkpoint/model_spec.h"
#include "data/store/store.h"
#include "data/text/tokenizer.h"
#include "data/tokens/data_options.h"
#include "data/tokens/prepare.h"
#include "recipes/expert_selection.h"
#include "recipes/model_facts.h"
#include "recipes/read.h"

namespace tailor {

/// A recipe that was found, read and fitted to its model.
struct ResolvedRecipe {
  RecipeFile file;
  ModelFacts facts;
  std::vector<std::string> notes;  ///< keys that do not apply to this model
};

/// Finds a recipe by path or shipped name and reads it strictly.
RecipeFile open_recipe(const std::string& asked, std::span<const std::string> overrides);

/// open_recipe, then what depends on the model. Throws Error{usage} for a LoRA target given in the
/// recipe that matches nothing of the model, and when the model is neither here nor published; for
/// lora.experts as apply_selection().
ResolvedRecipe resolve_recipe(const std::string& asked, std::span<const std::string> overrides);
ResolvedRecipe resolve_recipe(RecipeFile file);

/// The folder of the store a recipe names: base.store, or base_model where that is one. Empty:
/// none.
fs::path recipe_store(const Recipe& recipe);

/// Where the recipe names a store, base.format, base.non_expert_format and base.group_size become
/// what it holds. Throws Error{usage} when the recipe asks for something else, Error{bad_file} when
/// the store is not whole or of another model than base_model.
void apply_store(RecipeFile& file);

/// The shape and fingerprint of a model's folder or a store.
RoutedModel read_routed_model(const fs::path& folder);

/// The selection that lora.experts names, held against the model the recipe was resolved for;
/// nothing where all experts have factors. Sets lora.chosen_experts, and adds to `notes` where the
/// selection was reckoned with another rank. Throws as read_selection() and check_selection() do.
std::optional<ExpertSelection> apply_selection(Recipe& recipe, const RoutedModel& model,
                                               std::vector<std::string>& notes);

/// The formats `tailor model pack` is asked for by a recipe's base.format and its neighbours.
StoreFormats store_formats(const BaseRecipe& base);

/// The `data:` block as the data layer takes it.
DataOptions data_options(const Recipe& recipe);

/// The tokenizer in a model's folder. Throws Error{bad_file} when it has more tokens than the
/// model.
Tokenizer load_tokenizer(const fs::path& model_folder, std::int64_t vocab);
/// load_tokenizer, or nothing where there is no tokenizer.json.
std::optional<Tokenizer> model_tokenizer(const fs::path& model_folder, std::int64_t vocab);

/// prepare() with a progress line on a terminal. Throws Error{bad_file} also for ids of tokenised
/// rows that a vocabulary of `vocab` does not have; null: not known, not checked.
PrepareReport prepare_data(const DataOptions& options, const std::optional<Tokenizer>& tokenizer,
                           std::optional<std::int64_t> vocab);

/// The tokenizer of the recipe's model, or nothing where the model has none and only tokenised rows
/// can be read. Throws Error{usage} when the model is not here, Error{bad_file} when the tokenizer
/// has more tokens than the model.
std::optional<Tokenizer> recipe_tokenizer(const Recipe& recipe);

/// prepare_data() of the recipe's data, for its model where that is here.
PrepareReport prepare_recipe_data(const Recipe& recipe);

}  // namespace tailor
