#include "trainer/stream/device_ring.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/clock.h"
#include "base/error.h"
#include "base/units.h"

namespace tailor {
namespace {

/// For the ring below, what is at home on the device comes from disk: once.
std::vector<RingTile> without_device(std::vector<RingTile> tiles) {
  for (RingTile& tile : tiles) {
    if (tile.home == TileHome::device) tile.home = TileHome::disk;
  }
  return tiles;
}

/// Slots of the ring below must also hold what passes through them once.
std::vector<RingPool> with_room_for(std::vector<RingPool> pools,
                                    const std::vector<RingTile>& tiles) {
  for (const RingTile& tile : tiles) {
    if (tile.home == TileHome::host) continue;
    RingPool& pool = pools[static_cast<std::size_t>(tile.pool)];
    pool.slot_bytes = std::max(pool.slot_bytes, tile.bytes);
    pool.slots = std::max(pool.slots, 2);
  }
  return pools;
}

RingAllocator pinned(Device& device) {
  return [&device](std::int64_t bytes) {
    auto memory = std::make_shared<DeviceMemory>(device, bytes, MemoryKind::pinned);
    auto* data = memory->as<std::byte>();
    return RingMemory{std::move(memory), data};
  };
}

}  // namespace

DeviceRing::DeviceRing(Device& device, std::vector<RingTile> tiles,
                       std::vector<RingPool> host_pools, std::vector<RingPool> device_pools,
                       std::unique_ptr<BlockReader> reader, TileRing::Checks checks,
                       Options options)
    : device_(device),
      tiles_(std::move(tiles)),
      options_(options),
      host_(std::make_unique<TileRing>(without_device(tiles_),
                                       with_room_for(std::move(host_pools), tiles_),
                                       std::move(reader), std::move(checks), pinned(device))),
      copies_(device) {
  for (const RingPool& pool : device_pools) {
    Pool made;
    for (int s = 0; s < pool.slots && pool.slot_bytes > 0; ++s) {
      made.slots.push_back({DeviceMemory(device, pool.slot_bytes, MemoryKind::device),
                            std::make_unique<Event>(device), std::make_unique<Event>(device),
                            true});
      device_bytes_ += pool.slot_bytes;
    }
    pools_.push_back(std::move(made));
  }
  for (const RingTile& tile : tiles_) {
    TAILOR_CHECK(tile.home == TileHome::device ||
                 tile.bytes <= device_pools[static_cast<std::size_t>(tile.pool)].slot_bytes);
  }
  load_residents(tiles_);
  thread_ = std::thread([this] { copy_loop(); });
}

DeviceRing::~DeviceRing() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  to_copier_.notify_all();
  thread_.join();
  device_.synchronise(copies_);
  sources_.clear();
}

void DeviceRing::load_residents(const std::vector<RingTile>& tiles) {
  residents_.resize(tiles.size());
  std::vector<int> order;
  for (std::size_t t = 0; t < tiles.size(); ++t) {
    if (tiles[t].home == TileHome::device) order.push_back(narrow<int>(static_cast<long long>(t)));
  }
  host_->begin(order);
  for (const int tile : order) {
    const std::int64_t bytes = tiles_[static_cast<std::size_t>(tile)].bytes;
    DeviceMemory& memory = residents_[static_cast<std::size_t>(tile)];
    memory = DeviceMemory(device_, bytes, MemoryKind::device);
    device_bytes_ += bytes;
    const Lease lease = host_->acquire(tile);
    device_.copy_async(memory.data(), lease.bytes(), bytes, CopyKind::host_to_device, copies_);
    device_.synchronise(copies_);
  }
  before_ = host_->counters();
}

/// What of an order the ring below is asked for.
std::vector<int> DeviceRing::below(const std::vector<int>& order) const {
  std::vector<int> out;
  for (const int tile : order) {
    if (tiles_[static_cast<std::size_t>(tile)].home != TileHome::device) out.push_back(tile);
  }
  return out;
}

DeviceRing::Slot& DeviceRing::slot_of(const Entry& of) {
  const RingTile& tile = tiles_[static_cast<std::size_t>(of.tile)];
  return pools_[static_cast<std::size_t>(tile.pool)].slots[static_cast<std::size_t>(of.slot)];
}

void DeviceRing::begin(const std::vector<int>& order) {
  std::unique_lock lock(mutex_);
  bool kept = next_acquire_ == begun_end_ &&
              end_ticket() - begun_end_ >= narrow<std::int64_t>(order.size());
  for (std::size_t i = 0; kept && i < order.size(); ++i) {
    kept = entry(begun_end_ + narrow<std::int64_t>(i)).tile == order[i];
  }
  if (!kept) {
    stop_copying(lock);
    host_->begin(below(order));
    for (const int tile : order) entries_.push_back({tile, State::waiting, -1, nullptr});
    paused_ = false;
  } else {
    host_->begin(below(order));
  }
  begun_end_ += narrow<std::int64_t>(order.size());
  lock.unlock();
  to_copier_.notify_all();
}

void DeviceRing::expect(const std::vector<int>& order) {
  // The ring below reads ahead; copies into the next pass begin when it has begun.
  host_->expect(below(order));
}

/// Forgets what lies ahead, and leaves the copying thread paused.
void DeviceRing::stop_copying(std::unique_lock<std::mutex>& lock) {
  paused_ = true;
  to_copier_.notify_all();
  to_user_.wait(lock, [this] { return !busy_; });
  device_.synchronise(copies_);
  sources_.clear();
  for (Entry& each : entries_) {
    TAILOR_CHECK(each.state != State::leased, "a lease outlives its pass");
    if (each.slot >= 0) slot_of(each).free = true;
  }
  first_ticket_ = end_ticket();
  entries_.clear();
  next_copy_ = next_acquire_ = begun_end_ = first_ticket_;
}

TileSource::Lease DeviceRing::acquire(int tile) {
  std::unique_lock lock(mutex_);
  TAILOR_CHECK(next_acquire_ < begun_end_ && entry(next_acquire_).tile == tile,
               "tiles are acquired in the order begun");
  const std::int64_t ticket = next_acquire_;
  Entry& mine = entry(ticket);
  const double began = seconds_now();
  to_user_.wait(lock, [&] { return mine.state != State::waiting; });
  if (mine.state == State::failed) {
    stall_seconds_ += seconds_now() - began;
    std::rethrow_exception(mine.error);
  }
  ++next_acquire_;
  mine.state = State::leased;
  const std::byte* bytes = nullptr;
  if (mine.slot < 0) {
    bytes = residents_[static_cast<std::size_t>(tile)].as<std::byte>();
  } else {
    Slot& slot = slot_of(mine);
    bytes = slot.memory.as<std::byte>();
    if (options_.compute.native != nullptr) {
      device_.wait(options_.compute, *slot.whole);
    } else {
      lock.unlock();
      device_.synchronise(*slot.whole);
      lock.lock();
    }
  }
  stall_seconds_ += seconds_now() - began;
  return {this, ticket, bytes};
}

void DeviceRing::release(std::int64_t ticket) {
  {
    const std::lock_guard lock(mutex_);
    Entry& mine = entry(ticket);
    if (mine.slot >= 0) {
      Slot& slot = slot_of(mine);
      if (options_.compute.native != nullptr) {
        device_.record(*slot.unused, options_.compute);
      } else if (options_.poison_released) {
        std::memset(slot.memory.data(), 0xFF,
                    static_cast<std::size_t>(tiles_[static_cast<std::size_t>(mine.tile)].bytes));
      }
      slot.free = true;
      mine.slot = -1;
    }
    mine.state = State::released;
    while (!entries_.empty() && entries_.front().state == State::released) {
      entries_.pop_front();
      ++first_ticket_;
    }
  }
  to_copier_.notify_all();
}

RingCounters DeviceRing::counters() const {
  RingCounters out = host_->counters();
  const std::lock_guard lock(mutex_);
  out.streamed_bytes -= before_.streamed_bytes;
  out.tiles_from_disk -= before_.tiles_from_disk;
  out.stall_seconds = stall_seconds_;
  out.link_bytes = link_bytes_;
  return out;
}

// ------------------------------------------------------------------ the copying thread

/// Lets go of memory below that no copy reads any more.
void DeviceRing::let_sources_go(bool wait_for_all) {
  while (!sources_.empty()) {
    if (!device_.poll(*sources_.front().copied)) {
      if (!wait_for_all) return;
      device_.synchronise(*sources_.front().copied);
    }
    sources_.pop_front();
  }
}

/// Copies the next tile if it has a slot. False when there is nothing to do now.
bool DeviceRing::copy_next(std::unique_lock<std::mutex>& lock) {
  if (paused_ || next_copy_ >= begun_end_) return false;
  const std::int64_t ticket = next_copy_;
  Entry& next = entry(ticket);
  const RingTile& tile = tiles_[static_cast<std::size_t>(next.tile)];
  if (tile.home == TileHome::device) {
    next.state = State::copying;  // whole since the start
    ++next_copy_;
    to_user_.notify_all();
    return true;
  }
  auto& slots = pools_[static_cast<std::size_t>(tile.pool)].slots;
  const auto slot = std::find_if(slots.begin(), slots.end(), [](const Slot& s) { return s.free; });
  if (slot == slots.end()) return false;
  slot->free = false;
  next.slot = narrow<int>(slot - slots.begin());
  ++next_copy_;
  busy_ = true;
  lock.unlock();
  std::exception_ptr error;
  try {
    // The ring below may need the slots that finished copies still hold.
    let_sources_go(sources_.size() > 1);
    Lease lease = host_->acquire(next.tile);
    if (options_.compute.native != nullptr) device_.wait(copies_, *slot->unused);
    device_.copy_async(slot->memory.data(), lease.bytes(), tile.bytes, CopyKind::host_to_device,
                       copies_);
    device_.record(*slot->whole, copies_);
    sources_.push_back({std::move(lease), slot->whole.get()});
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  busy_ = false;
  if (!error) link_bytes_ += tile.bytes;
  next.error = error;
  next.state = error ? State::failed : State::copying;
  to_user_.notify_all();
  return true;
}

void DeviceRing::copy_loop() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (copy_next(lock)) continue;
    if (!sources_.empty() && !paused_) {
      // Memory below is let go as copies end, also while there is nothing to copy.
      busy_ = true;
      lock.unlock();
      let_sources_go(false);
      lock.lock();
      busy_ = false;
      to_user_.notify_all();
      to_copier_.wait_for(lock, std::chrono::milliseconds(sources_.empty() ? 50 : 1));
      continue;
    }
    to_copier_.wait(lock);
  }
}

}  // namespace tailor
