#include "trainer/cuda/kernels.h"
#include "trainer/cuda/launch.h"

namespace tailor::cuda {

void dequantise(const EncodedMatrix& matrix, const Nf4Tables& tables, Bf16Bits* out, void* stream) {
  if (matrix.format.kind == WeightKind::bf16) {
    const auto bytes = static_cast<std::size_t>(matrix.rows * matrix.columns) * sizeof(Bf16Bits);
    check(cudaMemcpyAsync(out, matrix.codes, bytes, cudaMemcpyDeviceToDevice,
                          static_cast<cudaStream_t>(stream)),
          "the copy of bf16 weights");
    return;
  }
  with_dequantise_body(matrix, tables, out,
                       [&](const auto& body) { launch(body, stream, "dequantise"); });
}

void cross_entropy(std::int64_t n, std::int64_t V, Bf16Bits* logits, const std::int32_t* target,
                   double gradient_scale, double* loss, std::int32_t* best, void* stream) {
  launch(CrossEntropy{n, V, logits, target, gradient_scale, loss, best}, stream, "cross_entropy");
}

void head_online(std::int64_t n, std::int64_t v, std::int64_t vocabulary_begin,
                 const Bf16Bits* logits, const std::int32_t* target, const HeadRows& rows,
                 void* stream) {
  TAILOR_CHECK(vocabulary_begin % kSegment == 0, "where a vocabulary tile begins");
  launch(HeadOnline{n, v, vocabulary_begin, logits, target, rows}, stream, "head_online");
}

void head_finish(std::int64_t n, const HeadRows& rows, double gradient_scale, double* loss,
                 float* weight, void* stream) {
  launch(HeadFinish{n, rows, gradient_scale, loss, weight}, stream, "head_finish");
}

void head_gradient(std::int64_t n, std::int64_t v, std::int64_t vocabulary_begin, Bf16Bits* logits,
                   const std::int32_t* target, const HeadRows& rows, const float* weight,
                   double gradient_scale, void* stream) {
  launch(
      HeadGradient{WordGrid(n, v), vocabulary_begin, logits, target, rows, weight, gradient_scale},
      stream, "head_gradient");
}

void permute(const Permutation& permutation, void* stream) {
  TAILOR_CHECK(permutation.E > 0 && permutation.E <= kExpertsMax, "number of experts");
  TAILOR_CHECK(permutation.slots() < std::int64_t{1} << 31U, "number of slots");
  launch(PermuteCount{permutation}, stream, "permute (count)");
  launch(PermuteChunks{permutation}, stream, "permute (chunks)");
  launch(PermuteExperts{permutation}, stream, "permute (experts)");
  launch(PermuteScatter{permutation}, stream, "permute (scatter)");
}

void swiglu(std::int64_t T, std::int64_t F, const Bf16Bits* gate_up, Bf16Bits* m, void* stream) {
  launch(Swiglu{WordGrid(T, F), F, gate_up, m}, stream, "swiglu");
}

void swiglu_backward(std::int64_t T, std::int64_t F, const Bf16Bits* gate_up, const Bf16Bits* dm,
                     Bf16Bits* d_gate_up, Bf16Bits* m, void* stream) {
  launch(SwigluBackward{WordGrid(T, F), F, gate_up, dm, d_gate_up, m}, stream, "swiglu_backward");
}

void gather_rows(std::int64_t rows, std::int64_t D, const Bf16Bits* x, const std::int32_t* token,
                 const float* scale, Bf16Bits* out, void* stream) {
  launch(GatherRows{WordGrid(rows, D), D, x, token, scale, out}, stream, "gather_rows");
}

void combine_rows(std::int64_t T, std::int64_t D, std::int64_t K, const Bf16Bits* y,
                  const std::int32_t* slot_of, const float* scale, Bf16Bits* out, void* stream) {
  launch(CombineRows{WordGrid(T, D), D, K, y, slot_of, scale, out}, stream, "combine_rows");
}

void gate_gradient(std::int64_t rows, std::int64_t D, const Bf16Bits* dxs, const Bf16Bits* x,
                   const std::int32_t* token, float* dot, void* stream) {
  launch(GateGradient{rows, D, dxs, x, token, dot}, stream, "gate_gradient");
}

}  // namespace tailor::cuda
