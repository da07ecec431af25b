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

}  // namespace tailor::cuda
