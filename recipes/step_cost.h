#pragma once

#include <cstdint>

#include "recipes/model_facts.h"
#include "recipes/recipe.h"

namespace tailor {

/// Arithmetic of one token, split by phase and by who does it. The frozen base costs 2N forward, 2N
/// for the gradient of the input and 2N where it is computed again; LoRA adds 2n for its own
/// gradients. Recomputing an MLP skips its down projection (2/3 remain), because the backward pass
/// does not need that output.
struct TokenFlops {
  double forward_other = 0, forward_expert = 0, backward_other = 0, backward_expert = 0;
  /// The head's logits. They are formed beside their gradient, so `backward_other` holds them, and
  /// the gradient of their input, which costs the same.
  double head = 0;
  double total() const { return forward_other + forward_expert + backward_other + backward_expert; }
};
/// `keep`: all activations are kept, nothing is computed again. `loss_share`: of the tokens, those
/// that carry loss; the head meets no others.
TokenFlops token_flops(const Recipe& recipe, const ModelFacts& model, bool keep,
                       double loss_share = 1);

/// A trained parameter's bytes: float32 value, gradient and two moments, bf16 copy.
constexpr double kTrainBytes = 18;

/// State of routed experts on disk, of one parameter whose cast copy takes `value_bytes`: a float32
/// value, gradient and two moments, and the copy.
struct PagedState {
  double bytes = 0;  ///< on disk
  /// Written: the gradient behind the backward pass; value, moments and copy behind the update.
  /// Read: the gradient for the norm; gradient, value and moments for the update; the copy for the
  /// backward pass. The forward pass finds it in memory.
  double traffic = 0;
};
constexpr PagedState paged_state(double value_bytes) {
  return {16 + value_bytes, (16 + value_bytes) + (20 + value_bytes)};
}

/// Values that one token of a micro-batch takes while it passes through a block.
double workspace_width(const ModelFacts& model);

/// Rows of the vocabulary head worked on at once on the CPU: logits of at most 64 MiB, so that
/// memory does not follow the vocabulary.
std::int64_t head_chunk_rows(std::int64_t vocab, std::int64_t element_bytes);

/// Sizes of the frozen model in the recipe's formats, in bytes.
struct BaseBytes {
  double expert = 0;               ///< one routed expert
  double routed = 0;               ///< all of them
  double other = 0;                ///< attention, dense MLPs, shared experts, routers
  double head = 0, embedding = 0;  ///< kept in the published form; embedding 0 when tied
  double all() const { return routed + other + head + embedding; }
};
/// Where a router lives: in bfloat16 as published, or in the format of what stands around it.
enum class RouterForm { bfloat16, packed };
BaseBytes base_bytes(const Recipe& recipe, const ModelFacts& model,
                     RouterForm routers = RouterForm::bfloat16);

}  // namespace tailor
