#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace tailor {

/// A queue of work on a device: what is submitted to it ends in that order. `native` is a
/// cudaStream_t on a GPU, what the launch functions of trainer/cuda/kernels.h take.
struct StreamHandle {
  void* native = nullptr;
};
/// A point in a stream.
struct EventHandle {
  void* native = nullptr;
};

enum class CopyKind { host_to_device, device_to_host, device_to_device, host_to_host };

/// Memory, copies and their order on one device: all the weight stream asks of it. Every function
/// may be called from any thread; one stream is fed by one thread at a time.
///
/// Order is as in CUDA. record() notes all that was submitted to the stream so far; wait() holds
/// back what is submitted to a stream later until an event's note has come to pass, without holding
/// the caller; an event that was never recorded has come to pass. From copy_async() until its end
/// the source may not be written, nor the destination touched, but by work that is ordered after
/// it.
///
/// What fails on the device throws Error{device} with its own text, and may be thrown by a later
/// call than the one that caused it.
class Device {
 public:
  virtual ~Device() = default;

  virtual std::string name() const = 0;
  /// Makes this the device of the calling thread's kernel launches. The functions below need no
  /// such call.
  virtual void use_on_this_thread() = 0;

  /// Device memory, aligned to 256 bytes, not cleared; throws Error{does_not_fit}. Waits for
  /// nothing. free() takes what is no longer used by any work, or null.
  virtual void* allocate(std::int64_t bytes) = 0;
  virtual void free(void* memory) noexcept = 0;
  /// Host memory the device copies from and to without a detour, aligned to 4 KiB (so that files
  /// are read into it directly), not cleared; throws Error{does_not_fit}.
  virtual void* allocate_pinned(std::int64_t bytes) = 0;
  virtual void free_pinned(void* memory) noexcept = 0;

  virtual StreamHandle create_stream() = 0;
  virtual void destroy(StreamHandle stream) noexcept = 0;  ///< work in it still ends
  virtual EventHandle create_event() = 0;
  virtual void destroy(EventHandle event) noexcept = 0;

  virtual void copy_async(void* to, const void* from, std::int64_t bytes, CopyKind kind,
                          StreamHandle stream) = 0;
  virtual void record(EventHandle event, StreamHandle stream) = 0;
  virtual void wait(StreamHandle stream, EventHandle event) = 0;
  /// Returns when the event has come to pass; when all work of the stream has ended.
  virtual void synchronise(EventHandle event) = 0;
  virtual void synchronise(StreamHandle stream) = 0;
  virtual bool poll(EventHandle event) = 0;  ///< whether it has come to pass
};

/// RAM as the device: copies are made before copy_async() returns, events have always come to pass.
std::unique_ptr<Device> make_cpu_device();

/// GPU `index` as CUDA counts them. Throws Error{device} where there is no such device, and where
/// the program was built without CUDA.
std::unique_ptr<Device> make_cuda_device(int index);

/// A stream and an event that are given back; the device outlives them.
class Stream {
 public:
  explicit Stream(Device& device) : device_(&device), handle_(device.create_stream()) {}
  Stream(Stream&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)), handle_(other.handle_) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  Stream& operator=(Stream&&) = delete;
  ~Stream() {
    if (device_ != nullptr) device_->destroy(handle_);
  }
  operator StreamHandle() const { return handle_; }
  void* native() const { return handle_.native; }

 private:
  Device* device_;
  StreamHandle handle_;
};

class Event {
 public:
  explicit Event(Device& device) : device_(&device), handle_(device.create_event()) {}
  Event(Event&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)), handle_(other.handle_) {}
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  Event& operator=(Event&&) = delete;
  ~Event() {
    if (device_ != nullptr) device_->destroy(handle_);
  }
  operator EventHandle() const { return handle_; }

 private:
  Device* device_;
  EventHandle handle_;
};

enum class MemoryKind { device, pinned };

/// Memory that is given back.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(Device& device, std::int64_t bytes, MemoryKind kind)
      : device_(&device),
        kind_(kind),
        bytes_(bytes),
        data_(kind == MemoryKind::device ? device.allocate(bytes) : device.allocate_pinned(bytes)) {
  }
  DeviceMemory(DeviceMemory&& other) noexcept { swap(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    DeviceMemory taken(std::move(other));
    swap(taken);
    return *this;
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() {
    if (device_ == nullptr) return;
    kind_ == MemoryKind::device ? device_->free(data_) : device_->free_pinned(data_);
  }

  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  void swap(DeviceMemory& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(kind_, other.kind_);
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
  }

  Device* device_ = nullptr;
  MemoryKind kind_ = MemoryKind::device;
  std::int64_t bytes_ = 0;
  void* data_ = nullptr;
};

}  // namespace tailor
