#include "trainer/models/head_loss.h"

#include <algorithm>
#include <optional>

#include "recipes/step_cost.h"

namespace tailor {
namespace {

/// The positions of a step that carry a loss, and what is known of each.
template <class S>
struct Wanted {
  explicit Wanted(std::span<const std::int32_t> of_step) {
    for (std::size_t t = 0; t < of_step.size(); ++t) {
      if (of_step[t] < 0) continue;
      token.push_back(static_cast<std::int32_t>(t));
      target.push_back(of_step[t]);
    }
    softmax.resize(token.size());
  }
  std::int64_t count() const { return static_cast<std::int64_t>(token.size()); }
  LossResult result() const {
    LossResult out;
    out.tokens = count();
    for (std::size_t i = 0; i < softmax.size(); ++i) {
      out.losses.push_back(softmax[i].loss());
      out.hits.push_back(softmax[i].best == target[i] ? 1 : 0);
      out.correct += out.hits[i];
      out.loss_sum += out.losses[i];
    }
    return out;
  }

  std::vector<std::int32_t> token, target;
  std::vector<SoftmaxRow<AccumOf<S>>> softmax;
};

/// What a normed row's gradient is made of, while runs of the vocabulary pass.
template <class S>
class HeadGradient {
  using A = AccumOf<S>;

 public:
  HeadGradient(std::int64_t n, std::int64_t D, TensorStack& scratch)
      : sum_nD_(scratch.take({n, D}, kDtype<A>).zero_()),
        target_nD_(scratch.take({n, D}, kDtype<S>)),
        part_nD_(scratch.take({n, D}, kDtype<S>)),
        rescale_(static_cast<std::size_t>(n)) {}

  /// Rows [begin, ...) of logits of a run. They are overwritten.
  void add(Wanted<S>& wanted, std::int64_t begin, const at::Tensor& logits, std::int64_t first,
           const at::Tensor& w_VD) {
    const std::int64_t rows = logits.size(0), width = logits.size(1), D = w_VD.size(1);
    at::parallel_for(0, rows, 1, [&](std::int64_t from, std::int64_t to) {
      kernels<S>().softmax_weights(from, to, width, first, data<S>(logits),
                                   wanted.target.data() + begin, wanted.softmax.data() + begin,
                                   rescale_.data() + begin);
    });
    const at::Tensor part = part_nD_.narrow(0, 0, rows);
    ops::linear_backward(logits, w_VD, part);
    at::parallel_for(0, rows, kRowsPerTask, [&](std::int64_t from, std::int64_t to) {
      kernels<S>().softmax_sum(from, to, D, data<S>(part), rescale_.data() + begin,
                               data<A>(sum_nD_) + begin * D);
    });
    for (std::int64_t i = begin; i < begin + rows; ++i) {
      const std::int64_t row = wanted.target[static_cast<std::size_t>(i)] - first;
      if (row < 0 || row >= width) continue;
      std::copy_n(data<S>(w_VD) + row * D, D, data<S>(target_nD_) + i * D);
    }
  }

  void finish(const Wanted<S>& wanted, double gradient_scale, const at::Tensor& out_nD) const {
    at::parallel_for(0, out_nD.size(0), kRowsPerTask, [&](std::int64_t from, std::int64_t to) {
      kernels<S>().softmax_gradient(from, to, out_nD.size(1), data<A>(sum_nD_), data<S>(target_nD_),
                                    gradient_scale, wanted.softmax.data(), data<S>(out_nD));
    });
  }

 private:
  at::Tensor sum_nD_;     ///< of weight times the class's vector, but for the target
  at::Tensor target_nD_;  ///< the targets' vectors, of runs that were seen
  at::Tensor part_nD_;
  std::vector<A> rescale_;
};

}  // namespace

template <class S>
LossResult head_loss(FrozenWeights& weights, const at::Tensor& x_TD,
                     std::span<const std::int32_t> target, double gradient_scale,
                     const at::Tensor& dx_TD, TensorStack& scratch) {
  const std::int64_t D = x_TD.size(1), V = weights.spec().vocab;
  const double eps = weights.spec().norm_eps;
  Wanted<S> wanted(target);
  const std::int64_t n = wanted.count();
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
  // Logits of so many rows of the whole head may exist at once; of one run they are more.
  const std::int64_t logits_at_once =
      std::min(head_chunk_rows(V, static_cast<std::int64_t>(sizeof(S))), n) * V;
  const at::Tensor logits_scratch = scratch.take({logits_at_once}, kDtype<S>);
  std::optional<HeadGradient<S>> gradient;
  if (dx_TD.defined()) gradient.emplace(n, D, scratch);
  for (std::int64_t r = 0; r < weights.head_runs(); ++r) {
    const Frame of_run(scratch);
    const FrozenWeights::HeadRun run = weights.head(r, scratch);
    if (n == 0) continue;
    const std::int64_t width = run.w_VD.size(0);
    const std::int64_t chunk = std::max<std::int64_t>(1, std::min(n, logits_at_once / width));
    for (std::int64_t begin = 0; begin < n; begin += chunk) {
      const std::int64_t rows = std::min(chunk, n - begin);
      const at::Tensor logits = logits_scratch.narrow(0, 0, rows * width).view({rows, width});
      ops::linear(normed_nD.narrow(0, begin, rows), run.w_VD, logits);
      if (gradient) {
        gradient->add(wanted, begin, logits, run.first, run.w_VD);
        continue;
      }
      at::parallel_for(0, rows, 1, [&](std::int64_t from, std::int64_t to) {
        kernels<S>().softmax_run(from, to, width, run.first, data<S>(logits),
                                 wanted.target.data() + begin, wanted.softmax.data() + begin);
      });
    }
  }
  LossResult result = wanted.result();
  if (!gradient || n == 0) return result;
  const at::Tensor& dx_nD = normed_nD;
  gradient->finish(wanted, gradient_scale, dx_nD);
  ops::rms_norm_backward<S>(x_nD, norm_D, dx_nD, at::Tensor(), eps, dx_nD);
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
