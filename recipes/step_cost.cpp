#include "recipes/step_cost.h"

#include <algorithm>

#include "recipes/plan_text.h"

namespace tailor {

TokenFlops token_flops(const Recipe& recipe, const ModelFacts& model, bool keep,
                       double loss_share) {
  const LoraCounts lora = count_lora(recipe, model);
  const double attention = 2 * as_double(model.layers * model.attention_parameters() +
                                         model.moe_layers * model.hidden * model.experts);
  // Causal scores and values: half of 2 * s * (d_qk + d_v) a head.
  const double scores = as_double(model.layers * recipe.data.sequence_len * model.heads *
                                  (model.qk_dim + model.v_dim));
  const double mlp =
      2 * as_double(model.dense_layers * model.dense_mlp_parameters() +
                    model.moe_layers * model.shared_experts * model.expert_parameters());
  const double expert = 2 * as_double(model.moe_layers * model.top_k * model.expert_parameters());
  const double lora_other = 2 * as_double(lora.other());
  const auto& chosen = recipe.lora.chosen_experts;
  const double lora_expert = 2 * as_double(model.moe_layers * model.top_k * lora.per_expert) *
                             (chosen ? chosen->token_share : 1);
  const double again = keep ? 0.0 : 1.0;          // attention computed again
  const double again_mlp = keep ? 0.0 : 2.0 / 3;  // gate and up only
  TokenFlops flops;
  flops.head = 2 * as_double(model.head_parameters()) * loss_share;
  flops.forward_other = attention + scores + mlp + lora_other;
  flops.forward_expert = expert + lora_expert;
  // The scores' own backward is 2.5 forwards. The head runs in chunks, forward and backward at
  // once.
  flops.backward_other = attention * (1 + again) + scores * (2.5 + again) + mlp * (1 + again_mlp) +
                         lora_other * (2 + again) + flops.head * 2;
  flops.backward_expert = expert * (1 + again_mlp) + lora_expert * (2 + again);
  return flops;
}

double workspace_width(const ModelFacts& model) {
  double width = 8 * as_double(model.hidden);
  for (const MatrixShape& shape : model.attention) width += as_double(shape.out) * 2;
  return width + 6 * as_double(std::max(model.dense_layers > 0 ? model.dense_width : 0,
                                        model.shared_width()));
}

std::int64_t head_chunk_rows(std::int64_t vocab, std::int64_t element_bytes) {
  constexpr std::int64_t kChunkBytes = std::int64_t{64} << 20U;
  return std::clamp<std::int64_t>(kChunkBytes / (vocab * element_bytes), 16, 512);
}

BaseBytes base_bytes(const Recipe& recipe, const ModelFacts& model, RouterForm routers) {
  const auto mlp = [&](std::int64_t width, BaseFormat format) {
    return 2 * matrix_bytes(model, {width, model.hidden}, format, recipe.base.group_size) +
           matrix_bytes(model, {model.hidden, width}, format, recipe.base.group_size);
  };
  const BaseFormat other = recipe.base.non_expert_format;
  BaseBytes bytes;
  if (model.experts > 0) {
    bytes.expert = mlp(model.expert_width, recipe.base.format);
    bytes.routed = bytes.expert * as_double(model.moe_layers * model.experts);
    bytes.other += as_double(model.moe_layers) *
                   ((model.shared_experts > 0 ? mlp(model.shared_width(), other) : 0.0) +
                    matrix_bytes(model, {model.experts, model.hidden},
                                 routers == RouterForm::packed ? other : BaseFormat::bf16,
                                 recipe.base.group_size));
  }
  for (const MatrixShape& shape : model.attention) {
    bytes.other +=
        as_double(model.layers) * matrix_bytes(model, shape, other, recipe.base.group_size);
  }
  if (model.dense_layers > 0)
    bytes.other += as_double(model.dense_layers) * mlp(model.dense_width, other);
  const double width = model.published == BaseFormat::bf16 ? model.published_bytes : 2.0;
  bytes.head = as_double(model.head_parameters()) * width;
  bytes.embedding = model.tied_head ? 0 : bytes.head;
  return bytes;
}

}  // namespace tailor
