#pragma once

#include <cstdint>

#include "trainer/cuda/bodies/cross_entropy.h"
#include "trainer/cuda/bodies/dequantise.h"
#include "trainer/cuda/bodies/permute.h"
#include "trainer/cuda/bodies/rows.h"

/// Tailor's GPU kernels. Pointers are of the calling thread's current device and aligned to 16
/// bytes, sizes in numbers unless they say bytes, bfloat16 as Bf16Bits; `stream` is a cudaStream_t
/// (Stream::native()), null the default one. Each function enqueues and returns; it throws
/// Error{device} with CUDA's own text where the launch fails or an earlier one had. Arithmetic is
/// in float, rounded to nearest even when it is written. Bits depend on the arguments alone: no
/// float is added atomically and every sum has a fixed order. No kernel needs scratch that is not
/// in its arguments.
namespace tailor::cuda {

/// out [rows, columns] = the matrix in bfloat16, as its codec in data/quant gives it. `tables` is
/// only read for nf4.
void dequantise(const EncodedMatrix& matrix, const Nf4Tables& tables, Bf16Bits* out, void* stream);

/// Softmax cross-entropy over rows of logits [n, V], as trainer/kernels/kernels.h has it: loss [n]
/// = lse - logit[target] with 0 <= target < V, best [n] = arg max (lowest index on ties). With
/// gradient_scale != 0, logits become their gradient.
void cross_entropy(std::int64_t n, std::int64_t V, Bf16Bits* logits, const std::int32_t* target,
                   double gradient_scale, double* loss, std::int32_t* best, void* stream);

/// The same with a head that comes in vocabulary tiles, to the bit: for each tile in order its
/// logits [n, v] (columns vocabulary_begin .. + v) to head_online; then head_finish; then for
/// each tile, in any order, its logits once more to head_gradient. Tiles begin at multiples of
/// kSegment and none but the last ends elsewhere. `rows` and weight [n] pass from one to the next.
void head_online(std::int64_t n, std::int64_t v, std::int64_t vocabulary_begin,
                 const Bf16Bits* logits, const std::int32_t* target, const HeadRows& rows,
                 void* stream);
void head_finish(std::int64_t n, const HeadRows& rows, double gradient_scale, double* loss,
                 float* weight, void* stream);
void head_gradient(std::int64_t n, std::int64_t v, std::int64_t vocabulary_begin, Bf16Bits* logits,
                   const std::int32_t* target, const HeadRows& rows, const float* weight,
                   double gradient_scale, void* stream);

/// From the experts of the tokens' slots: the rows sorted by expert, as Router::finish() has them.
/// Up to kExpertsMax experts and 2^31 - 1 slots.
void permute(const Permutation& permutation, void* stream);

// As in trainer/kernels/kernels.h, over all rows.

/// m [T, F] = silu(gate) * up; gate_up [T, 2F].
void swiglu(std::int64_t T, std::int64_t F, const Bf16Bits* gate_up, Bf16Bits* m, void* stream);
/// d_gate_up [T, 2F] from dm [T, F]; and m to swiglu's bits, unless null. d_gate_up may be gate_up,
/// m may be dm.
void swiglu_backward(std::int64_t T, std::int64_t F, const Bf16Bits* gate_up, const Bf16Bits* dm,
                     Bf16Bits* d_gate_up, Bf16Bits* m, void* stream);
/// out[row] = scale[row] * x[token[row]] (scale may be null), out [rows, D].
void gather_rows(std::int64_t rows, std::int64_t D, const Bf16Bits* x, const std::int32_t* token,
                 const float* scale, Bf16Bits* out, void* stream);
/// out[t] += sum over k in order of scale[slot] * y[slot], slot = slot_of[t * K + k], out [T, D];
/// scale [rows] may be null.
void combine_rows(std::int64_t T, std::int64_t D, std::int64_t K, const Bf16Bits* y,
                  const std::int32_t* slot_of, const float* scale, Bf16Bits* out, void* stream);
/// dot[row] = <dxs[row], x[token[row]]>, dxs [rows, D].
void gate_gradient(std::int64_t rows, std::int64_t D, const Bf16Bits* dxs, const Bf16Bits* x,
                   const std::int32_t* token, float* dot, void* stream);

}  // namespace tailor::cuda
