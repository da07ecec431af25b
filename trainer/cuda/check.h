#pragma once

// For the .cu files alone.

#include <cuda_runtime.h>

#include <string>

#include "base/error.h"

namespace tailor::cuda {

/// Throws Error{device} unless `error` is success. CUDA keeps its last error until somebody takes
/// it, and the next launch would report it as its own: it is taken here.
inline void check(cudaError_t error, const std::string& doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw Error(
      Fault::device,
      {doing + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")", "",
       "Run `tailor doctor` to see what the device and its driver say."});
}

}  // namespace tailor::cuda
