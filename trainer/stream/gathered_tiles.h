#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "trainer/ranks/ranks.h"
#include "trainer/stream/tile_ring.h"

namespace tailor {

/// A rank's part of a tile that N ranks share: bytes [offset, offset + bytes) of it. Every rank's
/// part takes `part_bytes` of the gathered tile, align_up(tile / N, 4096); the last ones may hold
/// less, or nothing.
struct TileShare {
  std::int64_t offset = 0, bytes = 0, part_bytes = 0;
};
TileShare tile_share(std::int64_t tile_bytes, int rank, int ranks);

/// Tiles whose parts lie with the ranks of a group, gathered packed just ahead of their use: FSDP's
/// all-gather, on 4-bit bytes. A rank holds, or reads from its disk, its part of each tile alone; a
/// thread of its own gathers whole tiles into slots.
///
/// All ranks use it in the same way: the same begin(), expect(), acquire() and the same ends of
/// leases, in one order. What is gathered ahead depends on these calls and on nothing else, so that
/// ranks that run at their own pace still make the same exchanges in one order.
///
/// After a failure (a part that cannot be read, a rank that is gone) every acquire() throws it: the
/// others cannot be told to begin again.
class GatheredTiles final : public TileSource {
 public:
  /// `tiles` are whole ones: bytes and pool matter, where they come from is the business of
  /// `parts`, whose tile part_of[t] is this rank's part of tile t; -1: it has none. `pools`:
  /// slots of whole tiles. `group` is used by nobody else.
  /// `check` is called on the gathering thread with a whole tile's bytes after every exchange.
  GatheredTiles(const std::vector<RingTile>& tiles, std::vector<int> part_of,
                const std::vector<RingPool>& pools, std::unique_ptr<TileSource> parts,
                std::unique_ptr<Ranks> group,
                std::function<void(int tile, const std::byte* bytes)> check = {},
                const RingAllocator& allocate = process_memory);
  /// Ends with the other ranks, unless it is a failure that ends it.
  ~GatheredTiles() override;
  GatheredTiles(const GatheredTiles&) = delete;
  GatheredTiles& operator=(const GatheredTiles&) = delete;

  void begin(const std::vector<int>& order) override;
  void expect(const std::vector<int>& order) override;
  Lease acquire(int tile) override;
  /// Streamed bytes are this rank's own, from its disk. Stalls are waiting for tiles, whatever the
  /// reason; RingCounters::exchange_stall_seconds those of it that reading does not explain.
  RingCounters counters() const override;
  std::int64_t memory_bytes() const override;
  RankTraffic traffic() const;

 private:
  enum class State { waiting, issued, ready, leased, released };
  struct Entry {
    int tile = 0;
    State state = State::waiting;
    int slot = -1;
  };
  /// What the thread does, in the order it was asked to.
  struct Task {
    enum class Kind { begin, expect, gather } kind = Kind::gather;
    std::vector<int> order;  ///< of parts
    std::int64_t ticket = 0;
  };
  struct PassAhead {
    std::vector<int> parts;  ///< their order
    std::int64_t first_ticket = 0;
    bool begun = false, expected = false;  ///< the thread was asked to
  };
  struct Slot {
    RingMemory memory;
    bool free = true;
  };

  void release(std::int64_t ticket) override;
  void append(const std::vector<int>& order);
  void issue();
  void wait_until_gathered(std::unique_lock<std::mutex>& lock);
  void work();
  void gather(std::int64_t ticket, std::unique_lock<std::mutex>& lock);
  Entry& entry(std::int64_t ticket) {
    return entries_[static_cast<std::size_t>(ticket - first_ticket_)];
  }
  std::int64_t end_ticket() const {
    return first_ticket_ + static_cast<std::int64_t>(entries_.size());
  }

  std::vector<RingTile> tiles_;
  std::vector<int> part_of_;
  std::vector<std::vector<Slot>> pools_;
  std::unique_ptr<TileSource> parts_;
  std::unique_ptr<Ranks> group_;
  std::function<void(int, const std::byte*)> check_;
  std::int64_t slot_bytes_ = 0;
  int exceptions_at_birth_;

  mutable std::mutex mutex_;
  std::condition_variable to_thread_, to_user_;
  std::deque<Entry> entries_;  ///< the order ahead; a ticket is an index that never repeats
  std::deque<PassAhead> passes_;
  std::deque<Task> tasks_;
  std::int64_t first_ticket_ = 0;
  std::int64_t next_issue_ = 0, next_acquire_ = 0, begun_end_ = 0;  ///< tickets
  bool busy_ = false, stop_ = false;
  std::exception_ptr failure_;
  RingCounters counters_;
  RankTraffic traffic_;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace tailor
