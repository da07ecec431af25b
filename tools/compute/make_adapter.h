#pragma once

#include "adapters/lora.h"
#include "recipes/recipe.h"

namespace tailor {

/// A resolved recipe's `lora:` block as the adapters take it.
LoraOptions lora_options(const LoraRecipe& recipe, const ChosenByLayer& chosen = {});

/// Fresh factors, or those of lora.init_from, which must sit where the recipe's would. Experts that
/// are zero in it start afresh: with both factors zero they could not learn. Throws Error{usage}
/// when it has factors of an expert that is not chosen: leaving those out would be another adapter.
/// `filled`: as Adapter::create().
Adapter make_adapter(const Recipe& recipe, const LoraOptions& options, const ModelSpec& spec,
                     const ArenaHome& home,
                     const std::function<void(const Adapter&, const LoraSite&)>& filled = {});

/// The second half of it: the factors of `given`, read from `from`.
void take_factors(const Adapter& given, const std::string& from, Adapter& adapter);

}  // namespace tailor
