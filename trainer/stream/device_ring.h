#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "trainer/cuda/device.h"
#include "trainer/stream/tile_ring.h"

namespace tailor {

/// Tiles in a device's memory, copied there ahead of their use from RAM or, through a TileRing,
/// from disk. A thread of its own keeps copies going on a stream of their own; an event tells when
/// a tile is whole, another when a slot's last reader is done, so that neither copies nor computing
/// wait for each other but where they must.
///
/// Homes: device tiles are copied once, at the start; host tiles wait in pinned memory; disk tiles
/// are read into pinned slots first.
class DeviceRing final : public TileSource {
 public:
  struct Options {
    /// The stream whose work reads the tiles. Null: the calling thread reads them itself, on a
    /// device whose memory it sees (RAM as the device).
    StreamHandle compute;
    /// For tests: fills a slot with 0xFF when its lease ends.
    bool poison_released = false;
  };
  /// `tiles`, `checks` and `reader` as a TileRing takes them; `host_pools` its slots,
  /// `device_pools` those on the device. The device outlives this.
  DeviceRing(Device& device, std::vector<RingTile> tiles, std::vector<RingPool> host_pools,
             std::vector<RingPool> device_pools, std::unique_ptr<BlockReader> reader,
             TileRing::Checks checks, Options options);
  ~DeviceRing() override;
  DeviceRing(const DeviceRing&) = delete;
  DeviceRing& operator=(const DeviceRing&) = delete;

  void begin(const std::vector<int>& order) override;
  void expect(const std::vector<int>& order) override;
  /// The tile is whole for work submitted to the compute stream from now on.
  Lease acquire(int tile) override;
  /// stall_seconds: that this thread waited for tiles; row_bytes and streamed_bytes as of the ring
  /// below.
  RingCounters counters() const override;
  std::int64_t memory_bytes() const override { return host_->memory_bytes(); }
  std::int64_t device_bytes() const { return device_bytes_; }

 private:
  enum class State { waiting, copying, failed, leased, released };
  struct Entry {
    int tile = 0;
    State state = State::waiting;
    int slot = -1;  ///< -1: resident
    std::exception_ptr error;
  };
  struct Slot {
    DeviceMemory memory;
    std::unique_ptr<Event> whole, unused;
    bool free = true;
  };
  struct Pool {
    std::vector<Slot> slots;
  };
  /// A lease of the ring below, kept until the copy out of it has ended.
  struct Source {
    Lease lease;
    const Event* copied = nullptr;
  };

  void load_residents(const std::vector<RingTile>& tiles);
  void copy_loop();
  bool copy_next(std::unique_lock<std::mutex>& lock);
  void let_sources_go(bool wait_for_all);
  void release(std::int64_t ticket) override;
  void stop_copying(std::unique_lock<std::mutex>& lock);
  std::vector<int> below(const std::vector<int>& order) const;
  Slot& slot_of(const Entry& of);
  Entry& entry(std::int64_t ticket) {
    return entries_[static_cast<std::size_t>(ticket - first_ticket_)];
  }
  std::int64_t end_ticket() const {
    return first_ticket_ + static_cast<std::int64_t>(entries_.size());
  }

  Device& device_;
  std::vector<RingTile> tiles_;
  Options options_;
  std::unique_ptr<TileRing> host_;
  Stream copies_;
  std::vector<Pool> pools_;
  std::vector<DeviceMemory> residents_;  ///< by tile; empty where it is not at home on the device
  std::int64_t device_bytes_ = 0;
  RingCounters before_;  ///< what loading the residents counted

  mutable std::mutex mutex_;
  std::condition_variable to_copier_, to_user_;
  std::deque<Entry> entries_;
  std::int64_t first_ticket_ = 0, next_copy_ = 0, next_acquire_ = 0, begun_end_ = 0;
  bool busy_ = false, paused_ = false, stopping_ = false;
  std::deque<Source> sources_;  ///< of the copying thread alone, but while it is paused
  double stall_seconds_ = 0;
  std::int64_t link_bytes_ = 0;
  std::thread thread_;
};

}  // namespace tailor
