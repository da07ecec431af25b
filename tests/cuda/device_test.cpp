#include "trainer/cuda/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "tests/support/fake_device.h"
#include "trainer/cuda/devices.h"

namespace tailor {
namespace {

using testing::Each;
using testing::HasSubstr;
using testing::IsEmpty;

/// What holds for every device. `param` names one; the GPU's is skipped where there is none.
class DeviceTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (GetParam() == "cpu") device_ = make_cpu_device();
    if (GetParam() == "fake") device_ = std::make_unique<FakeDevice>(7);
    if (GetParam() == "cuda") {
      const CudaFacts facts = cuda_facts();
      if (facts.devices.empty()) GTEST_SKIP() << facts.problem;
      device_ = make_cuda_device(0);
    }
  }
  std::unique_ptr<Device> device_;
};

TEST_P(DeviceTest, data_comes_back_through_two_streams) {
  constexpr std::int64_t kCount = 10007, kBytes = kCount * 4;
  DeviceMemory from(*device_, kBytes, MemoryKind::pinned), to(*device_, kBytes, MemoryKind::pinned);
  DeviceMemory first(*device_, kBytes, MemoryKind::device);
  DeviceMemory second(*device_, kBytes, MemoryKind::device);
  std::iota(from.as<std::int32_t>(), from.as<std::int32_t>() + kCount, 5);
  Stream up(*device_), down(*device_);
  Event arrived(*device_), done(*device_);
  device_->copy_async(first.data(), from.data(), kBytes, CopyKind::host_to_device, up);
  device_->copy_async(second.data(), first.data(), kBytes, CopyKind::device_to_device, up);
  device_->record(arrived, up);
  device_->wait(down, arrived);
  device_->copy_async(to.data(), second.data(), kBytes, CopyKind::device_to_host, down);
  device_->record(done, down);
  device_->synchronise(done);
  EXPECT_TRUE(device_->poll(done));
  EXPECT_TRUE(device_->poll(arrived));
  for (std::int32_t i = 0; i < kCount; ++i) ASSERT_EQ(to.as<std::int32_t>()[i], i + 5);
  device_->synchronise(StreamHandle(up));
}

TEST_P(DeviceTest, memory_is_aligned_and_an_event_never_recorded_has_passed) {
  for (const std::int64_t bytes : {0, 1, 4095, 4097}) {
    DeviceMemory on_device(*device_, bytes, MemoryKind::device);
    DeviceMemory pinned(*device_, bytes, MemoryKind::pinned);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(on_device.data()) % 256, 0U);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pinned.data()) % 4096, 0U);
    EXPECT_EQ(pinned.bytes(), bytes);
  }
  Event event(*device_);
  Stream stream(*device_);
  EXPECT_TRUE(device_->poll(event));
  device_->wait(stream, event);
  device_->synchronise(event);
  device_->synchronise(StreamHandle(stream));
  device_->free(nullptr);
  device_->free_pinned(nullptr);
}

TEST_P(DeviceTest, what_cannot_fit_says_so) {
  if (GetParam() == "fake") GTEST_SKIP() << "the fake has as much as it is asked for";
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizer ends the program at such a size";
#endif
  try {
    device_->allocate(std::int64_t{1} << 60);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::does_not_fit);
    EXPECT_THAT(error.parts().what, HasSubstr("1152921504606846976 bytes"));
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, DeviceTest, testing::Values("cpu", "fake", "cuda"),
                         [](const auto& of) { return of.param; });

TEST(CudaDevice, without_a_gpu_asking_for_one_is_an_error_with_the_reason) {
  const CudaFacts facts = cuda_facts();
  if (!facts.devices.empty()) GTEST_SKIP() << "there is one";
  try {
    make_cuda_device(0);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::device);
    EXPECT_THAT(error.parts().what, HasSubstr(facts.compiled ? "CUDA driver" : "without CUDA"));
  }
}

TEST(DeviceMemory, moves_and_is_given_back_once) {
  FakeDevice device;
  DeviceMemory a(device, 16, MemoryKind::device);
  void* const data = a.data();
  DeviceMemory b(std::move(a));
  EXPECT_EQ(a.data(), nullptr);
  EXPECT_EQ(b.data(), data);
  b = DeviceMemory(device, 32, MemoryKind::pinned);
  EXPECT_NE(b.data(), data);
  EXPECT_THAT(std::vector<unsigned char>(static_cast<unsigned char*>(data),
                                         static_cast<unsigned char*>(data) + 16),
              Each(FakeDevice::kPoison))
      << "freed when it was replaced";
  b = {};
  EXPECT_THAT(device.violations(), IsEmpty());
}

}  // namespace
}  // namespace tailor
