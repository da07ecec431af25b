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

}  // namespace tailor::cuda
