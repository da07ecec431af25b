#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "base/units.h"
#include "trainer/cuda/device.h"

namespace tailor {
namespace {

class CpuDevice final : public Device {
 public:
  std::string name() const override { return "cpu"; }
  void use_on_this_thread() override {}

  void* allocate(std::int64_t bytes) override {
    TAILOR_CHECK(bytes >= 0);
    constexpr std::int64_t kPage = 4096;
    const std::int64_t whole = align_up(bytes == 0 ? 1 : bytes, kPage);
    void* memory = std::aligned_alloc(kPage, static_cast<std::size_t>(whole));
    if (memory != nullptr) return memory;
    throw Error(Fault::does_not_fit,
                {"no memory for " + std::to_string(bytes) + " bytes", "",
                 "Give the stream a smaller budget, or free memory on this machine."});
  }
  void free(void* memory) noexcept override { std::free(memory); }
  void* allocate_pinned(std::int64_t bytes) override { return allocate(bytes); }
  void free_pinned(void* memory) noexcept override { std::free(memory); }

  StreamHandle create_stream() override { return {}; }
  void destroy(StreamHandle) noexcept override {}
  EventHandle create_event() override { return {}; }
  void destroy(EventHandle) noexcept override {}

  void copy_async(void* to, const void* from, std::int64_t bytes, CopyKind, StreamHandle) override {
    TAILOR_CHECK(bytes >= 0);
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  void record(EventHandle, StreamHandle) override {}
  void wait(StreamHandle, EventHandle) override {}
  void synchronise(EventHandle) override {}
  void synchronise(StreamHandle) override {}
  bool poll(EventHandle) override { return true; }
};

}  // namespace

std::unique_ptr<Device> make_cpu_device() { return std::make_unique<CpuDevice>(); }

}  // namespace tailor
