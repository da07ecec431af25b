#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

#include "data/runs/ledger.h"
#include "data/runs/segment_timer.h"

namespace tailor {

/// How much may be used; null: no limit.
struct BudgetLimits {
  std::optional<std::int64_t> usd_micros{}, device_ms{};
  bool any() const { return usd_micros.has_value() || device_ms.has_value(); }
};

/// What is still to come of a run; null: not known.
struct PlannedUse {
  std::optional<std::int64_t> usd_micros{}, device_ms{};
  /// Of a run that goes on, for people: "the 480 steps left, at the pace of the 520 so far". Empty:
  /// a whole plan.
  std::string left{};
};

/// What the steps `first_step` to `steps` of a run will take at the pace it has had: its ledger's
/// training, waiting, evaluating and saving over the steps it took, and loading once more. Knows
/// better than any plan. Null where the ledger has too few steps of it to tell.
std::optional<PlannedUse> left_at_pace(const Ledger& ledger, const std::string& run,
                                       std::int64_t first_step, std::int64_t steps,
                                       std::optional<std::int64_t> usd_micros_per_device_hour);

/// A project's budget as one of its runs sees it.
struct SharedBudget {
  BudgetLimits limits;
  double others_device_ms = 0, others_usd_micros = 0;  ///< what all other runs have used by now
};

/// Throws Error{budget} where what `run` has used (all its attempts; empty: a new run) and what is
/// planned are more than `own`, or more than what its project's budget has left beside the plans of
/// the runs that are going on. A figure that is not known refuses nothing.
void refuse_over_budget(const Ledger& ledger, const std::string& run, const std::string& project,
                        const BudgetLimits& own, const PlannedUse& planned);

/// Watches a run's budget, and its project's, while it trains. Thread-safe.
///
/// A run stops when what is spent, with what the next step, saving and leaving will take, reaches a
/// limit. Of the project's other runs it knows what they last wrote down, at most a heartbeat ago,
/// and counts on that they went on since; so that N runs that share a budget overspend it together
/// by N x burn x kHeartbeatMs at most.
class BudgetWatch {
 public:
  struct Options {
    BudgetLimits own{};
    double warn = 0.8;      ///< share of a limit at which a warning comes
    std::string project{};  ///< whose shared budget counts too; empty: none
    int devices = 1;
    std::optional<std::int64_t> usd_micros_per_device_hour{};
    std::int64_t first_step = 0, steps = 0;
  };
  BudgetWatch(const Ledger& ledger, AttemptId attempt, const Options& options);

  /// Asks the ledger for the project's budget and spending. For a heartbeat, not for a step; keeps
  /// what it knew where the ledger is away.
  void refresh();

  struct Verdict {
    bool stop = false;
    std::string event{}, say{};  ///< budget_warning or budget_forecast, once each; else empty
  };
  /// After `step` of the run; `spent` by all its attempts. `saving_seconds`: saving and leaving.
  Verdict after_step(const SegmentTimer::Spent& spent, std::int64_t step, double saving_seconds);
  /// The project's budget; null where it has none, or none is known yet.
  std::optional<SharedBudget> shared() const;

 private:
  /// What refresh() learned: the project's limits, what its other runs had used, and how fast.
  struct Others {
    BudgetLimits limits;
    double device_ms = 0, usd_micros = 0;
    double device_ms_per_ms = 0, usd_micros_per_ms = 0;
    std::int64_t at_ms = 0;
  };
  std::optional<SharedBudget> shared_now() const;  ///< with mutex_ held

  const Ledger& ledger_;
  const AttemptId attempt_;
  const Options options_;
  mutable std::mutex mutex_;
  std::optional<Others> others_;
  std::optional<SegmentTimer::Spent> first_;  ///< after the first step of this attempt
  std::int64_t first_at_step_ = 0;
  bool warned_ = false, forecast_ = false;
};

}  // namespace tailor
