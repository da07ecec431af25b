#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/model_spec.h"

namespace tailor {

/// Frozen weights of one layer in the blocks' dtype. Plain matrices are [out, in] as published;
/// projections with one input are stacked, so that one product serves them. Routed experts keep
/// Llama 4's published layout, input-major.
struct LayerWeights {
  at::Tensor input_norm_D, post_norm_D;
  at::Tensor qkv_OD;      ///< q, then k, then v rows
  at::Tensor o_DO;        ///< [D, H * head_dim]
  at::Tensor gate_up_OD;  ///< dense MLP or shared expert: gate rows, then up rows [2F, D]
  at::Tensor down_DF;     ///< [D, F]
  at::Tensor router_ED;
  at::Tensor experts_gate_up_EDO;  ///< [E, D, 2F]
  at::Tensor experts_down_EFD;     ///< [E, F, D]
};

struct ModelWeights {
  at::Tensor embedding_VD;
  at::Tensor head_VD;  ///< the embedding itself when the head is tied
  at::Tensor norm_D;
  std::vector<LayerWeights> layers;

  std::int64_t bytes() const;
};

/// Copies a checkpoint into memory, converted to `dtype` (float64, float32, bfloat16), shard pages
/// let go as they are read. Every name and shape is checked before the first byte is copied.
/// Reads fused experts (experts.gate_up_proj [E, D, 2F]) and one matrix an expert
/// (experts.N.gate_proj.weight [F, D]). Throws Error{bad_file}.
ModelWeights load_weights(const Checkpoint& checkpoint, const ModelSpec& spec,
                          at::ScalarType dtype);

}  // namespace tailor
