// Compiled in place of devices.cu where no CUDA toolkit was found.

#include "trainer/cuda/devices.h"

namespace tailor {

CudaFacts cuda_facts() {
  CudaFacts out;
  out.problem = "this build has no CUDA: no toolkit was found when it was configured";
  return out;
}

}  // namespace tailor
