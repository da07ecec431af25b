#pragma once

// The GPU, where there is one: the cases of the CPU launcher run on it through kernels.h, and have
// to give the same bits.

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "trainer/cuda/device.h"
#include "trainer/cuda/devices.h"

namespace tailor::cuda {

class Gpu {
 public:
  /// Why there is none; empty where there is one.
  static std::string missing() {
    static const CudaFacts facts = cuda_facts();
    return facts.devices.empty() ? facts.problem : facts.devices[0].problem;
  }

  Gpu() : device_(make_cuda_device(0)), stream_(*device_) { device_->use_on_this_thread(); }

  void* stream() const { return stream_.native(); }

  /// An array on the device: `values`, then a guard that download() looks at.
  template <class T>
  T* upload(const std::vector<T>& values) {
    const auto bytes = static_cast<std::int64_t>(values.size() * sizeof(T));
    std::vector<unsigned char> whole(values.size() * sizeof(T) + kGuard, kFill);
    if (bytes > 0) std::memcpy(whole.data(), values.data(), values.size() * sizeof(T));
    DeviceMemory& memory =
        arrays_.emplace_back(*device_, static_cast<std::int64_t>(whole.size()), MemoryKind::device);
    device_->copy_async(memory.data(), whole.data(), memory.bytes(), CopyKind::host_to_device,
                        stream_);
    device_->synchronise(StreamHandle(stream_));
    return memory.as<T>();
  }
  template <class T>
  T* output(std::size_t count) {
    std::vector<T> values(count);
    if (count > 0) std::memset(static_cast<void*>(values.data()), kFill, count * sizeof(T));
    return upload(values);
  }
  template <class T>
  std::vector<T> download(const T* array, std::size_t count) {
    std::vector<unsigned char> whole(count * sizeof(T) + kGuard);
    device_->copy_async(whole.data(), array, static_cast<std::int64_t>(whole.size()),
                        CopyKind::device_to_host, stream_);
    device_->synchronise(StreamHandle(stream_));
    EXPECT_TRUE(std::all_of(whole.end() - kGuard, whole.end(), [](unsigned char byte) {
      return byte == kFill;
    })) << "written past the end";
    std::vector<T> out(count);
    if (count > 0) std::memcpy(static_cast<void*>(out.data()), whole.data(), count * sizeof(T));
    return out;
  }

 private:
  static constexpr int kGuard = 64;
  static constexpr unsigned char kFill = 0xCD;
  std::unique_ptr<Device> device_;
  Stream stream_;
  std::vector<DeviceMemory> arrays_;
};

/// The same bytes: NaN equals itself, and zeros differ by sign.
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace tailor::cuda
