#include "trainer/models/head_loss.h"

#include <algorithm>

#include "recipes/step_cost.h"

namespace tailor {
namespace {

/// The positions of a step that carry a loss, and what is known of each.
template <class S>
struct Wanted {
  std::vector<std::int32_t> token, target;
  std::vector<SoftmaxRow<AccumOf<S>>> softmax;
  std::int64_t count() const { return static_cast<std::int64_t>(token.size()); }
};

/// Calls use(first, logits) with logits [count, rows] of rows [first, ...) of one run's product.
template <class S, class Use>
void each_chunk(const at::Tensor& normed_nD, const at::Tensor& w_VD, std::int64_t chunk,
                const at::Tensor& logits_scratch, const Use& use) {
  const std::int64_t V = w_VD.size(0), n = normed_nD.size(0);
  for (std::int64_t begin = 0; begin < n; begin += chunk) {
    const std::int64_t rows = std::min(chunk, n - begin);
    const at::Tensor logits = logits_scratch.narrow(0, 0, rows * V).view({rows, V});
    ops::linear(normed_nD.narrow(0, begin, rows), w_VD, logits);
    use(begin, logits);
  }
}

}  // namespace

template <class S>
LossResult head_loss(FrozenWeights& weights, const at::Tensor& x_TD,
                     std::span<const std::int32_t> target, double gradient_scale,
                     const at::Tensor& dx_TD, TensorStack& scratch) {
  using A = AccumOf<S>;
  const std::int64_t D = x_TD.size(1), V = weights.spec().vocab;
  const double eps = weights.spec().norm_eps;
  Wanted<S> wanted;
  for (std::size_t t = 0; t < target.size(); ++t) {
    if (target[t] < 0) continue;
    wanted.token.push_back(static_cast<std::int32_t>(t));
    wanted.target.push_back(target[t]);
  }
  const std::int64_t n = wanted.count(), runs = weights.head_runs();
  wanted.softmax.resize(static_cast<std::size_t>(n));
  LossResult result;
  result.tokens = n;
  result.losses.resize(static_cast<std::size_t>(n));
  result.hits.resize(static_cast<std::size_t>(n));
  if (dx_TD.defined()) dx_TD.zero_();
  const Frame frame(scratch);
  const at::Tensor x_nD = scratch.take({n, D}, kDtype<S>);
  const at::Tensor normed_nD = scratch.take({n, D}, kDtype<S>);
  at::parallel_for(0, n, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().gather_rows(begin, end, D, data<S>(x_TD), wanted.token.data(), nullptr,
                             data<S>(x_nD));
  });
  const at::Tensor norm_D = weights.final_norm_D();
  ops::rms_norm<S>(x_nD, norm_D, eps, normed_nD);
  // Rows of the whole head whose logits may exist at once; of one run they are more.
  const std::int64_t rows_at_once = head_chunk_rows(V, static_cast<std::int64_t>(sizeof(S)));
  const bool keep = dx_TD.defined() && n <= rows_at_once;
  const std::int64_t logits_at_once = keep ? n * V : std::min(rows_at_once, n) * V;
  const at::Tensor logits_scratch = scratch.take({logits_at_once}, kDtype<S>);
  const auto chunk_of = [&](std::int64_t run_rows) {
    return std::max<std::int64_t>(1, keep ? n : std::min(n, logits_at_once / run_rows));
  };
  const auto place_of = [&](std::int64_t first) {
    return keep ? logits_scratch.narrow(0, n * first, logits_at_once - n * first) : logits_scratch;
  };
  for (std::int64_t r = 0; r < runs; ++r) {
    const Frame of_run(scratch);
    const FrozenWeights::HeadRun run = weights.head(r, scratch);
    if (n == 0) continue;
    const std::int64_t width = run.w_VD.size(0);
    each_chunk<S>(normed_nD, run.w_VD, chunk_of(width), place_of(run.first),
                  [&](std::int64_t begin, const at::Tensor& logits) {
                    at::parallel_for(0, logits.size(0), 1, [&](std::int64_t from, std::int64_t to) {
                      kernels<S>().softmax_run(from, to, width, run.first, data<S>(logits),
                                               wanted.target.data() + begin,
                                               wanted.softmax.data() + begin);
                    });
                  });
  }
  for (std::size_t i = 0; i < wanted.softmax.size(); ++i) {
    result.losses[i] = wanted.softmax[i].loss();
    result.hits[i] = wanted.softmax[i].best == wanted.target[i] ? 1 : 0;
    result.correct += result.hits[i];
    result.loss_sum += result.losses[i];
  }
  if (!dx_TD.defined()) return result;

  // The gradient of the normed rows is a sum over runs, in order; between runs it is kept in A.
  const at::Tensor sum_nD = scratch.take({n, D}, kDtype<A>).zero_();
  const at::Tensor part_nD =
      kDtype<A> == kDtype<S> ? at::Tensor() : scratch.take({n, D}, kDtype<S>);
  for (std::int64_t r = 0; r < runs; ++r) {
    const Frame of_run(scratch);
    const FrozenWeights::HeadRun run = weights.head(r, scratch);
    if (n == 0) continue;
    const std::int64_t width = run.w_VD.size(0);
    const auto use = [&](std::int64_t begin, const at::Tensor& logits) {
      const std::int64_t rows = logits.size(0);
      at::parallel_for(0, rows, 1, [&](std::int64_t from, std::int64_t to) {
        kernels<S>().softmax_gradient(from, to, width, run.first, data<S>(logits),
                                      wanted.target.data() + begin, gradient_scale,
                                      wanted.softmax.data() + begin);
      });
      at::Tensor sum = sum_nD.narrow(0, begin, rows);
      if (!part_nD.defined()) {
        at::addmm_out(sum, sum, logits, run.w_VD);
        return;
      }
      const at::Tensor part = part_nD.narrow(0, begin, rows);
      ops::linear_backward(logits, run.w_VD, part);
      sum.add_(part);
    };
    if (keep) {
      use(0, place_of(run.first).narrow(0, 0, n * width).view({n, width}));
    } else {
      each_chunk<S>(normed_nD, run.w_VD, chunk_of(width), logits_scratch, use);
    }
  }
  if (n == 0) return result;
  normed_nD.copy_(sum_nD);  // from here on the gradient of the normed rows
  const at::Tensor dx_nD = scratch.take({n, D}, kDtype<S>).zero_();
  ops::rms_norm_backward<S>(x_nD, norm_D, normed_nD, dx_nD, eps, dx_nD);
  for (std::int64_t i = 0; i < n; ++i) {
    std::copy_n(data<S>(dx_nD) + i * D, D,
                data<S>(dx_TD) + std::int64_t{wanted.token[static_cast<std::size_t>(i)]} * D);
  }
  return result;
}

template <class S>
at::Tensor head_logits(FrozenWeights& weights, const at::Tensor& x_TD, TensorStack& scratch) {
  const Frame frame(scratch);
  const at::Tensor n_TD = scratch.take(x_TD.sizes(), kDtype<S>);
  ops::rms_norm<S>(x_TD, weights.final_norm_D(), weights.spec().norm_eps, n_TD);
  const at::Tensor out =
      at::empty({x_TD.size(0), weights.spec().vocab}, at::TensorOptions(kDtype<AccumOf<S>>));
  for (std::int64_t r = 0; r < weights.head_runs(); ++r) {
    const Frame of_run(scratch);
    const FrozenWeights::HeadRun run = weights.head(r, scratch);
    out.narrow(1, run.first, run.w_VD.size(0)).copy_(at::mm(n_TD, run.w_VD.t()));
  }
  return out;
}

template LossResult head_loss<double>(FrozenWeights&, const at::Tensor&,
                                      std::span<const std::int32_t>, double, const at::Tensor&,
                                      TensorStack&);
template LossResult head_loss<float>(FrozenWeights&, const at::Tensor&,
                                     std::span<const std::int32_t>, double, const at::Tensor&,
                                     TensorStack&);
template LossResult head_loss<Bf16>(FrozenWeights&, const at::Tensor&,
                                    std::span<const std::int32_t>, double, const at::Tensor&,
                                    TensorStack&);
template at::Tensor head_logits<double>(FrozenWeights&, const at::Tensor&, TensorStack&);
template at::Tensor head_logits<float>(FrozenWeights&, const at::Tensor&, TensorStack&);
template at::Tensor head_logits<Bf16>(FrozenWeights&, const at::Tensor&, TensorStack&);

}  // namespace tailor
