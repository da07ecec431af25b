#include "trainer/stream/gathered_tiles.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/aligned_memory.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/thread_name.h"
#include "base/units.h"

namespace tailor {

TileShare tile_share(std::int64_t tile_bytes, int rank, int ranks) {
  TileShare out;
  out.part_bytes = align_up(div_ceil(tile_bytes, ranks), kBlockBytes);
  out.offset = std::min(tile_bytes, rank * out.part_bytes);
  out.bytes = std::min(out.part_bytes, tile_bytes - out.offset);
  return out;
}

GatheredTiles::GatheredTiles(const std::vector<RingTile>& tiles, std::vector<int> part_of,
                             const std::vector<RingPool>& pools, std::unique_ptr<TileSource> parts,
                             std::unique_ptr<Ranks> group,
                             std::function<void(int, const std::byte*)> check,
                             const RingAllocator& allocate)
    : tiles_(tiles),
      part_of_(std::move(part_of)),
      parts_(std::move(parts)),
      group_(std::move(group)),
      check_(std::move(check)),
      exceptions_at_birth_(std::uncaught_exceptions()) {
  const int N = group_->size();
  TAILOR_CHECK(part_of_.size() == tiles_.size());
  std::vector<std::int64_t> largest(pools.size(), 0);
  for (std::size_t t = 0; t < tiles_.size(); ++t) {
    const TileShare share = tile_share(tiles_[t].bytes, group_->rank(), N);
    TAILOR_CHECK((part_of_[t] < 0) == (share.bytes == 0));
    std::int64_t& most = largest[static_cast<std::size_t>(tiles_[t].pool)];
    most = std::max(most, share.part_bytes * N);
  }
  for (std::size_t p = 0; p < pools.size(); ++p) {
    pools_.emplace_back();
    TAILOR_CHECK(largest[p] == 0 || pools[p].slots > 0);
    for (int s = 0; s < pools[p].slots && largest[p] > 0; ++s) {
      pools_.back().push_back({allocate(largest[p]), true});
      slot_bytes_ += largest[p];
    }
  }
  thread_ = std::thread([this] { work(); });
}

GatheredTiles::~GatheredTiles() {
  {
    std::unique_lock lock(mutex_);
    const bool failing = failure_ || std::uncaught_exceptions() > exceptions_at_birth_;
    // What was issued, the other ranks have issued too: they are waiting for our part.
    if (failing) {
      group_->abort();
    } else {
      wait_until_gathered(lock);
    }
    stop_ = true;
  }
  to_thread_.notify_all();
  thread_.join();
}

void GatheredTiles::append(const std::vector<int>& order) {
  PassAhead pass;
  pass.first_ticket = end_ticket();
  for (const int tile : order) {
    entries_.push_back({tile, State::waiting, -1});
    const int part = part_of_[static_cast<std::size_t>(tile)];
    if (part >= 0) pass.parts.push_back(part);
  }
  passes_.push_back(std::move(pass));
}

void GatheredTiles::begin(const std::vector<int>& order) {
  {
    std::unique_lock lock(mutex_);
    if (failure_) std::rethrow_exception(failure_);
    TAILOR_CHECK(next_acquire_ <= begun_end_);
    const auto count = narrow<std::int64_t>(order.size());
    bool kept = next_acquire_ == begun_end_ && end_ticket() - begun_end_ >= count;
    for (std::size_t i = 0; kept && i < order.size(); ++i) {
      kept = entry(begun_end_ + narrow<std::int64_t>(i)).tile == order[i];
    }
    if (!kept) {
      // Dropped only once they are here: the other ranks gather them as well.
      wait_until_gathered(lock);
      if (failure_) std::rethrow_exception(failure_);
      for (Entry& each : entries_) {
        TAILOR_CHECK(each.state != State::leased, "a lease outlives its pass");
        if (each.slot < 0) continue;
        pools_[static_cast<std::size_t>(tiles_[static_cast<std::size_t>(each.tile)].pool)]
              [static_cast<std::size_t>(each.slot)]
                  .free = true;
      }
      first_ticket_ = end_ticket();
      entries_.clear();
      passes_.clear();
      next_issue_ = next_acquire_ = begun_end_ = first_ticket_;
      append(order);
    }
    begun_end_ += count;
    issue();
  }
  to_thread_.notify_all();
}

void GatheredTiles::expect(const std::vector<int>& order) {
  {
    const std::lock_guard lock(mutex_);
    if (end_ticket() > begun_end_) return;  // one order ahead at most
    append(order);
    issue();
  }
  to_thread_.notify_all();
}

/// Asks for what has a slot. Only ever called from the user's calls, so that all ranks ask for the
/// same in one order.
void GatheredTiles::issue() {
  const auto tell = [&] {
    for (std::size_t p = 0; p < passes_.size(); ++p) {
      PassAhead& pass = passes_[p];
      if (!pass.begun && next_issue_ >= pass.first_ticket && next_issue_ < end_ticket()) {
        pass.begun = true;
        tasks_.push_back({Task::Kind::begin, pass.parts, 0});
      }
      if (!pass.begun && !pass.expected && p > 0 && passes_[p - 1].begun) {
        pass.expected = true;
        tasks_.push_back({Task::Kind::expect, pass.parts, 0});
      }
    }
    // Passes that lie behind are told and done.
    while (passes_.size() > 1 && passes_[1].begun) passes_.pop_front();
  };
  tell();
  while (next_issue_ < end_ticket()) {
    Entry& next = entry(next_issue_);
    auto& slots =
        pools_[static_cast<std::size_t>(tiles_[static_cast<std::size_t>(next.tile)].pool)];
    const auto slot =
        std::find_if(slots.begin(), slots.end(), [](const Slot& s) { return s.free; });
    if (slot == slots.end()) break;
    slot->free = false;
    next.slot = narrow<int>(slot - slots.begin());
    next.state = State::issued;
    tell();
    tasks_.push_back({Task::Kind::gather, {}, next_issue_});
    ++next_issue_;
  }
}

void GatheredTiles::wait_until_gathered(std::unique_lock<std::mutex>& lock) {
  to_user_.wait(lock, [this] { return failure_ || (tasks_.empty() && !busy_); });
}

GatheredTiles::Lease GatheredTiles::acquire(int tile) {
  std::unique_lock lock(mutex_);
  TAILOR_CHECK(next_acquire_ < begun_end_ && entry(next_acquire_).tile == tile,
               "tiles are acquired in the order begun");
  const std::int64_t ticket = next_acquire_;
  const auto arrived = [&] { return failure_ || entry(ticket).state == State::ready; };
  if (!arrived()) {
    const double began = seconds_now();
    const double read_before = parts_->counters().stall_seconds;
    to_user_.wait(lock, arrived);
    const double waited = seconds_now() - began;
    counters_.stall_seconds += waited;
    counters_.exchange_stall_seconds +=
        std::max(0.0, waited - (parts_->counters().stall_seconds - read_before));
  }
  if (failure_) std::rethrow_exception(failure_);
  ++next_acquire_;
  Entry& mine = entry(ticket);
  mine.state = State::leased;
  const auto pool = static_cast<std::size_t>(tiles_[static_cast<std::size_t>(tile)].pool);
  return {this, ticket, pools_[pool][static_cast<std::size_t>(mine.slot)].memory.data};
}

void GatheredTiles::release(std::int64_t ticket) {
  {
    const std::lock_guard lock(mutex_);
    Entry& mine = entry(ticket);
    pools_[static_cast<std::size_t>(tiles_[static_cast<std::size_t>(mine.tile)].pool)]
          [static_cast<std::size_t>(mine.slot)]
              .free = true;
    mine.slot = -1;
    mine.state = State::released;
    while (!entries_.empty() && entries_.front().state == State::released) {
      entries_.pop_front();
      ++first_ticket_;
    }
    if (!failure_) issue();
  }
  to_thread_.notify_all();
}

RingCounters GatheredTiles::counters() const {
  RingCounters out = parts_->counters();
  const std::lock_guard lock(mutex_);
  out.stall_seconds = counters_.stall_seconds;
  out.exchange_stall_seconds = counters_.exchange_stall_seconds;
  out.gathered_bytes = counters_.gathered_bytes;
  out.exchange_seconds = counters_.exchange_seconds;
  return out;
}

std::int64_t GatheredTiles::memory_bytes() const { return slot_bytes_ + parts_->memory_bytes(); }

RankTraffic GatheredTiles::traffic() const {
  const std::lock_guard lock(mutex_);
  return traffic_;
}

// ------------------------------------------------------------------ the gathering thread

void GatheredTiles::work() {
  name_this_thread("gather-tiles");
  std::unique_lock lock(mutex_);
  try {
    while (true) {
      to_thread_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
      if (stop_) return;
      Task task = std::move(tasks_.front());
      tasks_.pop_front();
      busy_ = true;
      if (task.kind == Task::Kind::gather) {
        gather(task.ticket, lock);
      } else {
        lock.unlock();
        if (task.kind == Task::Kind::begin) {
          parts_->begin(task.order);
        } else {
          parts_->expect(task.order);
        }
        lock.lock();
      }
      busy_ = false;
      to_user_.notify_all();
    }
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    failure_ = std::current_exception();
    busy_ = false;
    tasks_.clear();
    to_user_.notify_all();
  }
}

void GatheredTiles::gather(std::int64_t ticket, std::unique_lock<std::mutex>& lock) {
  const Entry mine = entry(ticket);
  const auto tile = static_cast<std::size_t>(mine.tile);
  std::byte* const to =
      pools_[static_cast<std::size_t>(tiles_[tile].pool)][static_cast<std::size_t>(mine.slot)]
          .memory.data;
  const TileShare share = tile_share(tiles_[tile].bytes, group_->rank(), group_->size());
  lock.unlock();
  const auto part = static_cast<std::size_t>(share.part_bytes);
  const std::span<std::byte> all(to, part * static_cast<std::size_t>(group_->size()));
  double began = 0;
  {
    // A part that is shorter than the others' is padded with whatever lies in its place.
    std::byte* const place = to + part * static_cast<std::size_t>(group_->rank());
    Lease lease;
    const std::byte* from = place;
    if (share.bytes > 0) {
      lease = parts_->acquire(part_of_[tile]);
      if (share.bytes == share.part_bytes) {
        from = lease.bytes();
      } else {
        std::memcpy(place, lease.bytes(), static_cast<std::size_t>(share.bytes));
      }
    }
    began = seconds_now();
    group_->all_gather({from, part}, all);
  }
  const double seconds = seconds_now() - began;
  if (check_) check_(mine.tile, to);
  lock.lock();
  counters_.gathered_bytes += tiles_[tile].bytes - share.bytes;
  counters_.exchange_seconds += seconds;
  traffic_ = group_->traffic();
  entry(ticket).state = State::ready;
}

}  // namespace tailor
