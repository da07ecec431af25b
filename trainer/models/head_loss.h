#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <span>
#include <vector>

#include "trainer/ops.h"
#include "trainer/stream/frozen_weights.h"
#include "trainer/workspace.h"

namespace tailor {

struct LossResult {
  double loss_sum = 0;             ///< over trained tokens, natural log
  std::int64_t tokens = 0;         ///< trained tokens
  std::int64_t correct = 0;        ///< of them, those whose arg max is the target
  std::vector<double> losses;      ///< [tokens], in token order
  std::vector<std::uint8_t> hits;  ///< [tokens]
};

/// Final norm, vocabulary head and cross-entropy, only at positions that carry a loss. The head
/// comes once, in runs of vocabulary rows: a run's logits, made in chunks of rows, become weights
/// of its classes' vectors, whose sum is rescaled whenever a larger logit is met, as FlashAttention
/// does with keys and values (arXiv 2205.14135); here both are the head. So [T, V] logits never
/// exist (Cut Cross-Entropy's point, arXiv 2411.09009), and neither are they made nor the head read
/// a second time for the gradient. The order of all sums follows from the model's vocabulary runs.
/// dx_TD, if defined, is overwritten with the gradient of x_TD times `gradient_scale` per token.
template <class S>
LossResult head_loss(FrozenWeights& weights, const at::Tensor& x_TD,
                     std::span<const std::int32_t> target, double gradient_scale,
                     const at::Tensor& dx_TD, TensorStack& scratch);

/// Logits [rows, V] in float32 of rows of the residual stream, for tests and for generating.
template <class S>
at::Tensor head_logits(FrozenWeights& weights, const at::Tensor& x_TD, TensorStack& scratch);

}  // namespace tailor
