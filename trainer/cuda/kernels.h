#pragma once

#include <cstdint>

#include "trainer/cuda/bodies/dequantise.h"

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

}  // namespace tailor::cuda
