#include "tools/compute/make_adapter.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "adapters/peft_files.h"
#include "base/error.h"

namespace tailor {
namespace {

bool all_zero(std::span<const float> x) {
  return std::all_of(x.begin(), x.end(), [](float value) { return value == 0; });
}

/// Expert `expert`'s part of a site's factors, `each` elements.
template <class T>
std::span<T> of_expert(std::span<T> factors, const LoraSite& site, std::int64_t expert,
                       std::int64_t each) {
  return factors.subspan(static_cast<std::size_t>(site.slot(expert) * each),
                         static_cast<std::size_t>(each));
}

}  // namespace

LoraOptions lora_options(const LoraRecipe& recipe, const ChosenByLayer& chosen) {
  LoraOptions out;
  out.rank = recipe.rank;
  out.alpha = recipe.alpha;
  out.dropout = recipe.dropout;
  out.rslora = recipe.rslora;
  out.expert_rank = recipe.expert_rank.value_or(recipe.rank);
  out.expert_alpha = recipe.expert_alpha.value_or(recipe.alpha);
  const std::array<std::pair<bool, const char*>, 5> groups = {
      {{recipe.targets.attention, "attention"},
       {recipe.targets.dense_mlp, "dense_mlp"},
       {recipe.targets.shared_expert, "shared_expert"},
       {recipe.targets.experts, "experts"},
       {recipe.targets.router, "router"}}};
  for (const auto& [wanted, name] : groups) {
    if (wanted) out.targets.emplace_back(name);
  }
  for (const std::string& module : recipe.targets.modules) out.targets.push_back(module);
  out.chosen_experts = chosen;
  return out;
}

void take_factors(const Adapter& given, const std::string& from, Adapter& adapter) {
  for (std::size_t i = 0; i < adapter.sites().size(); ++i) {
    const LoraSite& to = adapter.sites()[i];
    const LoraSite& site = given.sites()[i];
    const std::int64_t a_each = to.rank * to.in, b_each = to.rank * to.out;
    for (std::int64_t e = 0; e < to.experts; ++e) {
      if (site.slot(e) < 0) continue;
      const auto a = of_expert(given.a_of(site), site, e, a_each);
      const auto b = of_expert(given.b_of(site), site, e, b_each);
      if (to.slot(e) < 0) {
        if (all_zero(a) || all_zero(b)) continue;
        throw Error(Fault::usage,
                    {"lora.init_from has factors of expert " + std::to_string(e) + " of " +
                         to.module + ", which lora.experts does not choose",
                     from,
                     "Add the expert to the selection, or go on with the one the adapter was "
                     "trained with."});
      }
      if (to.is_experts() && all_zero(a) && all_zero(b)) continue;
      std::copy(a.begin(), a.end(), of_expert(adapter.a_of(to), to, e, a_each).begin());
      std::copy(b.begin(), b.end(), of_expert(adapter.b_of(to), to, e, b_each).begin());
    }
  }
}

Adapter make_adapter(const Recipe& recipe, const LoraOptions& options, const ModelSpec& spec,
                     const ArenaHome& home,
                     const std::function<void(const Adapter&, const LoraSite&)>& filled) {
  Adapter adapter =
      Adapter::create(spec, options, static_cast<std::uint64_t>(recipe.seed), home, filled);
  if (!recipe.lora.init_from) return adapter;
  const Adapter given = read_peft_adapter(*recipe.lora.init_from, spec);
  for (std::size_t i = 0; i < std::max(adapter.sites().size(), given.sites().size()); ++i) {
    const LoraSite* want = i < adapter.sites().size() ? &adapter.sites()[i] : nullptr;
    const LoraSite* have = i < given.sites().size() ? &given.sites()[i] : nullptr;
    const bool same = want != nullptr && have != nullptr && want->module == have->module &&
                      want->projection == have->projection && want->rank == have->rank &&
                      std::abs(want->scale - have->scale) < 1e-9;
    if (same) continue;
    const LoraSite& odd = have != nullptr ? *have : *want;
    throw Error(Fault::usage, {"lora.init_from differs from the recipe at " + odd.module + " (" +
                                   std::string(projection_name(odd.projection)) + ")",
                               *recipe.lora.init_from,
                               "Give the recipe the adapter's own targets, rank, alpha and rslora; "
                               "adapter_config.json has them."});
  }
  take_factors(given, *recipe.lora.init_from, adapter);
  return adapter;
}

}  // namespace tailor
