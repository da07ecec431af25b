#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <span>
#include <vector>

#include "trainer/models/weights.h"
#include "trainer/ops.h"
#include "trainer/workspace.h"

namespace tailor {

struct LossResult {
  double loss_sum = 0;             ///< over trained tokens, natural log
  std::int64_t tokens = 0;         ///< trained tokens
  std::int64_t correct = 0;        ///< of them, those whose arg max is the target
  std::vector<double> losses;      ///< [tokens], in token order
  std::vector<std::uint8_t> hits;  ///< [tokens]
};

/// Final norm, vocabulary head and cross-entropy, only at positions that carry a loss and in chunks
/// of rows, so that [T, V] logits never exist (Cut Cross-Entropy's point, arXiv 2411.09009).
/// Forward and backward go together: logits are turned into their gradient in place. dx_TD, if
/// defined, is overwritten with the gradient of x_TD times `gradient_scale` per token.
template <class S>
LossResult head_loss(const ModelWeights& weights, double norm_eps, const at::Tensor& x_TD,
                     std::span<const std::int32_t> target, double gradient_scale,
                     const at::Tensor& dx_TD, TensorStack& scratch);

/// Logits [rows, V] in float32 of rows of the residual stream, for tests and for generating.
template <class S>
at::Tensor head_logits(const ModelWeights& weights, double norm_eps, const at::Tensor& x_TD);

}  // namespace tailor
