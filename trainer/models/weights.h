#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/model_spec.h"
#include "data/checkpoint/published.h"

namespace tailor {

/// Frozen weights of one layer in the blocks' dtype. Plain matrices are [out, in] as published;
/// projections with one input are stacked, so that one product serves them. Routed experts keep
/// Llama 4's published layout, input-major.
struct LayerWeights {
  at::Tensor input_norm_D, post_norm_D;
  at::Tensor qkv_OD;      ///< q, then k, then v rows; latent: q's latent (or q), then kv_a
  at::Tensor qkv_bias_O;  ///< of qkv_OD's rows; undefined without biases
  at::Tensor o_DO;        ///< [D, attention width]
  at::Tensor q_a_norm, q_b_OR, kv_a_norm, kv_b_OR;  ///< latent attention; the first two may lack
  at::Tensor gate_up_OD;  ///< dense MLP or shared expert: gate rows, then up rows [2F, D]
  at::Tensor down_DF;     ///< [D, F]
  at::Tensor router_ED;
  at::Tensor router_bias_E;        ///< float32, whatever the blocks' dtype; undefined without
  at::Tensor experts_gate_up_EDO;  ///< [E, D, 2F]
  at::Tensor experts_down_EFD;     ///< [E, F, D]
};

/// Hands a layer's matrices, in published order (data/checkpoint/published.h), to their places.
/// `stack(first, count)` gives matrices [first, first + count), which share an input, as one tensor
/// of all their rows; `vector(index, wide)` one of a single dimension, in float32 if `wide`.
/// `role(index)` says what a matrix is.
template <class Roles, class Stack, class Vector>
void place_attention(std::size_t count, const Roles& role, const Stack& stack, const Vector& vector,
                     LayerWeights& out) {
  const auto same_input = [&](std::size_t i) {
    const MatrixRole r = role(i);
    return r == MatrixRole::q || r == MatrixRole::k || r == MatrixRole::v || r == MatrixRole::q_a ||
           r == MatrixRole::kv_a;
  };
  for (std::size_t i = 0; i < count; ++i) {
    switch (role(i)) {
      case MatrixRole::input_norm:
        out.input_norm_D = vector(i, false);
        break;
      case MatrixRole::q_a_norm:
        out.q_a_norm = vector(i, false);
        break;
      case MatrixRole::kv_a_norm:
        out.kv_a_norm = vector(i, false);
        break;
      case MatrixRole::q_b:
        out.q_b_OR = stack(i, 1);
        break;
      case MatrixRole::kv_b:
        out.kv_b_OR = stack(i, 1);
        break;
      case MatrixRole::o:
        out.o_DO = stack(i, 1);
        break;
      case MatrixRole::q_bias: {
        const at::Tensor parts[] = {vector(i, false), vector(i + 1, false), vector(i + 2, false)};
        if (parts[0].defined()) out.qkv_bias_O = at::cat(parts);
        i += 2;
        break;
      }
      default: {
        std::size_t n = 1;
        while (i + n < count && same_input(i + n)) ++n;
        out.qkv_OD = stack(i, n);
        i += n - 1;
      }
    }
  }
}
template <class Roles, class Stack, class Vector>
void place_feed_forward(std::size_t count, const Roles& role, const Stack& stack,
                        const Vector& vector, LayerWeights& out) {
  for (std::size_t i = 0; i < count; ++i) {
    switch (role(i)) {
      case MatrixRole::post_norm:
        out.post_norm_D = vector(i, false);
        break;
      case MatrixRole::router:
        out.router_ED = stack(i, 1);
        break;
      case MatrixRole::router_bias:
        out.router_bias_E = vector(i, true);
        break;
      case MatrixRole::gate:  // and up after it
        out.gate_up_OD = stack(i, 2);
        ++i;
        break;
      default:
        out.down_DF = stack(i, 1);
    }
  }
}

struct ModelWeights {
  at::Tensor embedding_VD;
  at::Tensor head_VD;  ///< the embedding itself when the head is tied
  at::Tensor norm_D;
  std::vector<LayerWeights> layers;

  std::int64_t bytes() const;
};

/// Copies a checkpoint into memory, converted to `dtype` (float64, float32, bfloat16), shard pages
/// let go as they are read. Every name and shape is checked before the first byte is copied.
/// Reads fused experts (experts.gate_up_proj [E, D, 2F]; of DeepSeek [E, 2F, D]) and one matrix an
/// expert (experts.N.gate_proj.weight [F, D]); fp8 and INT4 as source_form.h has them, decoded.
/// Throws Error{bad_file}, naming tensor, row and column of a decoded weight that is no number.
ModelWeights load_weights(const Checkpoint& checkpoint, const ModelSpec& spec,
                          at::ScalarType dtype);

}  // namespace tailor
