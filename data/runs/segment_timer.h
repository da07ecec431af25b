#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "data/runs/busy.h"
#include "data/runs/energy.h"
#include "data/runs/ledger.h"

namespace tailor {

struct SegmentTimerExtras {
  std::function<void()> after_heartbeat{};  ///< called by the heartbeat thread after each round
  /// Asked whenever time is written down; shared out by time.
  EnergyMeter energy{};
  BusyMeter busy{};
};

/// Books an attempt's time: from construction to finish() every millisecond belongs to exactly one
/// phase. Writes to the ledger at least every 15 s (a thread sees to it when the caller is busy),
/// when a checkpoint begins or ends, and at the end. Thread-safe.
///
///   SegmentTimer timer(ledger, attempt, Phase::load);
///   ... load ...
///   timer.switch_to(Phase::train);
///   timer.step_done({.step = 1, .tokens = 4096, .trained_tokens = 900, .stall_seconds = 0.2});
///   timer.switch_to(Phase::checkpoint); ... timer.switch_to(Phase::train); ...
///   timer.finish(RunStatus::succeeded, 0, "");
///
/// Where the process dies without finish(), the next attempt closes this one.
class SegmentTimer {
 public:
  enum class Heartbeats { thread, by_hand };
  using Extras = SegmentTimerExtras;
  struct StepDone {
    std::int64_t step = 0;
    std::int64_t tokens = 0;
    std::int64_t trained_tokens = 0;
    double stall_seconds = 0;  ///< of the step's time, booked as Phase::stall
  };
  /// The run so far, all attempts, including time not yet written down.
  struct Spent {
    std::int64_t device_ms = 0;
    std::optional<std::int64_t> usd_micros;
    double gpu_hours() const { return static_cast<double>(device_ms) / 3.6e6; }
    std::optional<double> usd() const;
  };

  /// `ledger` must outlive the timer. `begun_steady_ms`: when the program began, if that was before
  /// now (ledger.clock().steady_ms()), so that its start-up is booked on `phase`.
  SegmentTimer(Ledger& ledger, AttemptId attempt, Phase phase,
               Heartbeats heartbeats = Heartbeats::thread,
               std::optional<std::int64_t> begun_steady_ms = std::nullopt, Extras extras = {});
  SegmentTimer(const SegmentTimer&) = delete;
  SegmentTimer& operator=(const SegmentTimer&) = delete;
  /// Writes what is left, ignoring failures; the attempt stays open unless finish() was called.
  ~SegmentTimer();

  /// Time since the last switch goes to the phase before; returns that phase.
  Phase switch_to(Phase phase);
  void step_done(const StepDone& done);
  /// Writes down what has passed when the last time was 15 s ago or more. Rethrows an error the
  /// heartbeat thread met, as do all other calls.
  void tick();
  /// Writes everything down now.
  void flush();
  /// Writes everything down and closes the attempt. Later calls do nothing.
  void finish(RunStatus status, int exit_code, const std::string& reason);

  Spent spent() const;
  /// What earlier attempts are known to have spent from elsewhere; counts where it is more than the
  /// ledger knew when this one began.
  void spent_before_at_least(const Spent& before);
  const AttemptId& attempt() const noexcept { return attempt_; }

 private:
  /// A stretch not yet written; `stall_ms` of its time will be booked as Phase::stall.
  struct Open {
    SegmentFacts facts;
    std::int64_t stall_ms = 0;
  };

  void account();
  void write();
  void write_or_keep();
  void share_measured(std::vector<Open>& open);
  void rethrow();
  void stop_thread();
  void beat();

  Ledger& ledger_;
  const AttemptId attempt_;
  int devices_ = 1;
  std::optional<std::int64_t> rate_;  ///< micro-dollars per device and hour
  std::int64_t prior_device_ms_ = 0;  ///< of earlier attempts
  std::optional<std::int64_t> prior_usd_micros_;

  std::mutex write_mutex_;  ///< held while writing to the ledger; taken before mutex_
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  Phase phase_;
  std::int64_t step_ = 0;
  std::int64_t since_ms_ = 0;  ///< steady time up to which all is in pending_ or written
  std::int64_t written_at_ms_ = 0;
  std::int64_t own_ms_ = 0;  ///< of this attempt, pending_ included
  std::vector<Open> pending_;
  double stall_carry_ms_ = 0;
  std::int64_t energy_carry_mj_ = 0;
  double busy_carry_ms_ = 0;
  bool finished_ = false;
  bool stopping_ = false;
  std::exception_ptr error_;
  Extras extras_;
  std::thread thread_;
};

}  // namespace tailor
