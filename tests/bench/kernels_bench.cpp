// What the kernels of a training step reach on one thread, in bfloat16, at every instruction-set
// level of this machine: the best of several repetitions, so that other work on the machine
// disturbs little. The levels of a kernel run next to each other and the ratio is of one run.
// Then dequantisation into a bfloat16 buffer that no cache holds, on one and two threads, beside
// filling that buffer in the same run; and encoding on one thread. Last, products of few rows
// beside LibTorch's (few_rows_bench.cpp).
//
//   build/release/bin/bench_kernels [--benchmark_filter=lora] [--benchmark_repetitions=9]

#include <benchmark/benchmark.h>
#include <emmintrin.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "data/quant/codec.h"
#include "tests/bench/few_rows_bench.h"
#include "trainer/kernels/levels.h"

namespace tailor {
namespace {

constexpr std::int64_t kTokens = 1024, kModel = 576, kFeedForward = 1536, kHeadDim = 64;
constexpr std::int64_t kHeads = 9, kKvHeads = 3, kDocument = 256;

/// Numbers that stay until the program ends, at the start of a cache line as tensors are: signs and
/// sizes of 2^-3 .. 2^-1 from a linear congruence.
Bf16* numbers(std::int64_t count) {
  const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(Bf16) + 63) / 64 * 64;
  auto* out = static_cast<Bf16*>(std::aligned_alloc(64, bytes));
  std::uint32_t state = 1;
  for (std::int64_t i = 0; i < count; ++i) {
    state = state * 1664525U + 1013904223U;
    out[i].bits = static_cast<std::uint16_t>(((state >> 16U) & 0x80FFU) + 0x3E00U);
  }
  return out;
}

/// One kernel at one size: what it computes and how many bytes and operations that is.
struct Case {
  std::string name;
  double gigabytes, gigaflops;  ///< a call
  std::function<void(const Kernels<Bf16>&)> call;
};

std::vector<Case> cases() {
  constexpr std::int64_t T = kTokens;
  const Bf16 *x = numbers(T * 2 * kFeedForward), *w = numbers(kFeedForward * 64);
  Bf16 *y = numbers(T * 2 * kFeedForward), *z = numbers(T * 2 * kFeedForward);
  Bf16* m = numbers(T * kFeedForward);
  static std::vector<float> g(static_cast<std::size_t>(64 * kFeedForward));
  std::vector<Case> out;
  const auto add = [&](std::string name, std::int64_t elements, std::int64_t operations,
                       std::function<void(const Kernels<Bf16>&)> call) {
    out.push_back({std::move(name), 2e-9 * static_cast<double>(elements),
                   1e-9 * static_cast<double>(operations), std::move(call)});
  };
  for (const std::int64_t R : {8, 16, 24}) {
    for (const std::int64_t D : {kModel, kFeedForward}) {
      const std::string size = " D" + std::to_string(D) + " R" + std::to_string(R);
      add("lora_down" + size, T * D, 2 * T * D * R,
          [=](const Kernels<Bf16>& k) { k.lora_down(0, T, R, D, x, D, w, y, R, 1.0); });
      add("lora_up" + size, 2 * T * D, 2 * T * D * R,
          [=](const Kernels<Bf16>& k) { k.lora_up(0, T, R, D, x, R, w, y, D); });
      add("lora_gradient" + size, T * D, 2 * T * D * R,
          [=](const Kernels<Bf16>& k) { k.lora_gradient(0, D, T, R, D, w, R, x, D, g.data()); });
    }
  }
  add("swiglu", 3 * T * kFeedForward, 0,
      [=](const Kernels<Bf16>& k) { k.swiglu(0, T, kFeedForward, x, y); });
  add("swiglu_backward", 5 * T * kFeedForward, 0,
      [=](const Kernels<Bf16>& k) { k.swiglu_backward(0, T, kFeedForward, x, z, y, nullptr); });
  add("swiglu_backward with m", 6 * T * kFeedForward, 0,
      [=](const Kernels<Bf16>& k) { k.swiglu_backward(0, T, kFeedForward, x, z, y, m); });
  add("rms_norm", 2 * T * kModel, 0,
      [=](const Kernels<Bf16>& k) { k.rms_norm(0, T, kModel, x, w, 1e-5, y); });
  add("rms_norm_backward", 4 * T * kModel, 0,
      [=](const Kernels<Bf16>& k) { k.rms_norm_backward(0, T, kModel, x, w, z, x, 1e-5, y); });
  // Packed documents of 256 tokens, 9 query heads on 3 key heads.
  static std::vector<AttentionSegment> segments;
  for (std::int64_t t = 0; t < T; t += kDocument) segments.push_back({t, kDocument, t, kDocument});
  static const AttentionShape shape{kHeads,
                                    kKvHeads,
                                    kHeadDim,
                                    kHeadDim,
                                    kHeads * kHeadDim,
                                    kKvHeads * kHeadDim,
                                    kKvHeads * kHeadDim,
                                    kHeads * kHeadDim,
                                    kHeadDim,
                                    0.125};
  static std::vector<float> lse(static_cast<std::size_t>(T * kHeads));
  const std::int64_t tasks = T / kDocument * kKvHeads;
  const std::int64_t scores = T * kHeads * kDocument / 2;  // half of them are masked
  constexpr std::int64_t q = T * kHeads * kHeadDim, kv = T * kKvHeads * kHeadDim;
  add("attention", 2 * q + 2 * kv, 4 * scores * kHeadDim, [=](const Kernels<Bf16>& k) {
    k.attention(0, tasks, segments.data(), shape, x, x + q, x + q + kv, y, lse.data());
  });
  add("attention_backward", 4 * q + 4 * kv, 10 * scores * kHeadDim, [=](const Kernels<Bf16>& k) {
    k.attention_backward(0, tasks, segments.data(), shape, x, x + q, x + q + kv, x, lse.data(),
                         x + 1, y, y + q, y + q + kv);
  });
  return out;
}

/// Keeps each benchmark's best repetition.
class Best : public benchmark::BenchmarkReporter {
 public:
  std::map<std::string, double> seconds;
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      if (run.run_type != Run::RT_Iteration) continue;
      const double each = run.real_accumulated_time / static_cast<double>(run.iterations);
      const auto [at, first] = seconds.emplace(run.run_name.function_name, each);
      if (!first && each < at->second) at->second = each;
    }
  }
};

// ---- frozen weights

/// The rows of 48 gate_up projections of Llama 4 Maverick's experts, cut to 768 MiB of bfloat16.
constexpr std::int64_t kWeightRows = 49152, kWeightColumns = 8192;
constexpr std::int64_t kEncodedRows = 2048;

/// Calls body(row_begin, row_end) for equal parts of the rows, a thread each.
void on_threads(int threads, std::int64_t rows,
                const std::function<void(std::int64_t, std::int64_t)>& body) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    others.emplace_back(body, rows * i / threads, rows * (i + 1) / threads);
  }
  body(0, rows / threads);
  for (std::thread& other : others) other.join();
}

void streaming_fill(Bf16* begin, const Bf16* end) {
  const __m128i value = _mm_set1_epi16(0x3C00);
  for (auto* p = reinterpret_cast<__m128i*>(begin); p < reinterpret_cast<const __m128i*>(end);
       ++p) {
    _mm_stream_si128(p, value);
  }
  _mm_sfence();
}

/// Weights and what they become, made when the first of these benchmarks runs.
struct FrozenWeights {
  std::unique_ptr<Bf16, decltype(&std::free)> out{
      static_cast<Bf16*>(std::aligned_alloc(4096, kWeightRows* kWeightColumns * sizeof(Bf16))),
      &std::free};
  std::vector<float> weights;
  std::map<std::string, std::pair<WeightFormat, std::vector<std::byte>>> stored;

  static FrozenWeights& instance() {
    static FrozenWeights all;
    return all;
  }
  FrozenWeights() {
    std::uint32_t state = 1;
    for (std::int64_t i = 0; i < kEncodedRows * kWeightColumns; ++i) {
      float sum = 0;  // of four uniforms: bell-shaped
      for (int k = 0; k < 4; ++k) {
        state = state * 1664525U + 1013904223U;
        sum += static_cast<float>(state >> 8U) * 0x1p-24F - 0.5F;
      }
      weights.push_back(0.03F * sum);
    }
    std::memset(out.get(), 1, kWeightRows * kWeightColumns * sizeof(Bf16));  // its pages are there
  }
  EncodedMatrix matrix(const WeightFormat& format) {
    auto& [kind, bytes] = stored[format_text(format)];
    const std::int64_t codes = code_bytes(format, kWeightRows, kWeightColumns);
    if (bytes.empty()) {
      kind = format;
      bytes.resize(
          static_cast<std::size_t>(64 + codes + scale_bytes(format, kWeightRows, kWeightColumns)));
      MatrixEncoder encoder(format, kWeightRows, kWeightColumns, aligned(bytes),
                            aligned(bytes) + codes);
      for (std::int64_t row = 0; row < kWeightRows; row += kEncodedRows) {
        encoder.add_rows(row, row + kEncodedRows, weights.data());
      }
      encoder.finish();
    }
    return {format, kWeightRows, kWeightColumns, aligned(bytes), aligned(bytes) + codes};
  }
  static std::byte* aligned(std::vector<std::byte>& bytes) {
    const auto at = reinterpret_cast<std::uintptr_t>(bytes.data());
    return bytes.data() + (64 - at % 64) % 64;
  }
};

void measure(const std::string& name, int repetitions, std::function<void()> call) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [call = std::move(call)](benchmark::State& state) {
                                 for (auto _ : state) call();
                               })
      ->Iterations(1)
      ->Repetitions(repetitions)
      ->UseRealTime();
}

const WeightFormat kFrozenFormats[] = {WeightFormat::int4(128), WeightFormat::nf4(),
                                       WeightFormat::fp8_blocks()};

void add_frozen_weights(const LevelList& levels) {
  for (const int threads : {1, 2}) {
    const std::string suffix = " on " + std::to_string(threads);
    measure("memset" + suffix, 7, [=] {
      Bf16* out = FrozenWeights::instance().out.get();
      on_threads(threads, kWeightRows, [=](std::int64_t begin, std::int64_t end) {
        std::memset(out + begin * kWeightColumns, 1,
                    static_cast<std::size_t>((end - begin) * kWeightColumns) * sizeof(Bf16));
      });
    });
    measure("streaming fill" + suffix, 7, [=] {
      Bf16* out = FrozenWeights::instance().out.get();
      on_threads(threads, kWeightRows, [=](std::int64_t begin, std::int64_t end) {
        streaming_fill(out + begin * kWeightColumns, out + end * kWeightColumns);
      });
    });
    for (const WeightFormat& format : kFrozenFormats) {
      for (int i = 0; i < levels.count; ++i) {
        const auto kernel = levels.levels[i].tables->bf16->dequantise;
        measure("dequantise " + format_text(format) + suffix + " @" + levels.levels[i].name, 7,
                [=] {
                  const EncodedMatrix matrix = FrozenWeights::instance().matrix(format);
                  Bf16* out = FrozenWeights::instance().out.get();
                  on_threads(threads, kWeightRows, [&](std::int64_t begin, std::int64_t end) {
                    kernel(begin, end, matrix, out + begin * kWeightColumns, kWeightColumns);
                  });
                });
      }
    }
  }
  for (const WeightFormat& format : kFrozenFormats) {
    measure("encode " + format_text(format), 7, [=] {
      static std::vector<std::byte> codes(kEncodedRows * kWeightColumns),
          scales(kEncodedRows * kWeightColumns / 8);
      MatrixEncoder encoder(format, kEncodedRows, kWeightColumns, codes.data(), scales.data());
      encoder.add_rows(0, kEncodedRows, FrozenWeights::instance().weights.data());
      encoder.finish();
    });
  }
}

void report_frozen_weights(const LevelList& levels, const std::map<std::string, double>& seconds) {
  const auto find = [&](const std::string& name) {
    for (const auto& [full, value] : seconds) {
      if (full == name) return value;
    }
    return 0.0;
  };
  constexpr double kGigabytes = 1e-9 * kWeightRows * kWeightColumns * sizeof(Bf16);
  std::printf("\nto bfloat16 [%lld, %lld]\n%-34s %-16s %9s %9s %9s\n",
              static_cast<long long>(kWeightRows), static_cast<long long>(kWeightColumns), "",
              "level", "ms", "GB/s out", "of fill");
  for (const int threads : {1, 2}) {
    const std::string suffix = " on " + std::to_string(threads);
    double fill = 0;  // the faster of the two
    for (const char* name : {"memset", "streaming fill"}) {
      const double each = find(name + suffix);
      if (each == 0) continue;
      fill = fill == 0 ? each : std::min(fill, each);
      std::printf("%-34s %-16s %9.1f %9.1f\n", (name + suffix).c_str(), "", 1e3 * each,
                  kGigabytes / each);
    }
    for (const WeightFormat& format : kFrozenFormats) {
      const std::string name = "dequantise " + format_text(format) + suffix;
      for (int i = 0; i < levels.count; ++i) {
        const double each = find(name + " @" + levels.levels[i].name);
        if (each == 0) continue;
        std::printf("%-34s %-16s %9.1f %9.1f %9.2f\n", name.c_str(), levels.levels[i].name,
                    1e3 * each, kGigabytes / each, fill / each);
      }
    }
  }
  for (const WeightFormat& format : kFrozenFormats) {
    const double each = find("encode " + format_text(format));
    if (each == 0) continue;
    std::printf("%-51s %9.1f   %.0f million weights/s\n", ("encode " + format_text(format)).c_str(),
                1e3 * each, 1e-6 * kEncodedRows * kWeightColumns / each);
  }
}

int run(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--few-rows") {
    report_few_rows();
    return 0;
  }
  const LevelList levels = runnable_levels();
  const std::vector<Case> all = cases();
  for (const Case& one : all) {
    for (int i = 0; i < levels.count; ++i) {
      const Kernels<Bf16>& kernels = *levels.levels[i].tables->bf16;
      const std::string name = one.name + " @" + levels.levels[i].name;
      benchmark::RegisterBenchmark(name.c_str(),
                                   [&one, &kernels](benchmark::State& state) {
                                     for (auto _ : state) one.call(kernels);
                                   })
          ->Repetitions(7)
          ->MinTime(0.02);
    }
  }
  add_frozen_weights(levels);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  Best best;
  benchmark::RunSpecifiedBenchmarks(&best);
  std::printf("%-26s %-16s %9s %7s %9s %10s\n", "kernel", "level", "us", "GB/s", "GFLOP/s",
              "x of best");
  for (const Case& one : all) {
    double first = 0;
    for (int i = 0; i < levels.count; ++i) {
      const auto found = best.seconds.find(one.name + " @" + levels.levels[i].name);
      if (found == best.seconds.end()) continue;
      if (first == 0) first = found->second;
      std::printf("%-26s %-16s %9.1f %7.1f %9.1f %10.2f\n", one.name.c_str(), levels.levels[i].name,
                  1e6 * found->second, one.gigabytes / found->second, one.gigaflops / found->second,
                  found->second / first);
    }
  }
  report_frozen_weights(levels, best.seconds);
  report_few_rows();
  return 0;
}

}  // namespace
}  // namespace tailor

int main(int argc, char** argv) { return tailor::run(argc, argv); }
