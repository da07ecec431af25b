// The product of few rows against at::mm of the same numbers, both split over LibTorch's threads:
// the backward products of routed experts of Llama 4 Maverick and DeepSeek-R1. The two take turns
// over copies of the weights, 400 MB of the large ones; each one's best call counts. Seconds
// are those the process had a core for, over the threads, so that other work disturbs little:
// run it with GOMP_SPINCOUNT=0, else waiting counts.

#include "tests/bench/few_rows_bench.h"

#include <cstdio>
#include <ctime>

#include "trainer/ops.h"

namespace tailor {
namespace {

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct Shape {
  const char* name;
  std::int64_t K, N;
};

}  // namespace

void report_few_rows() {
  if (kernels<Bf16>().few_rows == nullptr) return;
  const int threads = at::get_num_threads();
  std::printf("\nbfloat16 x[M, K] w[K, N] on %d threads\n%-20s %6s %6s %5s %9s %9s %8s\n", threads,
              "", "K", "N", "M", "at::mm ms", "ours ms", "ratio");
  for (const auto& [name, K, N] :
       {Shape{"Maverick gate_up", 16384, 5120}, Shape{"Maverick down", 5120, 8192},
        Shape{"R1 gate_up", 4096, 7168}, Shape{"R1 down", 7168, 2048},
        Shape{"small gate_up", 3072, 576}, Shape{"small down", 576, 1536}}) {
    std::vector<at::Tensor> w;
    const std::int64_t copies_bytes = std::min<std::int64_t>(400'000'000, 16 * K * N);
    for (std::int64_t bytes = 0; bytes < copies_bytes; bytes += 2 * K * N) {
      w.push_back(at::randn({K, N}).to(at::kBFloat16));
    }
    for (const std::int64_t M : {16, 32, 64, 128, 256, 512}) {
      const at::Tensor x = at::randn({M, K}).to(at::kBFloat16);
      at::Tensor theirs = at::empty({M, N}, at::kBFloat16), ours = at::empty_like(theirs);
      double best[2] = {1e9, 1e9};
      const int rounds = K * N < 10'000'000 ? 100 : M > 128 ? 6 : 12;
      for (int round = -1; round < rounds; ++round) {
        for (const int which : {0, 1}) {
          const at::Tensor& weights = w[static_cast<std::size_t>(2 * round + 2 + which) % w.size()];
          const double begin = cpu_seconds();
          if (which == 0) {
            at::mm_out(theirs, x, weights);
          } else {
            ops::few_rows(x, weights, ours);
          }
          if (round >= 0) best[which] = std::min(best[which], cpu_seconds() - begin);
        }
      }
      std::printf("%-20s %6lld %6lld %5lld %9.3f %9.3f %8.2f%s\n", name, static_cast<long long>(K),
                  static_cast<long long>(N), static_cast<long long>(M), 1e3 * best[0] / threads,
                  1e3 * best[1] / threads, best[0] / best[1],
                  at::equal(theirs, ours) ? "  same bits" : "");
    }
  }
}

}  // namespace tailor
