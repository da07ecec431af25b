#include "recipes/step_cost.h"

#include <algorithm>
#include <cmath>

namespace tailor {
namespace {

double as_double(std::int64_t value) { return static_cast<double>(value); }

}  // namespace

TokenFlops token_flops(const Recipe& recipe, const ModelFacts& model, bool keep) {
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
  const double head = 2 * as_double(model.head_parameters());
  const double lora_other = 2 * as_double(lora.other());
  const double lora_expert = 2 * as_double(model.moe_layers * model.top_k * lora.per_expert);
  const double again = keep ? 0.0 : 1.0;          // attention computed again
  const double again_mlp = keep ? 0.0 : 2.0 / 3;  // gate and up only
  TokenFlops flops;
  flops.forward_other = attention + scores + mlp + lora_other;
  flops.forward_expert = expert + lora_expert;
  // The scores' own backward is 2.5 forwards. The head runs in chunks, forward and backward at
  // once.
  flops.backward_other = attention * (1 + again) + scores * (2.5 + again) + mlp * (1 + again_mlp) +
                         lora_other * (2 + again) + head * 2;
  flops.backward_expert = expert * (1 + again_mlp) + lora_expert * (2 + again);
  return flops;
}

std::int64_t head_chunk_rows(std::int64_t vocab, std::int64_t element_bytes) {
  constexpr std::int64_t kChunkBytes = std::int64_t{64} << 20U;
  return std::clamp<std::int64_t>(kChunkBytes / (vocab * element_bytes), 16, 512);
}

BaseBytes base_bytes(const Recipe& recipe, const ModelFacts& model) {
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
                   (as_double(model.shared_experts) * mlp(model.expert_width, other) +
                    as_double(model.hidden * model.experts) * 2);
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

double StepTime::seconds() const {
  return std::max({link_forward, disk_forward, compute_forward, network_forward}) +
         std::max({link_backward, disk_backward, compute_backward, network_backward}) + exposed;
}

StepTime gpu_step_time(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
                       const GpuChoice& choice) {
  const double ranks = recipe.machine.ranks;
  const double tokens = choice.tokens / ranks;  // one rank
  const double flop_rate = machine.peak_flops * machine.efficiency;
  constexpr double kMemoryEfficiency = 0.8;  // of the device's memory, streaming through it
  const double memory_rate = machine.device_bytes_per_second * kMemoryEfficiency;
  const TokenFlops flops = token_flops(recipe, model, false);
  const BaseBytes base = base_bytes(recipe, model);
  const LoraCounts lora = count_lora(recipe, model);

  // Experts met by at least one token, routing taken as even.
  const double touched = model.experts == 0 ? 0.0
                                            : 1 - std::pow(1 - 1 / as_double(model.experts),
                                                           choice.tokens * as_double(model.top_k));
  const double streamed =
      base.routed * (1 - choice.resident_fraction) * touched;            // a pass, all ranks
  const double factors = as_double(lora.experts) * 2 * touched / ranks;  // bf16, with the tiles
  const double kept =
      choice.activations_cross ? tokens * as_double(model.layers * model.hidden) * 2 : 0;

  StepTime time;
  time.stream_bytes = 2 * streamed;
  if (choice.host_tile_bytes >= 0) {
    const double from_disk = std::max(0.0, streamed - choice.host_tile_bytes * touched);
    time.disk_forward = time.disk_backward = from_disk / machine.disk_bytes_per_second;
  }
  const double in = machine.to_device_bytes_per_second, out = machine.from_device_bytes_per_second;
  time.link_forward = std::max((streamed / ranks + factors) / in, kept / out);
  // Backward the kept inputs come back, and float32 gradients of the experts' factors leave.
  time.link_backward = std::max((streamed / ranks + factors + kept) / in, 2 * factors / out);

  // Every rank dequantises all experts it gets: packed tiles are gathered, tokens stay.
  const double routed = as_double(model.routed_parameters()) * touched;
  const double dequantise = routed > 0 ? (base.routed * touched + routed * 2) / memory_rate : 0;
  const double read_once = routed * 2 / memory_rate;  // the bf16 scratch, read by one GEMM sweep
  constexpr double kBackwardSweeps = 5.0 / 3;  // gate and up again, then all three transposed
  time.compute_forward = flops.forward_other * tokens / flop_rate +
                         std::max(flops.forward_expert * tokens / flop_rate, read_once) +
                         dequantise;
  time.compute_backward =
      flops.backward_other * tokens / flop_rate +
      std::max(flops.backward_expert * tokens / flop_rate, kBackwardSweeps * read_once) +
      dequantise;
  if (ranks > 1 && machine.between_devices_bytes_per_second > 0) {
    time.network_forward = time.network_backward =
        base.routed * touched * (ranks - 1) / ranks / machine.between_devices_bytes_per_second;
  }
  time.exposed = 0.25;  // first tile, last gradients, the optimizer's tail
  return time;
}

}  // namespace tailor
