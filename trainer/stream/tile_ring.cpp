#include "trainer/stream/tile_ring.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/aligned_memory.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/units.h"

namespace tailor {

TileSource::Lease::Lease(Lease&& other) noexcept
    : source_(std::exchange(other.source_, nullptr)),
      ticket_(other.ticket_),
      bytes_(std::exchange(other.bytes_, nullptr)) {}

TileSource::Lease& TileSource::Lease::operator=(Lease&& other) noexcept {
  if (this == &other) return *this;
  if (source_ != nullptr) source_->release(ticket_);
  source_ = std::exchange(other.source_, nullptr);
  ticket_ = other.ticket_;
  bytes_ = std::exchange(other.bytes_, nullptr);
  return *this;
}

TileSource::Lease::~Lease() {
  if (source_ != nullptr) source_->release(ticket_);
}

RingMemory process_memory(std::int64_t bytes) {
  auto memory = std::make_shared<AlignedMemory>(bytes, true);
  std::byte* data = memory->data();
  return {std::move(memory), data};
}

TileRing::TileRing(std::vector<RingTile> tiles, std::vector<RingPool> pools,
                   std::unique_ptr<BlockReader> reader, Checks checks,
                   const RingAllocator& allocate)
    : tiles_(std::move(tiles)), reader_(std::move(reader)), checks_(std::move(checks)) {
  for (const RingTile& tile : tiles_) {
    TAILOR_CHECK(tile.pool >= 0 && tile.pool < static_cast<int>(pools.size()) &&
                 tile.bytes % kBlockBytes == 0 && tile.offset % kBlockBytes == 0);
    TAILOR_CHECK(tile.home != TileHome::disk ||
                 tile.bytes <= pools[static_cast<std::size_t>(tile.pool)].slot_bytes);
  }
  for (const RingPool& pool : pools) {
    Pool made;
    made.slot_bytes = pool.slot_bytes;
    for (int s = 0; s < pool.slots && pool.slot_bytes > 0; ++s) {
      made.slots.push_back({allocate(pool.slot_bytes), true});
      memory_bytes_ += pool.slot_bytes;
    }
    pools_.push_back(std::move(made));
  }
  load_residents(allocate);
  facts_ = reader_->facts();
  thread_ = std::thread([this] { read_loop(); });
}

TileRing::~TileRing() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  to_reader_.notify_all();
  thread_.join();
}

void TileRing::load_residents(const RingAllocator& allocate) {
  residents_.resize(tiles_.size());
  // A few at a time: enough to keep a disk busy, and an error ends it early.
  constexpr std::size_t kInFlight = 4;
  std::size_t next = 0;
  const auto finish_one = [&] {
    const BlockDone done = reader_->wait();
    const int tile = narrow<int>(static_cast<std::int64_t>(done.tag));
    if (!done.good()) {
      std::rethrow_exception(checks_.failed(tile, done));
    }
    if (checks_.check) checks_.check(tile, residents_[static_cast<std::size_t>(tile)].data);
  };
  for (; next < tiles_.size(); ++next) {
    const RingTile& tile = tiles_[next];
    if (tile.home == TileHome::disk) continue;
    residents_[next] = allocate(tile.bytes);
    memory_bytes_ += tile.bytes;
    if (reader_->in_flight() >= kInFlight) finish_one();
    reader_->submit({tile.file, tile.offset, tile.bytes, tile.bytes, residents_[next].data,
                     static_cast<std::uint64_t>(next)});
  }
  while (reader_->in_flight() > 0) finish_one();
}

void TileRing::begin(const std::vector<int>& order) {
  std::unique_lock lock(mutex_);
  TAILOR_CHECK(next_acquire_ <= begun_end_);
  bool kept = next_acquire_ == begun_end_;
  const auto ahead = first_ticket_ + narrow<std::int64_t>(entries_.size()) - begun_end_;
  kept = kept && ahead >= narrow<std::int64_t>(order.size());
  for (std::size_t i = 0; kept && i < order.size(); ++i) {
    kept = entry(begun_end_ + narrow<std::int64_t>(i)).tile == order[i];
  }
  if (!kept) {
    cancel(lock);
    for (const int tile : order) entries_.push_back({tile, State::waiting, -1, nullptr});
  }
  begun_end_ += narrow<std::int64_t>(order.size());
  lock.unlock();
  to_reader_.notify_all();
}

void TileRing::expect(const std::vector<int>& order) {
  {
    const std::lock_guard lock(mutex_);
    // One order ahead at most: more would only pile up.
    if (first_ticket_ + narrow<std::int64_t>(entries_.size()) > begun_end_) return;
    for (const int tile : order) entries_.push_back({tile, State::waiting, -1, nullptr});
  }
  to_reader_.notify_all();
}

/// Forgets all that lies ahead. Reads under way are waited for: their slots are being written to.
void TileRing::cancel(std::unique_lock<std::mutex>& lock) {
  cancelling_ = true;
  to_reader_.notify_all();
  to_user_.wait(lock, [this] { return reading_ == 0; });
  for (Entry& e : entries_) {
    TAILOR_CHECK(e.state != State::leased, "a lease outlives its pass");
    free_slot(e);
  }
  first_ticket_ += narrow<std::int64_t>(entries_.size());
  entries_.clear();
  next_issue_ = next_acquire_ = begun_end_ = first_ticket_;
  cancelling_ = false;
}

TileRing::Lease TileRing::acquire(int tile) {
  std::unique_lock lock(mutex_);
  TAILOR_CHECK(next_acquire_ < begun_end_ && entry(next_acquire_).tile == tile,
               "tiles are acquired in the order begun");
  const std::int64_t ticket = next_acquire_;
  Entry& mine = entry(ticket);
  const auto arrived = [&] {
    return mine.state == State::ready || mine.state == State::failed || reader_failure_;
  };
  if (!arrived()) {
    const double began = seconds_now();
    to_user_.wait(lock, arrived);
    counters_.stall_seconds += seconds_now() - began;
  }
  if (reader_failure_) std::rethrow_exception(reader_failure_);
  if (mine.state == State::failed) std::rethrow_exception(mine.error);
  ++next_acquire_;
  mine.state = State::leased;
  const RingTile& which = tiles_[static_cast<std::size_t>(tile)];
  if (mine.slot < 0) {
    return {this, ticket, residents_[static_cast<std::size_t>(tile)].data};
  }
  counters_.streamed_bytes += which.bytes;
  ++counters_.tiles_from_disk;
  const Pool& pool = pools_[static_cast<std::size_t>(which.pool)];
  return {this, ticket, pool.slots[static_cast<std::size_t>(mine.slot)].memory.data};
}

void TileRing::free_slot(Entry& of) {
  if (of.slot < 0) return;
  Slot& slot = pools_[static_cast<std::size_t>(tiles_[static_cast<std::size_t>(of.tile)].pool)]
                   .slots[static_cast<std::size_t>(of.slot)];
#ifndef NDEBUG
  const RingTile& tile = tiles_[static_cast<std::size_t>(of.tile)];
  std::memset(slot.memory.data, 0xFF, static_cast<std::size_t>(tile.bytes));  // NaN in all formats
#endif
  slot.free = true;
  of.slot = -1;
}

void TileRing::release(std::int64_t ticket) {
  {
    const std::lock_guard lock(mutex_);
    Entry& mine = entry(ticket);
    free_slot(mine);
    mine.state = State::released;
    drop_finished();
  }
  to_reader_.notify_all();
}

void TileRing::drop_finished() {
  while (!entries_.empty() && entries_.front().state == State::released) {
    entries_.pop_front();
    ++first_ticket_;
  }
}

RingCounters TileRing::counters() const {
  const std::lock_guard lock(mutex_);
  return counters_;
}

// ------------------------------------------------------------------ the reading thread

/// Submits what has a slot. False when nothing can be submitted now.
bool TileRing::issue(std::unique_lock<std::mutex>& lock) {
  static_cast<void>(lock);
  bool any = false;
  while (!cancelling_ && next_issue_ < first_ticket_ + narrow<std::int64_t>(entries_.size())) {
    Entry& next = entry(next_issue_);
    const RingTile& tile = tiles_[static_cast<std::size_t>(next.tile)];
    if (tile.home != TileHome::disk) {
      next.state = State::ready;
      ++next_issue_;
      any = true;
      to_user_.notify_all();
      continue;
    }
    auto& slots = pools_[static_cast<std::size_t>(tile.pool)].slots;
    const auto slot =
        std::find_if(slots.begin(), slots.end(), [](const Slot& each) { return each.free; });
    if (slot == slots.end()) break;
    slot->free = false;
    next.slot = narrow<int>(slot - slots.begin());
    next.state = State::reading;
    ++reading_;
    reader_->submit({tile.file, tile.offset, tile.bytes, tile.bytes, slot->memory.data,
                     static_cast<std::uint64_t>(next_issue_)});
    ++next_issue_;
    any = true;
  }
  return any;
}

void TileRing::complete(const BlockDone& done, std::unique_lock<std::mutex>& lock) {
  Entry& mine = entry(static_cast<std::int64_t>(done.tag));
  const int tile = mine.tile;
  const std::byte* bytes =
      pools_[static_cast<std::size_t>(tiles_[static_cast<std::size_t>(tile)].pool)]
          .slots[static_cast<std::size_t>(mine.slot)]
          .memory.data;
  std::exception_ptr error;
  lock.unlock();  // hashing takes time, and the entry is nobody else's while it is being read
  try {
    if (!done.good()) {
      error = checks_.failed(tile, done);
    } else if (checks_.check) {
      checks_.check(tile, bytes);
    }
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  Entry& again = entry(static_cast<std::int64_t>(done.tag));
  again.error = error;
  again.state = error ? State::failed : State::ready;
  --reading_;
  to_user_.notify_all();
}

void TileRing::read_loop() {
  std::unique_lock lock(mutex_);
  try {
    while (true) {
      issue(lock);
      if (reading_ > 0) {
        lock.unlock();
        const BlockDone done = reader_->wait();
        lock.lock();
        complete(done, lock);
        continue;
      }
      if (stopping_) return;
      to_reader_.wait(lock);
    }
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    reader_failure_ = std::current_exception();
    reading_ = 0;
    to_user_.notify_all();
  }
}

}  // namespace tailor
