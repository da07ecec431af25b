#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tailor {

struct CudaDevice {
  std::string name;
  std::string compute_capability;  ///< "8.0"
  std::int64_t memory_bytes = 0, memory_free_bytes = 0;
  std::string problem;  ///< empty: a kernel of this build ran on it and gave the CPU's bits
};

/// What this build can do with GPUs and which there are. Training on them is not possible yet.
struct CudaFacts {
  bool compiled = false;
  std::string toolkit;        ///< "13.0"; empty where CUDA is not compiled in
  std::string architectures;  ///< "sm_80, sm_90"
  std::string problem;        ///< why no device could be asked; empty where there are some
  std::vector<CudaDevice> devices;
};

/// Asks driver and devices and runs a small kernel on each. Throws nothing: what fails is in the
/// answer. Takes no LibTorch, and without a driver no time.
CudaFacts cuda_facts();

}  // namespace tailor
