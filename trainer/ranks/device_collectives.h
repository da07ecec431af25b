#pragma once

#include <cstddef>
#include <memory>

namespace c10d {
class Store;
}

namespace tailor {

/// Collectives on device memory. Its one implementation, over NCCL, is a library that is loaded
/// when a run asks for it (nccl_collectives.cpp): LibTorch's CUDA half takes a second to load,
/// which no run on a CPU should pay. Nothing of Tailor's is in that library, so faults are
/// std::exception.
///
/// Memory must be ready when a call is made; a call starts the work on a stream of its own and
/// returns, and done() tells when it has ended.
class DeviceCollectives {
 public:
  virtual ~DeviceCollectives() = default;
  virtual bool on_device(const void* memory) const = 0;
  virtual void all_gather(const void* mine, void* all, std::size_t part_bytes) = 0;
  /// Parts are exchanged as they are and summed here, in rank order from zero: NCCL's own
  /// reduce-scatter adds in the order of its rings.
  virtual void reduce_scatter(const float* all, float* mine, std::size_t part_count) = 0;
  virtual void broadcast(void* bytes, std::size_t count, int root) = 0;
  /// Whether the last call's work has ended; throws what went wrong in it.
  virtual bool done() = 0;
  /// Ends what is under way; any thread.
  virtual void abort() noexcept = 0;
};

/// What the library exports, as "tailor_open_nccl". `store`: for this communicator alone.
using OpenDeviceCollectives = DeviceCollectives* (*)(c10d::Store* store, int rank, int size,
                                                     long timeout_ms);

}  // namespace tailor
