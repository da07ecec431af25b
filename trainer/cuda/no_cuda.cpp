// Compiled in place of the .cu files where no CUDA toolkit was found.

#include "trainer/cuda/device.h"
#include "trainer/cuda/devices.h"
#include "trainer/cuda/kernels.h"

namespace tailor {
namespace {

[[noreturn]] void no_cuda(const char* doing) {
  throw Error(Fault::device,
              {std::string(doing) + " needs a GPU, and this program was built without CUDA", "",
               "Build on a machine with the CUDA toolkit: put nvcc on PATH or set CUDA_HOME, then "
               "configure again with -DTAILOR_CUDA=ON."});
}

}  // namespace

CudaFacts cuda_facts() {
  CudaFacts out;
  out.problem = "this build has no CUDA: no toolkit was found when it was configured";
  return out;
}

std::unique_ptr<Device> make_cuda_device(int index) {
  no_cuda(("device cuda:" + std::to_string(index)).c_str());
}

namespace cuda {

void dequantise(const EncodedMatrix&, const Nf4Tables&, Bf16Bits*, void*) { no_cuda("dequantise"); }

void cross_entropy(std::int64_t, std::int64_t, Bf16Bits*, const std::int32_t*, double, double*,
                   std::int32_t*, void*) {
  no_cuda("cross_entropy");
}

void head_online(std::int64_t, std::int64_t, std::int64_t, const Bf16Bits*, const std::int32_t*,
                 const HeadRows&, void*) {
  no_cuda("head_online");
}

void head_finish(std::int64_t, const HeadRows&, double, double*, float*, void*) {
  no_cuda("head_finish");
}

void head_gradient(std::int64_t, std::int64_t, std::int64_t, Bf16Bits*, const std::int32_t*,
                   const HeadRows&, const float*, double, void*) {
  no_cuda("head_gradient");
}

void permute(const Permutation&, void*) { no_cuda("permute"); }

void swiglu(std::int64_t, std::int64_t, const Bf16Bits*, Bf16Bits*, void*) { no_cuda("swiglu"); }

void swiglu_backward(std::int64_t, std::int64_t, const Bf16Bits*, const Bf16Bits*, Bf16Bits*,
                     Bf16Bits*, void*) {
  no_cuda("swiglu_backward");
}

void gather_rows(std::int64_t, std::int64_t, const Bf16Bits*, const std::int32_t*, const float*,
                 Bf16Bits*, void*) {
  no_cuda("gather_rows");
}

void combine_rows(std::int64_t, std::int64_t, std::int64_t, const Bf16Bits*, const std::int32_t*,
                  const float*, Bf16Bits*, void*) {
  no_cuda("combine_rows");
}

void gate_gradient(std::int64_t, std::int64_t, const Bf16Bits*, const Bf16Bits*,
                   const std::int32_t*, float*, void*) {
  no_cuda("gate_gradient");
}

}  // namespace cuda
}  // namespace tailor
