// The product of few rows against at::mm of the same numbers, both split over LibTorch's threads:
// the backward products of routed experts of Llama 4 Maverick and DeepSeek-R1. The two take turns
// over copies of the weights, 400 MB of the large ones; each one's best call counts. Seconds
// are those the process had a core for, over the threads, so that other work disturbs little:
// run it with GOMP_SPINCOUNT=0, else waiting counts.

#include "tests/bench/few_rows_bench.h"

#include <cstdio>

#include "base/processor_time.h"
#include "trainer/ops.h"

namespace tailor {
namespace {

struct Shape {
  const char* name;
  std::int64_t K, N;
};

/// An INT4 matrix of random codes: what is multiplied does not change the time.
struct StoredMatrix {
  at::Tensor codes, scales;
  EncodedMatrix matrix;
  StoredMatrix(std::int64_t rows, std::int64_t columns)
      : codes(at::randint(0, 256, {rows * columns / 2}).to(at::kByte)),
        scales(at::rand({rows * columns / 128}).to(at::kBFloat16)),
        matrix{WeightFormat::int4(128), rows, columns,
               static_cast<const std::byte*>(codes.data_ptr()),
               static_cast<const std::byte*>(scales.data_ptr())} {}
};

void decode_all(const EncodedMatrix& from, const at::Tensor& to) {
  at::parallel_for(0, from.rows, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<Bf16>().dequantise(begin, end, from, data<Bf16>(to) + begin * from.columns,
                               from.columns);
  });
}

double wall_seconds() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// Both products of an expert's matrix from INT4: decoded whole and multiplied by at::mm, against
/// multiplied block by block as it is decoded.
void report_stored() {
  std::printf(
      "\nINT4 weights, decoded + at::mm against ours (ms)\n%-20s %5s %9s %9s %8s %9s %9s %8s\n", "",
      "M", "x W^T", "ours", "ratio", "dy W", "ours", "ratio");
  for (const auto& [name, rows, columns] :
       {Shape{"Maverick gate_up", 16384, 5120}, Shape{"Maverick down", 5120, 8192},
        Shape{"R1 gate_up", 4096, 7168}, Shape{"R1 down", 7168, 2048}}) {
    std::vector<StoredMatrix> w;
    for (std::int64_t bytes = 0; bytes < 200'000'000; bytes += rows * columns / 2) {
      w.emplace_back(rows, columns);
    }
    const at::Tensor decoded = at::empty({rows, columns}, at::kBFloat16);
    for (const std::int64_t M : {16, 32, 64, 96}) {
      const at::Tensor x = at::randn({M, columns}).to(at::kBFloat16);
      const at::Tensor dy = at::randn({M, rows}).to(at::kBFloat16);
      at::Tensor y = at::empty({M, rows}, at::kBFloat16),
                 dx = at::empty({M, columns}, at::kBFloat16);
      double best[4] = {1e9, 1e9, 1e9, 1e9};
      std::size_t next = 0;
      for (int round = -1; round < 10; ++round) {
        for (const int which : {0, 1, 2, 3}) {
          ops::ProductWeights stored;
          stored.stored[0] = w[next++ % w.size()].matrix;
          stored.stored_count = 1;
          const double begin = wall_seconds();
          if (which == 0 || which == 2) decode_all(stored.stored[0], decoded);
          if (which == 0) at::mm_out(y, x, decoded.t());
          if (which == 1) ops::multiply(x, stored, y);
          if (which == 2) at::mm_out(dx, dy, decoded);
          if (which == 3) ops::multiply_t(dy, stored, dx);
          if (round >= 0) best[which] = std::min(best[which], wall_seconds() - begin);
        }
      }
      std::printf("%-20s %5lld %9.3f %9.3f %8.2f %9.3f %9.3f %8.2f\n", name,
                  static_cast<long long>(M), 1e3 * best[0], 1e3 * best[1], best[0] / best[1],
                  1e3 * best[2], 1e3 * best[3], best[2] / best[3]);
    }
  }
}

}  // namespace

void report_few_rows() {
  if (kernels<Bf16>().few_rows == nullptr) return;
  report_stored();
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
          const double begin = processor_seconds();
          if (which == 0) {
            at::mm_out(theirs, x, weights);
          } else {
            ops::few_rows(x, weights, ours);
          }
          if (round >= 0) best[which] = std::min(best[which], processor_seconds() - begin);
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
