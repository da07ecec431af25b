// The GPU kernels at the sizes of Llama 4 Maverick, in bytes a second and as a part of what a copy
// on the device reaches in the same rounds: the target is 0.85. Minimum of the rounds, which take
// turns, so that a slow moment meets all.
//   bench_cuda [rounds]

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "trainer/cuda/check.h"
#include "trainer/cuda/device.h"
#include "trainer/cuda/kernels.h"

namespace {

using namespace tailor;
using namespace tailor::cuda;

struct Entry {
  std::string name;
  double bytes;  // read and written
  std::function<void(void*)> run;
  float best_ms = 1e30F;
};

class Timer {
 public:
  Timer() {
    check(cudaEventCreate(&begin_), "making an event");
    check(cudaEventCreate(&end_), "making an event");
  }
  float ms(const std::function<void(void*)>& run, const Stream& stream) {
    const auto native = static_cast<cudaStream_t>(stream.native());
    check(cudaEventRecord(begin_, native), "recording");
    run(stream.native());
    check(cudaEventRecord(end_, native), "recording");
    check(cudaEventSynchronize(end_), "the kernel");
    float out = 0;
    check(cudaEventElapsedTime(&out, begin_, end_), "timing");
    return out;
  }

 private:
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

void bench(int rounds) {
  const std::unique_ptr<Device> device = make_cuda_device(0);
  const Stream stream(*device);
  std::vector<DeviceMemory> memory;
  const auto array = [&](std::int64_t bytes) {  // zeros: speed does not depend on the numbers
    memory.emplace_back(*device, bytes, MemoryKind::device);
    check(cudaMemset(memory.back().data(), 0, static_cast<std::size_t>(bytes)), "clearing");
    return memory.back().data();
  };
  constexpr std::int64_t kRows = 16384, kColumns = 5120;  // an expert's gate and up
  constexpr std::int64_t kNumbers = kRows * kColumns, kT = 8192, kF = 8192, kD = 5120;
  constexpr std::int64_t kV = 202048, kChunkRows = 512;
  auto* out = static_cast<Bf16Bits*>(array(kNumbers * 2));
  auto* other = static_cast<Bf16Bits*>(array(kNumbers * 2));
  const Nf4Tables tables = {static_cast<float*>(array(64)), static_cast<float*>(array(1024))};
  std::vector<Entry> entries;
  entries.push_back({"copy on the device", 4.0 * kNumbers, [=](void* to) {
                       check(cudaMemcpyAsync(out, other, kNumbers * 2, cudaMemcpyDeviceToDevice,
                                             static_cast<cudaStream_t>(to)),
                             "a copy");
                     }});
  const auto dequantise_entry = [&](const WeightFormat& format, const char* name,
                                    std::int64_t codes, std::int64_t scales) {
    EncodedMatrix matrix;
    matrix.format = format;
    matrix.rows = kRows;
    matrix.columns = kColumns;
    matrix.codes = static_cast<std::byte*>(array(codes));
    matrix.scales = static_cast<std::byte*>(array(scales));
    entries.push_back({name, static_cast<double>(codes + scales + kNumbers * 2),
                       [=](void* to) { dequantise(matrix, tables, out, to); }});
  };
  dequantise_entry(WeightFormat::int4(128), "int4 g128", kNumbers / 2, kNumbers / 128 * 2);
  dequantise_entry(WeightFormat::nf4(), "nf4", kNumbers / 2,
                   4 + kNumbers / 64 + (kNumbers / 64 + 255) / 256 * 4);
  dequantise_entry(WeightFormat::fp8_blocks(), "fp8 128x128", kNumbers, kNumbers / 16384 * 4);
  auto* wide = static_cast<Bf16Bits*>(array(kT * kF * 4));
  entries.push_back({"swiglu", 6.0 * kT * kF, [=](void* to) { swiglu(kT, kF, wide, out, to); }});
  entries.push_back({"swiglu_backward", 12.0 * kT * kF,
                     [=](void* to) { swiglu_backward(kT, kF, wide, out, wide, other, to); }});
  auto* index = static_cast<std::int32_t*>(array(kT * 4));
  auto* scale = static_cast<float*>(array(kT * 4));
  std::vector<std::int32_t> in_order(kT);
  for (std::int64_t i = 0; i < kT; ++i) in_order[i] = static_cast<std::int32_t>(i);
  check(cudaMemcpy(index, in_order.data(), kT * 4, cudaMemcpyHostToDevice), "a copy");
  entries.push_back({"gather_rows", 4.0 * kT * kD,
                     [=](void* to) { gather_rows(kT, kD, other, index, scale, out, to); }});
  entries.push_back({"combine_rows", 6.0 * kT * kD,
                     [=](void* to) { combine_rows(kT, kD, 1, other, index, scale, out, to); }});
  entries.push_back({"gate_gradient", 4.0 * kT * kD,
                     [=](void* to) { gate_gradient(kT, kD, other, out, index, scale, to); }});
  auto* logits = static_cast<Bf16Bits*>(array(kChunkRows * kV * 2));
  auto* target = static_cast<std::int32_t*>(array(kChunkRows * 4));
  auto* loss = static_cast<double*>(array(kChunkRows * 8));
  auto* best = static_cast<std::int32_t*>(array(kChunkRows * 4));
  entries.push_back({"cross_entropy", 6.0 * kChunkRows * kV, [=](void* to) {
                       cross_entropy(kChunkRows, kV, logits, target, 1.0, loss, best, to);
                     }});

  Timer timer;
  for (int round = 0; round <= rounds; ++round) {
    for (Entry& entry : entries) {
      const float ms = timer.ms(entry.run, stream);
      if (round > 0) entry.best_ms = std::min(entry.best_ms, ms);  // the first warms up
    }
  }
  std::printf("%s, %d rounds\n%-20s %10s %10s %8s\n", device->name().c_str(), rounds, "", "ms",
              "GB/s", "of copy");
  const double copy = entries[0].bytes / entries[0].best_ms;
  for (const Entry& entry : entries) {
    const double speed = entry.bytes / entry.best_ms;
    std::printf("%-20s %10.3f %10.0f %8.2f\n", entry.name.c_str(), entry.best_ms, speed / 1e6,
                speed / copy);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    bench(argc > 1 ? std::max(1, std::atoi(argv[1])) : 20);
  } catch (const tailor::Error& error) {
    std::fputs(tailor::to_text(error).c_str(), stderr);
    return error.exit_code();
  }
}
