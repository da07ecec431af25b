#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>

#include "data/quant/format.h"
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

/// body(begin, end) over ranges of `outputs`, each of `weights` weights, in multiples of 256.
template <class Body>
void split_few_rows(std::int64_t outputs, std::int64_t weights, const Body& body) {
  constexpr std::int64_t kOutputs = 256, kWeights = 1 << 17;  // enough to pay for a hand-over
  const std::int64_t grain =
      std::max<std::int64_t>(1, kWeights / std::max<std::int64_t>(1, kOutputs * weights));
  at::parallel_for(0, (outputs + kOutputs - 1) / kOutputs, grain,
                   [&](std::int64_t begin, std::int64_t end) {
                     body(begin * kOutputs, std::min(outputs, end * kOutputs));
                   });
}

/// out = x w, w row-major [K, N], where the level has few_rows; rows of all three any stride apart.
inline void few_rows(const at::Tensor& x, const at::Tensor& w, const at::Tensor& out) {
  const std::int64_t K = w.size(0), N = w.size(1);
  split_few_rows(N, K, [&](std::int64_t begin, std::int64_t end) {
    kernels<Bf16>().few_rows(begin, end, x.size(0), K, data<Bf16>(x), x.stride(0), data<Bf16>(w),
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

/// out = x w^T, w row-major [N, K], where the level has few_rows_t.
inline void few_rows_t(const at::Tensor& x, const at::Tensor& w, const at::Tensor& out) {
  split_few_rows(w.size(0), w.size(1), [&](std::int64_t begin, std::int64_t end) {
    kernels<Bf16>().few_rows_t(begin, end, x.size(0), w.size(1), data<Bf16>(x), x.stride(0),
                               data<Bf16>(w), w.stride(0), data<Bf16>(out), out.stride(0));
  });
}

/// Few enough rows for few_rows_t, which has x laid out anew beside each core and reads it once for
/// every 32 rows of w: it must stay in L2.
inline bool few_enough_rows_t(std::int64_t rows, std::int64_t K) {
  constexpr std::int64_t kOfX = 1 << 19;
  return rows * K <= kOfX;
}

/// out = x w for w [K, N] of either orientation. Which of two products runs depends on shapes,
/// strides and the instruction-set level, not on where the weights came from.
inline void multiply(const at::Tensor& x, const at::Tensor& w, const at::Tensor& out) {
  if (x.scalar_type() == at::kBFloat16 && kernels<Bf16>().few_rows != nullptr && w.numel() > 0 &&
      x.stride(1) == 1 && out.stride(1) == 1) {
    if (w.stride(1) == 1 && few_enough_rows(x.size(0), w.numel())) return few_rows(x, w, out);
    if (w.stride(0) == 1 && w.stride(1) > 1 && few_enough_rows_t(x.size(0), w.size(0))) {
      return few_rows_t(x, w.t(), out);
    }
  }
  at::Tensor to = out;
  at::mm_out(to, x, w);
}

/// Whether products with `rows` rows of a bfloat16 x and with matrices of this form [rows, columns]
/// may be made without decoding them: then both of them give the bits of multiply() on what they
/// decode to.
inline bool multiplies_stored(const EncodedMatrix& w, std::int64_t all_rows, std::int64_t rows) {
  const bool coded = w.format.kind == WeightKind::int4 || w.format.kind == WeightKind::nf4 ||
                     w.format.kind == WeightKind::fp8;
  const bool whole = w.rows % 64 == 0 && w.columns % 128 == 0 &&
                     (w.format.kind != WeightKind::int4 || 128 % w.format.group == 0) &&
                     (w.format.block_columns == 0 || 128 % w.format.block_columns == 0);
  return coded && whole && kernels<Bf16>().few_rows_stored != nullptr &&
         few_enough_rows(rows, all_rows * w.columns) && few_enough_rows_t(rows, w.columns);
}

/// A frozen matrix of a product: decoded, or as it is stored where that is faster.
struct ProductWeights {
  at::Tensor w_KN;                        ///< any strides; undefined: as stored
  std::array<EncodedMatrix, 2> stored{};  ///< rows of w_KN^T, one matrix below the other
  std::int64_t stored_count = 0;

  StoredParts parts() const { return {stored.data(), stored_count}; }
};

/// out = x w.
inline void multiply(const at::Tensor& x, const ProductWeights& w, const at::Tensor& out) {
  if (w.w_KN.defined()) return multiply(x, w.w_KN, out);
  split_few_rows(w.parts().rows(), w.stored[0].columns, [&](std::int64_t begin, std::int64_t end) {
    kernels<Bf16>().few_rows_t_stored(begin, end, x.size(0), data<Bf16>(x), x.stride(0), w.parts(),
                                      data<Bf16>(out), out.stride(0));
  });
}
/// out = x w^T.
inline void multiply_t(const at::Tensor& x, const ProductWeights& w, const at::Tensor& out) {
  if (w.w_KN.defined()) return multiply(x, w.w_KN.t(), out);
  split_few_rows(w.stored[0].columns, w.parts().rows(), [&](std::int64_t begin, std::int64_t end) {
    kernels<Bf16>().few_rows_stored(begin, end, x.size(0), data<Bf16>(x), x.stride(0), w.parts(),
                                    data<Bf16>(out), out.stride(0));
  });
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
