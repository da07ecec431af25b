#include <cstdlib>

#include "base/units.h"
#include "trainer/cuda/check.h"
#include "trainer/cuda/device.h"

namespace tailor {
namespace {

using cuda::check;

cudaStream_t native(StreamHandle stream) { return static_cast<cudaStream_t>(stream.native); }
cudaEvent_t native(EventHandle event) { return static_cast<cudaEvent_t>(event.native); }

cudaMemcpyKind native(CopyKind kind) {
  switch (kind) {
    case CopyKind::host_to_device:
      return cudaMemcpyHostToDevice;
    case CopyKind::device_to_host:
      return cudaMemcpyDeviceToHost;
    case CopyKind::device_to_device:
      return cudaMemcpyDeviceToDevice;
    case CopyKind::host_to_host:
      return cudaMemcpyHostToHost;
  }
  TAILOR_CHECK(false, "kind of copy");
}

class CudaStreams final : public Device {
 public:
  explicit CudaStreams(int index) : index_(index) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, index), "asking for GPU " + std::to_string(index));
    name_ = "cuda:" + std::to_string(index) + " (" + properties.name + ")";
    use_on_this_thread();
    check(cudaFree(nullptr), "starting CUDA on " + name_);  // the context, paid for here
  }

  std::string name() const override { return name_; }
  // Which device is current is a thread's own matter, and the reader's thread never asked for one.
  void use_on_this_thread() override { check(cudaSetDevice(index_), "switching to " + name_); }

  void* allocate(std::int64_t bytes) override {
    TAILOR_CHECK(bytes >= 0);
    use_on_this_thread();
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, static_cast<std::size_t>(bytes == 0 ? 1 : bytes));
    if (error == cudaErrorMemoryAllocation) does_not_fit(bytes);
    check(error, "allocating " + std::to_string(bytes) + " bytes on " + name_);
    return memory;
  }
  void free(void* memory) noexcept override { ignore(cudaFree(memory)); }

  /// Pinned by hand: CUDA's own allocation promises no alignment to 4 KiB.
  void* allocate_pinned(std::int64_t bytes) override {
    TAILOR_CHECK(bytes >= 0);
    use_on_this_thread();
    constexpr std::int64_t kPage = 4096;
    const auto whole = static_cast<std::size_t>(align_up(bytes == 0 ? 1 : bytes, kPage));
    void* memory = std::aligned_alloc(kPage, whole);
    const cudaError_t error = memory == nullptr
                                  ? cudaErrorMemoryAllocation
                                  : cudaHostRegister(memory, whole, cudaHostRegisterPortable);
    if (error == cudaSuccess) return memory;
    std::free(memory);
    cudaGetLastError();
    throw Error(
        Fault::does_not_fit,
        {"no pinned memory for " + std::to_string(bytes) + " bytes: " + cudaGetErrorString(error),
         name_,
         "Give the stream a smaller host budget, or raise the limit on locked memory "
         "(`ulimit -l`)."});
  }
  void free_pinned(void* memory) noexcept override {
    if (memory == nullptr) return;
    ignore(cudaHostUnregister(memory));
    std::free(memory);
  }

  StreamHandle create_stream() override {
    use_on_this_thread();
    cudaStream_t stream = nullptr;  // that of nobody else: the default stream waits for all others
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    return {stream};
  }
  void destroy(StreamHandle stream) noexcept override { ignore(cudaStreamDestroy(native(stream))); }
  EventHandle create_event() override {
    use_on_this_thread();
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    return {event};
  }
  void destroy(EventHandle event) noexcept override { ignore(cudaEventDestroy(native(event))); }

  void copy_async(void* to, const void* from, std::int64_t bytes, CopyKind kind,
                  StreamHandle stream) override {
    TAILOR_CHECK(bytes >= 0);
    if (bytes == 0) return;
    use_on_this_thread();
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), native(kind), native(stream)),
          "a copy of " + std::to_string(bytes) + " bytes on " + name_);
  }
  void record(EventHandle event, StreamHandle stream) override {
    use_on_this_thread();
    check(cudaEventRecord(native(event), native(stream)), "recording an event on " + name_);
  }
  void wait(StreamHandle stream, EventHandle event) override {
    use_on_this_thread();
    check(cudaStreamWaitEvent(native(stream), native(event), 0), "a wait for an event on " + name_);
  }
  void synchronise(EventHandle event) override {
    use_on_this_thread();
    check(cudaEventSynchronize(native(event)), "work on " + name_);
  }
  void synchronise(StreamHandle stream) override {
    use_on_this_thread();
    check(cudaStreamSynchronize(native(stream)), "work on " + name_);
  }
  bool poll(EventHandle event) override {
    use_on_this_thread();
    const cudaError_t state = cudaEventQuery(native(event));
    if (state == cudaErrorNotReady) {
      cudaGetLastError();  // an answer, but kept as an error
      return false;
    }
    check(state, "work on " + name_);
    return true;
  }

 private:
  [[noreturn]] void does_not_fit(std::int64_t bytes) const {
    cudaGetLastError();
    std::size_t free_bytes = 0, total = 0;
    cudaMemGetInfo(&free_bytes, &total);
    throw Error(Fault::does_not_fit,
                {"no memory for " + std::to_string(bytes) + " bytes: " +
                     std::to_string(free_bytes) + " of " + std::to_string(total) + " are free",
                 name_, "Give the stream a smaller device budget, or free memory on the GPU."});
  }
  /// Of what gives something back: a failure there is that of earlier work, which was or will be
  /// reported by a call that can throw.
  static void ignore(cudaError_t error) noexcept {
    if (error != cudaSuccess) cudaGetLastError();
  }

  int index_;
  std::string name_;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int index) { return std::make_unique<CudaStreams>(index); }

}  // namespace tailor
