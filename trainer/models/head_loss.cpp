#include "trainer/models/head_loss.h"

#include <algorithm>

#include "recipes/step_cost.h"

namespace tailor {

template <class S>
LossResult head_loss(const ModelWeights& weights, double norm_eps, const at::Tensor& x_TD,
                     std::span<const std::int32_t> target, double gradient_scale,
                     const at::Tensor& dx_TD, TensorStack& scratch) {
  const std::int64_t D = x_TD.size(1), V = weights.head_VD.size(0);
  std::vector<std::int32_t> rows, wanted;
  for (std::size_t t = 0; t < target.size(); ++t) {
    if (target[t] < 0) continue;
    rows.push_back(static_cast<std::int32_t>(t));
    wanted.push_back(target[t]);
  }
  const auto count = static_cast<std::int64_t>(rows.size());
  LossResult result;
  result.tokens = count;
  result.losses.resize(rows.size());
  result.hits.resize(rows.size());
  if (dx_TD.defined()) dx_TD.zero_();
  const std::int64_t chunk =
      std::min(count, head_chunk_rows(V, static_cast<std::int64_t>(sizeof(S))));
  if (count == 0) return result;
  const Frame frame(scratch);
  const at::Tensor x_chunk = scratch.take({chunk, D}, kDtype<S>);
  const at::Tensor n_chunk = scratch.take({chunk, D}, kDtype<S>);
  const at::Tensor logits_chunk = scratch.take({chunk, V}, kDtype<S>);
  const at::Tensor dx_chunk = scratch.take({dx_TD.defined() ? chunk : 0, D}, kDtype<S>);
  std::vector<std::int32_t> best(static_cast<std::size_t>(chunk));
  for (std::int64_t begin = 0; begin < count; begin += chunk) {
    const std::int64_t n = std::min(chunk, count - begin);
    const at::Tensor x = x_chunk.narrow(0, 0, n), normed = n_chunk.narrow(0, 0, n);
    const at::Tensor logits = logits_chunk.narrow(0, 0, n);
    const std::int32_t* token = rows.data() + begin;
    kernels<S>().gather_rows(0, n, D, data<S>(x_TD), token, nullptr, data<S>(x));
    ops::rms_norm<S>(x, weights.norm_D, norm_eps, normed);
    ops::linear(normed, weights.head_VD, logits);
    at::parallel_for(0, n, 1, [&](std::int64_t from, std::int64_t to) {
      kernels<S>().cross_entropy(from, to, V, data<S>(logits), wanted.data() + begin,
                                 dx_TD.defined() ? gradient_scale : 0, result.losses.data() + begin,
                                 best.data());
    });
    for (std::int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<std::size_t>(begin + i);
      result.hits[at] = best[static_cast<std::size_t>(i)] == wanted[at] ? 1 : 0;
      result.correct += result.hits[at];
      result.loss_sum += result.losses[at];
    }
    if (!dx_TD.defined()) continue;
    ops::linear_backward(logits, weights.head_VD, normed);  // normed now holds its own gradient
    const at::Tensor dx = dx_chunk.narrow(0, 0, n).zero_();
    ops::rms_norm_backward<S>(x, weights.norm_D, normed, dx, norm_eps, dx);
    for (std::int64_t i = 0; i < n; ++i) {
      std::copy_n(data<S>(dx) + i * D, D, data<S>(dx_TD) + std::int64_t{token[i]} * D);
    }
  }
  return result;
}

template <class S>
at::Tensor head_logits(const ModelWeights& weights, double norm_eps, const at::Tensor& x_TD) {
  const at::Tensor n_TD = at::empty_like(x_TD);
  ops::rms_norm<S>(x_TD, weights.norm_D, norm_eps, n_TD);
  return at::mm(n_TD, weights.head_VD.t()).to(kDtype<AccumOf<S>>);
}

template LossResult head_loss<double>(const ModelWeights&, double, const at::Tensor&,
                                      std::span<const std::int32_t>, double, const at::Tensor&,
                                      TensorStack&);
template LossResult head_loss<float>(const ModelWeights&, double, const at::Tensor&,
                                     std::span<const std::int32_t>, double, const at::Tensor&,
                                     TensorStack&);
template LossResult head_loss<Bf16>(const ModelWeights&, double, const at::Tensor&,
                                    std::span<const std::int32_t>, double, const at::Tensor&,
                                    TensorStack&);
template at::Tensor head_logits<double>(const ModelWeights&, double, const at::Tensor&);
template at::Tensor head_logits<float>(const ModelWeights&, double, const at::Tensor&);
template at::Tensor head_logits<Bf16>(const ModelWeights&, double, const at::Tensor&);

}  // namespace tailor
