#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "trainer/kernels/kernels.h"

namespace tailor {

/// The kernels on ATen tensors, split over threads. Everything is contiguous unless a stride is
/// asked for; a tensor's element type is kDtype<S>. Nothing here allocates.

template <class S>
inline constexpr at::ScalarType kDtype = at::kFloat;
template <>
inline constexpr at::ScalarType kDtype<double> = at::kDouble;
template <>
inline constexpr at::ScalarType kDtype<Bf16> = at::kBFloat16;

template <class S>
S* data(const at::Tensor& tensor) {
  return static_cast<S*>(tensor.data_ptr());
}

/// Rows of [T, D] matrices are handed out in runs of this many: enough work to pay for a hand-over.
constexpr std::int64_t kRowsPerTask = 16;

namespace ops {

template <class S>
void rms_norm(const at::Tensor& x_TD, const at::Tensor& w_D, double eps, const at::Tensor& y_TD) {
  const std::int64_t D = x_TD.size(1);
  at::parallel_for(0, x_TD.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().rms_norm(begin, end, D, data<S>(x_TD), data<S>(w_D), eps, data<S>(y_TD));
  });
}

/// dx = dres + (norm's gradient of dy); dx may be dres or dy, and dres undefined: nothing is added.
template <class S>
void rms_norm_backward(const at::Tensor& x_TD, const at::Tensor& w_D, const at::Tensor& dy_TD,
                       const at::Tensor& dres_TD, double eps, const at::Tensor& dx_TD) {
  const std::int64_t D = x_TD.size(1);
  at::parallel_for(0, x_TD.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().rms_norm_backward(begin, end, D, data<S>(x_TD), data<S>(w_D), data<S>(dy_TD),
                                   dres_TD.defined() ? data<S>(dres_TD) : nullptr, eps,
                                   data<S>(dx_TD));
  });
}

template <class S>
void swiglu(const at::Tensor& gate_up, const at::Tensor& m_TF) {
  const std::int64_t F = m_TF.size(1);
  at::parallel_for(0, m_TF.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().swiglu(begin, end, F, data<S>(gate_up), data<S>(m_TF));
  });
}

/// m_TF, if defined, becomes what swiglu gives.
template <class S>
void swiglu_backward(const at::Tensor& gate_up, const at::Tensor& dm_TF,
                     const at::Tensor& d_gate_up, const at::Tensor& m_TF = {}) {
  S* m = m_TF.defined() ? data<S>(m_TF) : nullptr;
  const std::int64_t F = dm_TF.size(1);
  at::parallel_for(0, dm_TF.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().swiglu_backward(begin, end, F, data<S>(gate_up), data<S>(dm_TF),
                                 data<S>(d_gate_up), m);
  });
}

/// out = x w, w row-major [K, N], where the level has few_rows; rows of all three any stride apart.
inline void few_rows(const at::Tensor& x, const at::Tensor& w, const at::Tensor& out) {
  const std::int64_t M = x.size(0), K = w.size(0), N = w.size(1);
  constexpr std::int64_t kColumns = 64, kWeights = 1 << 17;  // enough to pay for a hand-over
  const std::int64_t grain = std::max<std::int64_t>(1, kWeights / (kColumns * K));
  at::parallel_for(0, (N + kColumns - 1) / kColumns, grain,
                   [&](std::int64_t begin, std::int64_t end) {
                     kernels<Bf16>().few_rows(begin * kColumns, std::min(N, end * kColumns), M, K,
                                              data<Bf16>(x), x.stride(0), data<Bf16>(w),
                                              w.stride(0), data<Bf16>(out), out.stride(0));
                   });
}

/// Few enough rows for few_rows. Measured on two cores with AMX beside at::mm (bench_kernels): with
/// weights of 29 MB to 168 MB it is 1.4 to 2 times as fast at 16 to 64 rows, 1.2 to 1.5 times at
/// 128 to 512; with 2 MB, that stay in L2, 1.4 to 1.9 times up to 64 rows, 1.1 times at 128, 0.7 at
/// 256. With AVX512-BF16 alone, large weights: 1.0 to 1.3 times up to 64 rows, above the same
/// within 5 %.
inline bool few_enough_rows(std::int64_t rows, std::int64_t weights) {
  constexpr std::int64_t kBeyondL2 = 1 << 23;
  return rows <= (weights >= kBeyondL2 ? 512 : 128);
}

/// out = x w for w [K, N] of either orientation. Which of two products runs depends on shapes,
/// strides and the instruction-set level, not on where the weights came from.
inline void multiply(const at::Tensor& x, const at::Tensor& w, const at::Tensor& out) {
  if (x.scalar_type() == at::kBFloat16 && kernels<Bf16>().few_rows != nullptr &&
      few_enough_rows(x.size(0), w.numel()) && w.numel() > 0 && w.stride(1) == 1 &&
      x.stride(1) == 1 && out.stride(1) == 1) {
    few_rows(x, w, out);
    return;
  }
  at::Tensor to = out;
  at::mm_out(to, x, w);
}

/// y = x W^T, W as published [out, in].
inline void linear(const at::Tensor& x, const at::Tensor& w_OI, const at::Tensor& y) {
  at::Tensor out = y;
  at::mm_out(out, x, w_OI.t());
}
/// dx = dy W.
inline void linear_backward(const at::Tensor& dy, const at::Tensor& w_OI, const at::Tensor& dx) {
  multiply(dy, w_OI, dx);
}

template <class S>
void lora_down(const at::Tensor& x, const S* a_RD, std::int64_t R, double scale, S* xa,
               std::int64_t xa_stride) {
  at::parallel_for(0, x.size(0), 48, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().lora_down(begin, end, R, x.size(1), data<S>(x), x.stride(0), a_RD, xa, xa_stride,
                           scale);
  });
}

template <class S>
void lora_up(const S* xa, std::int64_t xa_stride, const S* b_RN, std::int64_t R, std::int64_t N,
             std::int64_t T, S* y, std::int64_t y_stride) {
  at::parallel_for(0, T, 48, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().lora_up(begin, end, R, N, xa, xa_stride, b_RN, y, y_stride);
  });
}

template <class S>
void lora_gradient(std::int64_t T, std::int64_t R, std::int64_t N, const S* u,
                   std::int64_t u_stride, const S* v, std::int64_t v_stride, AccumOf<S>* g_RN) {
  // Columns in whole cache lines; a range of them is one call, which lays u out once.
  constexpr std::int64_t kColumns = 32;
  at::parallel_for(0, (N + kColumns - 1) / kColumns, 6, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().lora_gradient(begin * kColumns, std::min(N, end * kColumns), T, R, N, u, u_stride,
                               v, v_stride, g_RN);
  });
}

template <class S>
void add(const at::Tensor& x, const at::Tensor& out) {
  at::parallel_for(0, x.numel(), 16384, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().add(begin, end, data<S>(x), data<S>(out));
  });
}

}  // namespace ops
}  // namespace tailor
