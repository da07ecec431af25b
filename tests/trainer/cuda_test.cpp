// Bodies of GPU kernels, run on the CPU over every block and thread.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "trainer/cuda/devices.h"
#include "trainer/cuda/self_check.h"

namespace tailor {
namespace {

TEST(CudaSelfCheck, every_thread_writes_its_number_and_no_other) {
  for (const unsigned threads : {32U, 128U}) {
    constexpr std::uint32_t kCount = 301;
    std::vector<std::uint32_t> out(kCount + 5, 7);
    const unsigned blocks = (kCount + threads - 1) / threads;
    for (unsigned block = blocks; block-- > 0;) {  // the order of threads is nobody's promise
      for (unsigned thread = threads; thread-- > 0;) {
        self_check_body(block, thread, threads, kCount, out.data());
      }
    }
    for (std::uint32_t i = 0; i < kCount; ++i) {
      const auto words = philox({i / 4, 0x243F6A88U, 0x85A308D3U, 0}, {0xA4093822U, 0x299F31D0U});
      EXPECT_EQ(out[i], words[i % 4]) << i;
    }
    for (std::uint32_t i = kCount; i < out.size(); ++i)
      EXPECT_EQ(out[i], 7U) << "written past the end";
  }
}

TEST(CudaFacts, are_complete_with_and_without_a_device) {
  const CudaFacts facts = cuda_facts();
  EXPECT_EQ(facts.compiled, !facts.toolkit.empty());
  EXPECT_EQ(facts.devices.empty(), !facts.problem.empty()) << facts.problem;
  for (const CudaDevice& device : facts.devices) {
    EXPECT_EQ(device.problem, "") << device.name;
    EXPECT_GT(device.memory_bytes, 0);
  }
}

}  // namespace
}  // namespace tailor
