#pragma once

// For the .cu files alone: how a body (bodies/words.h) becomes a kernel.

#include "trainer/cuda/bodies/words.h"
#include "trainer/cuda/check.h"

namespace tailor::cuda {

template <class Body>
__global__ void __launch_bounds__(Body::kThreads) run_body(const Body body) {
  const Place at{blockIdx.x, threadIdx.x, blockDim.x};
  if constexpr (Phased<Body>) {
    __shared__ typename Body::Shared shared;
    typename Body::State state;
    const int phases = body.phases(at.threads);
    for (int phase = 0; phase < phases; ++phase) {
      if (phase > 0) __syncthreads();
      body.run(phase, at, state, shared);
    }
  } else {
    body.run(at);
  }
}

template <class Body>
void launch(const Body& body, void* stream, const char* name) {
  const std::int64_t blocks = body.blocks(Body::kThreads);
  if (blocks == 0) return;
  TAILOR_CHECK(blocks < std::int64_t{1} << 31U, "blocks of a kernel");
  run_body<<<static_cast<unsigned>(blocks), Body::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      body);
  check(cudaGetLastError(), std::string("the launch of ") + name);
}

}  // namespace tailor::cuda
