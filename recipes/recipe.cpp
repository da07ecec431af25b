#include "recipes/recipe.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace tailor {
namespace {

double scale(double alpha, int rank, bool rslora) {
  return rslora ? alpha / std::sqrt(static_cast<double>(rank)) : alpha / rank;
}

}  // namespace

double Recipe::lora_scale() const { return scale(lora.alpha, lora.rank, lora.rslora); }

double Recipe::expert_lora_scale() const {
  TAILOR_CHECK(lora.expert_rank && lora.expert_alpha, "resolve() the recipe first");
  return scale(*lora.expert_alpha, *lora.expert_rank, lora.rslora);
}

std::vector<std::string> resolve(Recipe& recipe, const ModelTraits& model) {
  std::vector<std::string> not_applied;
  LoraRecipe& lora = recipe.lora;
  if (model.experts == 0) {
    constexpr const char* kWhy = ": the model has no routed experts";
    if (lora.expert_rank) not_applied.push_back(std::string("lora.expert_rank") + kWhy);
    if (lora.expert_alpha) not_applied.push_back(std::string("lora.expert_alpha") + kWhy);
    if (lora.expert_state != StateHome::automatic)
      not_applied.push_back(std::string("lora.expert_state") + kWhy);
    if (lora.experts) not_applied.push_back(std::string("lora.experts") + kWhy);
    lora.chosen_experts.reset();
  }
  if (!lora.expert_rank) {
    lora.expert_rank = std::max(1, lora.rank / std::max(1, model.experts_per_token));
  }
  if (!lora.expert_alpha) lora.expert_alpha = lora.alpha * *lora.expert_rank / lora.rank;
  return not_applied;
}

}  // namespace tailor
