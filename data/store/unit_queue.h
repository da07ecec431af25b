#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "data/store/unit_maker.h"

namespace tailor {

/// The units that are still to be made, and which of them can be made now: those whose shards have
/// arrived and whose memory fits beside what the other workers hold. Its callers see to it that one
/// thread at a time is in it.
class UnitQueue {
 public:
  UnitQueue(const PackPlan& plan, std::int64_t memory_bytes_max);

  /// Throws Error{does_not_fit}, with the number that is enough: the largest unit does not fit.
  void check_memory(const fs::path& model) const;

  // ------------------------------------------------------------------ shards
  /// Lists the shards each unit needs, and takes `checkpoint` for what has arrived.
  void list_shards(std::shared_ptr<const Checkpoint> checkpoint);
  /// More has arrived, or some was removed.
  void set_checkpoint(std::shared_ptr<const Checkpoint> checkpoint);
  const Checkpoint& checkpoint() const { return *checkpoint_; }
  const std::vector<std::string>& shards() const { return shards_; }
  /// Shards that are there and that only units of `done` need.
  template <class Done>
  std::vector<std::string> shards_done_with(const Done& done) const {
    std::vector<bool> needed(shards_.size());
    for (std::size_t i = 0; i < shards_of_.size(); ++i) {
      if (done(plan_.layout.units[i])) continue;
      for (const int shard : shards_of_[i]) needed[static_cast<std::size_t>(shard)] = true;
    }
    std::vector<std::string> out;
    for (std::size_t i = 0; i < shards_.size(); ++i) {
      if (!needed[i] && arrived_[i]) out.push_back(shards_[i]);
    }
    return out;
  }
  bool has_arrived(const StoredUnit& unit) const { return missing_shard(unit) < 0; }
  /// The shard that is waited for when nobody works; empty when there is none.
  std::string awaited() const;

  // ------------------------------------------------------------------ units
  void add(const StoredUnit& unit) { waiting_.push_back(&unit); }
  bool empty() const { return waiting_.empty(); }

  /// What a worker holds from unit to unit.
  struct Worker {
    std::unique_ptr<UnitMaker> maker;
    MakerMemory held;
  };
  struct Job {
    const StoredUnit* unit;
    std::vector<const StoredUnit*> ahead;  ///< will be made soon, by whomever: read ahead
  };
  /// The next unit that can be made; the worker then has a maker. Nothing where none can be now:
  /// the worker has let go of its memory then, and of removed shards.
  std::optional<Job> next(Worker& worker);
  void finished() { --active_; }
  void let_go(Worker& worker);

 private:
  /// Memory of the process beside the workers': code, headers of the shards, the plan.
  std::int64_t process_bytes() const;
  std::size_t number_of(const StoredUnit& unit) const {
    return static_cast<std::size_t>(&unit - plan_.layout.units.data());
  }
  /// A shard that `unit` needs and that is not there, or -1.
  int missing_shard(const StoredUnit& unit) const;
  bool take_memory(Worker& worker, const StoredUnit& unit);
  std::vector<const StoredUnit*> read_ahead();

  const PackPlan& plan_;
  std::int64_t memory_bytes_max_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::vector<std::string> shards_;
  std::vector<bool> arrived_;                ///< as shards_
  std::vector<std::vector<int>> shards_of_;  ///< numbers in shards_, by unit
  std::deque<const StoredUnit*> waiting_;
  std::int64_t memory_used_ = 0, active_ = 0;
  std::set<const StoredUnit*> ahead_;  ///< waiting, and being read
  std::int64_t ahead_bytes_ = 0;
};

}  // namespace tailor
