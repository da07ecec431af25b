#include "data/store/unit_queue.h"

#include <algorithm>
#include <map>

#include "base/error.h"
#include "base/text.h"
#include "base/units.h"

namespace tailor {

UnitQueue::UnitQueue(const PackPlan& plan, std::int64_t memory_bytes_max)
    : plan_(plan), memory_bytes_max_(memory_bytes_max) {}

std::int64_t UnitQueue::process_bytes() const {
  constexpr std::int64_t kFixed = std::int64_t{64} << 20, kOfUnit = 4096;
  return kFixed + kOfUnit * narrow<std::int64_t>(plan_.layout.units.size());
}

void UnitQueue::check_memory(const fs::path& model) const {
  const StoredUnit* largest = nullptr;
  std::int64_t needed = 0;
  for (const StoredUnit& unit : plan_.layout.units) {
    const std::int64_t bytes = UnitMaker::memory_of(plan_, unit).all();
    if (bytes <= needed) continue;
    needed = bytes;
    largest = &unit;
  }
  needed += process_bytes();
  if (largest == nullptr || needed <= memory_bytes_max_) return;
  throw Error(Fault::does_not_fit, {"packing needs " + bytes_text(needed) + " of memory, " +
                                        bytes_text(memory_bytes_max_) + " are allowed",
                                    model.string() + ", " + unit_text(largest->id),
                                    "Set --max-ram to " + std::to_string(needed) + "B or more."});
}

void UnitQueue::list_shards(std::shared_ptr<const Checkpoint> checkpoint) {
  std::map<std::string, int> numbers;
  for (const StoredUnit& unit : plan_.layout.units) {
    std::set<int> of_unit;
    for (const PublishedMatrix& matrix :
         unit_matrices(plan_.spec, unit.id, plan_.forms.experts_fused)) {
      for (const std::string& shard : checkpoint->promised_shards(matrix.name)) {
        const auto [at, fresh] = numbers.emplace(shard, static_cast<int>(shards_.size()));
        if (fresh) shards_.push_back(shard);
        of_unit.insert(at->second);
      }
    }
    shards_of_.emplace_back(of_unit.begin(), of_unit.end());
  }
  set_checkpoint(std::move(checkpoint));
}

void UnitQueue::set_checkpoint(std::shared_ptr<const Checkpoint> checkpoint) {
  checkpoint_ = std::move(checkpoint);
  arrived_.clear();
  for (const std::string& shard : shards_) arrived_.push_back(checkpoint_->has_shard(shard));
}

int UnitQueue::missing_shard(const StoredUnit& unit) const {
  for (const int shard : shards_of_[number_of(unit)]) {
    if (!arrived_[static_cast<std::size_t>(shard)]) return shard;
  }
  return -1;
}

std::string UnitQueue::awaited() const {
  if (active_ > 0 || waiting_.empty()) return "";
  const int shard = missing_shard(*waiting_.front());
  return shard < 0 ? "" : shards_[static_cast<std::size_t>(shard)];
}

void UnitQueue::let_go(Worker& worker) {
  if (worker.maker) worker.maker->release();
  memory_used_ -= worker.held.all();
  worker.held = {};
}

bool UnitQueue::take_memory(Worker& worker, const StoredUnit& unit) {
  const std::int64_t others = memory_used_ - worker.held.all() + process_bytes();
  const MakerMemory needed = UnitMaker::memory_of(plan_, unit);
  const MakerMemory grown = MakerMemory::larger(worker.held, needed);
  const bool keeps = others + grown.all() <= memory_bytes_max_;
  if (!keeps && others + needed.all() > memory_bytes_max_) return false;
  if (!keeps) let_go(worker);
  const MakerMemory& taken = keeps ? grown : needed;
  memory_used_ += taken.all() - worker.held.all();
  worker.held = taken;
  return true;
}

/// Units behind the one that is made next, so that the disk always has some to read.
std::vector<const StoredUnit*> UnitQueue::read_ahead() {
  constexpr std::int64_t kAheadBytes = std::int64_t{64} << 20;
  std::vector<const StoredUnit*> out;
  for (const StoredUnit* unit : waiting_) {
    if (ahead_bytes_ >= kAheadBytes || !has_arrived(*unit)) break;
    if (!ahead_.insert(unit).second) continue;
    ahead_bytes_ += plan_.source_bytes(*unit);
    out.push_back(unit);
  }
  return out;
}

std::optional<UnitQueue::Job> UnitQueue::next(Worker& worker) {
  if (worker.maker && worker.maker->checkpoint() != checkpoint_) {
    let_go(worker);
    worker.maker.reset();  // its open files keep the space of removed shards
  }
  const auto found = std::find_if(waiting_.begin(), waiting_.end(),
                                  [&](const auto* unit) { return has_arrived(*unit); });
  if (found == waiting_.end() || !take_memory(worker, **found)) {
    let_go(worker);
    return std::nullopt;
  }
  if (!worker.maker) worker.maker = std::make_unique<UnitMaker>(plan_, checkpoint_);
  Job job{*found, {}};
  waiting_.erase(found);
  if (ahead_.erase(job.unit) != 0) ahead_bytes_ -= plan_.source_bytes(*job.unit);
  job.ahead = read_ahead();
  ++active_;
  return job;
}

}  // namespace tailor
