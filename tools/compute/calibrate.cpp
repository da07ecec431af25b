#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdio>

#include "base/clock.h"
#include "base/json.h"
#include "base/text.h"
#include "tools/compute/setup.h"
#include "tools/compute_verbs.h"

namespace tailor {
namespace {

/// Best of several rounds of [1024, 1024] x [1024, 2048], in GFLOP/s.
double gflops_of(at::ScalarType dtype) {
  constexpr std::int64_t M = 1024, N = 2048, K = 1024;
  const at::Tensor a = at::ones({M, K}, dtype), b = at::ones({N, K}, dtype);
  at::Tensor c = at::empty({M, N}, dtype);
  at::mm_out(c, a, b.t());
  double best = 0;
  for (int round = 0; round < 12; ++round) {
    const double began = seconds_now();
    at::mm_out(c, a, b.t());
    best = std::max(best, 2e-9 * static_cast<double>(M * N * K) / (seconds_now() - began));
  }
  return best;
}

}  // namespace

int run_calibrate(bool json) {
  // A training step reaches about this share of a bare matrix product on a CPU: norms, attention
  // and the thin LoRA products take the rest. An assumption until it is measured on quiet machines.
  constexpr double kStepShare = 0.6;
  const int threads = set_threads(0);
  const double bf16 = gflops_of(at::kBFloat16), f32 = gflops_of(at::kFloat);
  const Json out = {{"gflops_bfloat16", bf16 * kStepShare},
                    {"gflops_float32", f32 * kStepShare},
                    {"matmul_gflops_bfloat16", bf16},
                    {"matmul_gflops_float32", f32},
                    {"step_share", kStepShare},
                    {"threads", threads},
                    {"measured", utc_text(RealClock().unix_ms())}};
  make_folders(cache_folder());
  write_atomically(cache_folder() / "machine-calibration.json", out.dump(2) + "\n");
  if (json) {
    std::printf("%s\n", out.dump().c_str());
  } else {
    std::printf("matrix products with %d threads: bfloat16 %s GFLOP/s, float32 %s GFLOP/s\n",
                threads, number_text(bf16, 3).c_str(), number_text(f32, 3).c_str());
  }
  return 0;
}

}  // namespace tailor
