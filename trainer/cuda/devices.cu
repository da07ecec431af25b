#include <cuda_runtime.h>

#include "trainer/cuda/devices.h"
#include "trainer/cuda/self_check.h"

namespace tailor {
namespace {

constexpr std::uint32_t kNumbers = 1003;  // not a multiple of the block: the ragged end is met
constexpr unsigned kThreads = 128;
constexpr unsigned kBlocks = (kNumbers + kThreads - 1) / kThreads;

__global__ void self_check_kernel(std::uint32_t count, std::uint32_t* out) {
  self_check_body(blockIdx.x, threadIdx.x, blockDim.x, count, out);
}

std::string text_of(cudaError_t error) { return cudaGetErrorString(error); }

/// Device memory that is given back whatever happens.
struct DeviceNumbers {
  std::uint32_t* data = nullptr;
  ~DeviceNumbers() { cudaFree(data); }
};

/// Empty, or why the kernels of this build do not run on the current device.
std::string self_check() {
  DeviceNumbers numbers;
  std::vector<std::uint32_t> got(kNumbers), want(kNumbers);
  cudaError_t error = cudaMalloc(&numbers.data, kNumbers * sizeof(std::uint32_t));
  if (error != cudaSuccess) return "no memory: " + text_of(error);
  self_check_kernel<<<kBlocks, kThreads>>>(kNumbers, numbers.data);
  error = cudaGetLastError();  // of the launch: no code for this card in the build, say
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error == cudaSuccess) {
    error = cudaMemcpy(got.data(), numbers.data, kNumbers * sizeof(std::uint32_t),
                       cudaMemcpyDeviceToHost);
  }
  if (error != cudaSuccess) return "a kernel of this build does not run: " + text_of(error);
  for (unsigned block = 0; block < kBlocks; ++block) {
    for (unsigned thread = 0; thread < kThreads; ++thread) {
      self_check_body(block, thread, kThreads, kNumbers, want.data());
    }
  }
  return got == want ? "" : "a kernel gave other bits than the CPU";
}

CudaDevice device_facts(int index) {
  CudaDevice out;
  cudaDeviceProp properties{};
  cudaError_t error = cudaGetDeviceProperties(&properties, index);
  if (error == cudaSuccess) {
    out.name = properties.name;
    out.compute_capability =
        std::to_string(properties.major) + "." + std::to_string(properties.minor);
    out.memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
    error = cudaSetDevice(index);
  }
  std::size_t free = 0, total = 0;
  if (error == cudaSuccess) error = cudaMemGetInfo(&free, &total);
  out.memory_free_bytes = static_cast<std::int64_t>(free);
  out.problem = error == cudaSuccess ? self_check() : text_of(error);
  cudaGetLastError();  // an error that stays behind would be reported by the next launch
  return out;
}

}  // namespace

CudaFacts cuda_facts() {
  CudaFacts out;
  out.compiled = true;
  out.toolkit =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  out.architectures = TAILOR_CUDA_ARCHITECTURES;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    int driver = 0;  // stays 0 where there is none
    cudaDriverGetVersion(&driver);
    out.problem = driver == 0 ? "no NVIDIA driver is loaded" : text_of(error);
  }
  for (int i = 0; i < count; ++i) out.devices.push_back(device_facts(i));
  return out;
}

}  // namespace tailor
