#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/block_reader.h"
#include "recipes/tile_homes.h"

namespace tailor {

/// Neighbouring units of a store that are read, kept and let go together.
struct RingTile {
  int file = 0;             ///< of the reader
  std::int64_t offset = 0;  ///< in that file
  std::int64_t bytes = 0;
  int pool = 0;                    ///< whose slots it is read into
  TileHome home = TileHome::disk;  ///< on the CPU device and host are both RAM
};

/// Slots of one size for one kind of tile. Kinds have pools of their own so that a lease that is
/// held long (attention, over its layer's experts) cannot starve the others.
struct RingPool {
  std::int64_t slot_bytes = 0;
  int slots = 0;
};

/// Memory that slots and resident tiles are made of: page-aligned; what `keep` holds gives it back.
struct RingMemory {
  std::shared_ptr<void> keep;
  std::byte* data = nullptr;
};
using RingAllocator = std::function<RingMemory(std::int64_t bytes)>;
/// Plain memory of the process.
RingMemory process_memory(std::int64_t bytes);

struct RingCounters {
  std::int64_t streamed_bytes = 0;  ///< of tiles that came from disk, counted when acquired
  std::int64_t tiles_from_disk = 0;
  std::int64_t link_bytes = 0;  ///< copied from RAM to the device
  std::int64_t row_bytes = 0;   ///< of streamed_bytes, rows of the embedding read by index
  double stall_seconds = 0;     ///< that acquire() waited
  // Of tiles that ranks share:
  std::int64_t gathered_bytes = 0;    ///< received from other ranks
  double exchange_seconds = 0;        ///< of exchanging, on a thread of its own
  double exchange_stall_seconds = 0;  ///< of stall_seconds, what reading does not explain
};

/// Brings tiles into memory ahead of their use, in an order known beforehand. One thread calls it.
///
///     source.begin({0, 1, 2, 1, 0});
///     for (...) { const TileSource::Lease lease = source.acquire(t); use(lease.bytes()); }
class TileSource {
 public:
  /// Bytes of a tile while the lease lives. Move-only.
  class Lease {
   public:
    Lease() = default;
    Lease(TileSource* source, std::int64_t ticket, const std::byte* bytes)
        : source_(source), ticket_(ticket), bytes_(bytes) {}
    Lease(Lease&& other) noexcept;
    Lease& operator=(Lease&& other) noexcept;
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease();
    const std::byte* bytes() const { return bytes_; }

   private:
    TileSource* source_ = nullptr;
    std::int64_t ticket_ = 0;
    const std::byte* bytes_ = nullptr;
  };

  virtual ~TileSource() = default;
  /// From here on acquire() is called for `order`, tile by tile. Where the tiles read ahead are
  /// already those (expect()), they are kept; otherwise they are dropped. No lease may be alive.
  virtual void begin(const std::vector<int>& order) = 0;
  /// `order` will be begun after what was begun: reading ahead may go on into it.
  virtual void expect(const std::vector<int>& order) = 0;
  /// Waits for the tile. Throws what went wrong with it; the source is then good for begin() again.
  virtual Lease acquire(int tile) = 0;
  virtual RingCounters counters() const = 0;
  /// RAM of slots and resident tiles.
  virtual std::int64_t memory_bytes() const = 0;

 protected:
  friend class Lease;
  virtual void release(std::int64_t ticket) = 0;
};

/// Tiles from disk into RAM. A thread of its own reads; tiles at home in RAM are read once, at the
/// start. What goes wrong while reading a tile surfaces in acquire() of that tile.
class TileRing final : public TileSource {
 public:
  /// `check` is called on the reading thread with a tile's bytes after every read from disk; it
  /// throws when they are not what they should be. `failed` makes the error for a read that went
  /// wrong. Throws what reading the resident tiles threw.
  struct Checks {
    std::function<void(int tile, const std::byte* bytes)> check;
    std::function<std::exception_ptr(int tile, const BlockDone& done)> failed;
  };
  TileRing(std::vector<RingTile> tiles, std::vector<RingPool> pools,
           std::unique_ptr<BlockReader> reader, Checks checks,
           const RingAllocator& allocate = process_memory);
  ~TileRing() override;
  TileRing(const TileRing&) = delete;
  TileRing& operator=(const TileRing&) = delete;

  void begin(const std::vector<int>& order) override;
  void expect(const std::vector<int>& order) override;
  Lease acquire(int tile) override;
  RingCounters counters() const override;
  std::int64_t memory_bytes() const override { return memory_bytes_; }
  BlockReader::Facts reader_facts() const { return facts_; }

 private:
  enum class State { waiting, reading, ready, failed, leased, released };
  struct Entry {
    int tile = 0;
    State state = State::waiting;
    int slot = -1;  ///< -1: resident
    std::exception_ptr error;
  };
  struct Slot {
    RingMemory memory;
    bool free = true;
  };
  struct Pool {
    std::int64_t slot_bytes = 0;
    std::vector<Slot> slots;
  };

  void load_residents(const RingAllocator& allocate);
  void read_loop();
  bool issue(std::unique_lock<std::mutex>& lock);
  void complete(const BlockDone& done, std::unique_lock<std::mutex>& lock);
  void release(std::int64_t ticket) override;
  void cancel(std::unique_lock<std::mutex>& lock);
  Entry& entry(std::int64_t ticket) {
    return entries_[static_cast<std::size_t>(ticket - first_ticket_)];
  }
  void free_slot(Entry& of);
  void drop_finished();

  std::vector<RingTile> tiles_;
  std::vector<Pool> pools_;
  std::vector<RingMemory> residents_;  ///< by tile; empty where it streams
  std::unique_ptr<BlockReader> reader_;
  BlockReader::Facts facts_;
  Checks checks_;
  std::int64_t memory_bytes_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable to_reader_, to_user_;
  std::deque<Entry> entries_;  ///< the order ahead; a ticket is an index that never repeats
  std::int64_t first_ticket_ = 0;
  std::int64_t next_issue_ = 0, next_acquire_ = 0, begun_end_ = 0;  ///< tickets
  int reading_ = 0;
  bool cancelling_ = false, stopping_ = false;
  std::exception_ptr reader_failure_;
  RingCounters counters_;
  std::thread thread_;
};

}  // namespace tailor
