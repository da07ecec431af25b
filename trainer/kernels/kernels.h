#pragma once

#include <cmath>
#include <cstdint>

#include "data/quant/format.h"

namespace tailor {

/// The CPU kernels: raw pointers and sizes only, no ATen, no threads. Each works on a range of rows
/// or tasks; the wrappers in trainer/ops.h split that range over threads. Every row is computed the
/// same way whichever range it falls in, so results do not depend on the number of threads.
///
/// S is how numbers are stored: double, float or Bf16. Arithmetic is in AccumOf<S>: double for
/// double, else float, and a result is rounded to S once, when it is written.
///
/// The files in cpu/ are compiled four times, for x86-64-v4 (AVX-512) with and without AVX512-BF16,
/// v3 (AVX2) and plain x86-64; a fifth level, AMX, is the first with another few_rows.
/// kernels<S>() picks the best this machine has. Plain loops that serve as the truth stand in
/// tests/support/reference_kernels.h.
struct Bf16 {
  std::uint16_t bits;
};

template <class S>
struct AccumType {
  using type = float;
};
template <>
struct AccumType<double> {
  using type = double;
};
template <class S>
using AccumOf = typename AccumType<S>::type;

/// Queries and keys that see each other: query i of the segment sees keys 0 .. i + keys - queries
/// (causal, aligned at the end). A packed row is one segment a document; chunked attention cuts
/// documents into further segments. While training, queries == keys.
struct AttentionSegment {
  std::int64_t query_begin;  ///< first token in q, o, lse
  std::int64_t queries;
  std::int64_t key_begin;  ///< first token in k, v
  std::int64_t keys;
};

/// Where heads lie in memory. Strides are in elements between consecutive tokens.
struct AttentionShape {
  std::int64_t heads, kv_heads;
  std::int64_t head_dim;   ///< of queries and keys
  std::int64_t value_dim;  ///< of values and results
  std::int64_t q_stride, k_stride, v_stride, o_stride;
  std::int64_t v_head;  ///< elements between a token's value heads; the others lie close
  double scale;         ///< on q k^T
};

/// What happens to q and k between projection and attention: rotary embedding, then the weight-less
/// RMS norm of Llama 4 Scout, then Llama 4's temperature on layers without rotary embedding.
struct QkShape {
  std::int64_t heads;  ///< query and key heads together, side by side from the row's start
  std::int64_t query_heads;
  std::int64_t head_dim;
  std::int64_t stride;  ///< elements between tokens
  bool rotate;
  bool pairs;  ///< rotate (2i, 2i+1) as Llama 4 does; else (i, i + head_dim/2)
  bool norm;
  double eps;
};

/// Stored matrices (data/quant/format.h: fp8, int4 or nf4) of one number of columns, one below the
/// other. `first` belongs to the caller.
struct StoredParts {
  const EncodedMatrix* first;
  std::int64_t count;

  std::int64_t rows() const {
    std::int64_t all = 0;
    for (std::int64_t i = 0; i < count; ++i) all += first[i].rows;
    return all;
  }
};

/// What is known of a row's softmax after some runs of its classes.
template <class A>
struct SoftmaxRow {
  A top = 0;              ///< largest logit
  double sum = 0;         ///< of exp(logit - top)
  A target_logit = 0;     ///< once its run was seen
  std::int32_t best = 0;  ///< class of the largest logit, the lowest on ties

  double loss() const {
    return std::log(sum) + static_cast<double>(top) - static_cast<double>(target_logit);
  }
};

template <class S>
struct Kernels {
  using A = AccumOf<S>;

  /// y = w * x / sqrt(mean(x^2) + eps), rows [begin, end) of [T, D].
  void (*rms_norm)(std::int64_t begin, std::int64_t end, std::int64_t D, const S* x, const S* w,
                   double eps, S* y);
  /// dx = dres + d(rms_norm)/dx^T dy. dx may be dres; without one (null) nothing is added.
  void (*rms_norm_backward)(std::int64_t begin, std::int64_t end, std::int64_t D, const S* x,
                            const S* w, const S* dy, const S* dres, double eps, S* dx);

  /// In place on rows of q and k. cos, sin: [positions, head_dim/2]; position: [T];
  /// q_scale [T] or null (temperature); rstd [T, heads] is written when norm is set.
  void (*qk_prepare)(std::int64_t begin, std::int64_t end, const QkShape& shape, S* qk,
                     const std::int32_t* position, const A* cos, const A* sin, const A* q_scale,
                     A* rstd);
  /// Its transpose, in place on the gradients; qk holds the forward's output.
  void (*qk_prepare_backward)(std::int64_t begin, std::int64_t end, const QkShape& shape,
                              const S* qk, S* dqk, const std::int32_t* position, const A* cos,
                              const A* sin, const A* q_scale, const A* rstd);

  /// Softmax attention, one task per (segment, kv head): task = segment * kv_heads + kv_head.
  /// o [T, heads * head_dim]; lse [T, heads] natural-log sum of exponentials (may be null).
  void (*attention)(std::int64_t task_begin, std::int64_t task_end,
                    const AttentionSegment* segments, const AttentionShape& shape, const S* q,
                    const S* k, const S* v, S* o, A* lse);
  /// dq, dk, dv have the strides of q, k, v and are overwritten. Needs queries == keys.
  void (*attention_backward)(std::int64_t task_begin, std::int64_t task_end,
                             const AttentionSegment* segments, const AttentionShape& shape,
                             const S* q, const S* k, const S* v, const S* o, const A* lse,
                             const S* d_o, S* dq, S* dk, S* dv);

  /// m = silu(gate) * up; gate_up [T, 2F] holds gate then up; m [T, F].
  void (*swiglu)(std::int64_t begin, std::int64_t end, std::int64_t F, const S* gate_up, S* m);
  /// d_gate_up [T, 2F] from dm [T, F]; and m as swiglu gives it, to the bit, unless null.
  void (*swiglu_backward)(std::int64_t begin, std::int64_t end, std::int64_t F, const S* gate_up,
                          const S* dm, S* d_gate_up, S* m);

  /// y[M, N] = x[M, K] w[K, N] for columns [begin, end) of N and few rows M: w, row-major, is read
  /// as it lies, once. Sums are float, in one order over k, and do not depend on `begin` and `end`;
  /// denormals count as zero. Null where the level cannot multiply S.
  void (*few_rows)(std::int64_t begin, std::int64_t end, std::int64_t M, std::int64_t K, const S* x,
                   std::int64_t x_stride, const S* w, std::int64_t w_stride, S* y,
                   std::int64_t y_stride);

  /// The same, to the bit, for w as it is stored: each matrix of a multiple of 64 rows, and of 128
  /// columns; `begin` a multiple of 128.
  void (*few_rows_stored)(std::int64_t begin, std::int64_t end, std::int64_t M, const S* x,
                          std::int64_t x_stride, const StoredParts& w, S* y, std::int64_t y_stride);
  /// y[M, N] = x[M, K] w[N, K]^T for rows [begin, end) of w, which are read once; else as few_rows.
  void (*few_rows_t)(std::int64_t begin, std::int64_t end, std::int64_t M, std::int64_t K,
                     const S* x, std::int64_t x_stride, const S* w, std::int64_t w_stride, S* y,
                     std::int64_t y_stride);
  /// The same, to the bit, for w as it is stored, rows and `begin` multiples of 64.
  void (*few_rows_t_stored)(std::int64_t begin, std::int64_t end, std::int64_t M, const S* x,
                            std::int64_t x_stride, const StoredParts& w, S* y,
                            std::int64_t y_stride);

  /// LoRA's three thin products, r small. xa[T, R] = x[T, D] a[R, D]^T.
  void (*lora_down)(std::int64_t begin, std::int64_t end, std::int64_t R, std::int64_t D,
                    const S* x, std::int64_t x_stride, const S* a, S* xa, std::int64_t xa_stride,
                    double scale);
  /// y[T, N] += xa[T, R] b[R, N].
  void (*lora_up)(std::int64_t begin, std::int64_t end, std::int64_t R, std::int64_t N, const S* xa,
                  std::int64_t xa_stride, const S* b, S* y, std::int64_t y_stride);
  /// g[R, N] += u[T, R]^T v[T, N] for columns [begin, end) of N; sums over t in order.
  void (*lora_gradient)(std::int64_t begin, std::int64_t end, std::int64_t T, std::int64_t R,
                        std::int64_t N, const S* u, std::int64_t u_stride, const S* v,
                        std::int64_t v_stride, A* g);

  /// out[row] = scale[row] * x[token[row]] (scale may be null).
  void (*gather_rows)(std::int64_t begin, std::int64_t end, std::int64_t D, const S* x,
                      const std::int32_t* token, const A* scale, S* out);
  /// out[t] += sum over k in order of scale[slot] * y[slot], slot = slot_of[t * K + k].
  /// scale [rows] in slot order, may be null.
  void (*combine_rows)(std::int64_t begin, std::int64_t end, std::int64_t D, std::int64_t K,
                       const S* y, const std::int32_t* slot_of, const A* scale, S* out);
  /// dot[row] = <dxs[row], x[token[row]]>, the gradient of the gate that scales an expert's input.
  void (*gate_gradient)(std::int64_t begin, std::int64_t end, std::int64_t D, const S* dxs,
                        const S* x, const std::int32_t* token, A* dot);

  /// Softmax cross-entropy of rows of logits that come in runs of classes: logits [n, V] are those
  /// of classes [first, first + V). The run from class 0 begins a row's state, the others go on.
  void (*softmax_run)(std::int64_t begin, std::int64_t end, std::int64_t V, std::int64_t first,
                      const S* logits, const std::int32_t* target, SoftmaxRow<A>* rows);
  /// The same, to the bit, and turns the run's logits into exp(logit - top), the target's into 0:
  /// what their classes' vectors weigh in the gradient, before it is divided by the sum. What was
  /// weighed in earlier runs counts `rescale[row]` as much from here on.
  void (*softmax_weights)(std::int64_t begin, std::int64_t end, std::int64_t V, std::int64_t first,
                          S* logits, const std::int32_t* target, SoftmaxRow<A>* rows, A* rescale);
  /// sum[row] = sum[row] * rescale[row] + part[row], rows [begin, end) of [n, D].
  void (*softmax_sum)(std::int64_t begin, std::int64_t end, std::int64_t D, const S* part,
                      const A* rescale, A* sum);
  /// After all runs: the gradient of the losses times gradient_scale by what the logits are linear
  /// in, out = (sum / state.sum + (p - 1) * target) * gradient_scale, p the target's probability
  /// and `target` [n, D] its class's vectors. out may be `target`.
  void (*softmax_gradient)(std::int64_t begin, std::int64_t end, std::int64_t D, const A* sum,
                           const S* target, double gradient_scale, const SoftmaxRow<A>* rows,
                           S* out);

  /// out = x * keep / (1 - p), keep from Philox of (key, token id, feature).
  void (*dropout)(std::int64_t begin, std::int64_t end, std::int64_t D, const S* x,
                  std::int64_t x_stride, double probability, std::uint64_t key,
                  const std::uint64_t* token_id, S* out, std::int64_t out_stride);
  /// out += x
  void (*add)(std::int64_t begin, std::int64_t end, const S* x, S* out);

  /// Rows [row_begin, row_end) of a frozen matrix in any format of data/quant/format.h, rows of
  /// `out` [row_end - row_begin, columns] out_stride apart: the bits of decode_rows (float; widened
  /// for double) or decode_rows_bf16, which are the truth.
  void (*dequantise)(std::int64_t row_begin, std::int64_t row_end, const EncodedMatrix& matrix,
                     S* out, std::int64_t out_stride);
};

template <class S>
const Kernels<S>& kernels();

/// "x86-64-v4+amx", "x86-64-v4+bf16", "x86-64-v4", "x86-64-v3" or "x86-64": what kernels() chose.
const char* kernel_level();

}  // namespace tailor
