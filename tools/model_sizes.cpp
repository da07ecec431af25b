#include "tools/model_sizes.h"

#include <algorithm>

#include "recipes/choices.h"
#include "recipes/step_cost.h"

namespace tailor {

std::vector<FormatSizes> format_sizes(const ModelFacts& model) {
  std::vector<FormatSizes> out;
  for (const BaseFormat format :
       {BaseFormat::bf16, BaseFormat::fp8, BaseFormat::int4, BaseFormat::nf4}) {
    Recipe recipe;
    recipe.base.format = recipe.base.non_expert_format = format;
    const BaseBytes bytes = base_bytes(recipe, model);
    const auto experts = static_cast<double>(model.experts);
    out.push_back({std::string(choice_word(format)), bytes.expert, bytes.expert * experts,
                   bytes.routed, bytes.other, bytes.head + bytes.embedding});
  }
  return out;
}

std::vector<AdapterSize> adapter_sizes(const ModelFacts& model) {
  std::vector<AdapterSize> out;
  const auto add = [&](const char* target, const LoraTargets& targets) {
    Recipe recipe;
    recipe.lora.rank = 1;
    recipe.lora.expert_rank = 1;
    recipe.lora.targets = targets;
    const std::int64_t parameters = count_lora(recipe, model).total();
    if (parameters > 0) out.push_back({target, parameters});
  };
  LoraTargets none{false, false, false, false, false, {}};
  const auto group = [&](bool LoraTargets::*flag) {
    LoraTargets targets = none;
    targets.*flag = true;
    return targets;
  };
  add("attention", group(&LoraTargets::attention));
  const auto& names = model.attention_names;
  if (std::find(names.begin(), names.end(), "kv_b_proj") != names.end()) {
    LoraTargets targets = none;
    targets.modules = {"kv_b_proj"};
    add("kv_b_proj", targets);
  }
  if (model.dense_layers > 0) add("dense_mlp", group(&LoraTargets::dense_mlp));
  if (model.shared_experts > 0) add("shared_expert", group(&LoraTargets::shared_expert));
  if (model.experts > 0) {
    add("router", group(&LoraTargets::router));
    add("experts", group(&LoraTargets::experts));
  }
  return out;
}

std::int64_t trained_expert_parameters(const ModelFacts& model) {
  return model.moe_layers * model.experts * (2 * model.hidden + 3 * model.expert_width);
}

}  // namespace tailor
