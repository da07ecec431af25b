#include "data/runs/segment_timer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "base/units.h"

namespace tailor {

SegmentTimer::SegmentTimer(Ledger& ledger, AttemptId attempt, Phase phase, Heartbeats heartbeats,
                           std::optional<std::int64_t> begun_steady_ms, Extras extras)
    : ledger_(ledger), attempt_(std::move(attempt)), phase_(phase), extras_(std::move(extras)) {
  const std::int64_t now = ledger_.clock().steady_ms();
  since_ms_ = std::min(now, begun_steady_ms.value_or(now));
  written_at_ms_ = now;

  RunRecord record = ledger_.read(attempt_.run);
  TAILOR_CHECK(!record.attempts.empty() && record.attempts.back().attempt == attempt_.attempt);
  const AttemptFacts facts = record.attempts.back().facts;
  devices_ = facts.devices;
  rate_ = facts.usd_micros_per_device_hour;
  step_ = facts.resumed_from_step;
  for (const SegmentRecord& segment : record.segments) {
    if (segment.attempt == attempt_.attempt) own_ms_ += segment.facts.ms;
  }
  record.attempts.pop_back();
  std::erase_if(record.segments,
                [&](const SegmentRecord& s) { return s.attempt == attempt_.attempt; });
  const RunTotals prior = total(record);
  prior_device_ms_ = prior.device_ms;
  prior_usd_micros_ = record.attempts.empty() ? std::optional<std::int64_t>(0) : prior.usd_micros;

  if (heartbeats == Heartbeats::thread) thread_ = std::thread([this] { beat(); });
}

SegmentTimer::~SegmentTimer() {
  stop_thread();
  try {
    if (!finished_) write();
  } catch (...) {  // the next attempt closes this one at its last heartbeat
  }
}

Phase SegmentTimer::switch_to(Phase phase) {
  rethrow();
  Phase before{};
  {
    const std::lock_guard guard(mutex_);
    account();
    before = std::exchange(phase_, phase);
  }
  if (before != phase && (before == Phase::checkpoint || phase == Phase::checkpoint)) {
    write_or_keep();
  } else {
    tick();
  }
  return before;
}

void SegmentTimer::step_done(const StepDone& done) {
  rethrow();
  {
    const std::lock_guard guard(mutex_);
    TAILOR_CHECK(phase_ == Phase::train);
    account();
    step_ = done.step;
    Open& open = pending_.back();
    open.facts.step = done.step;
    open.facts.steps += 1;
    open.facts.tokens += done.tokens;
    open.facts.trained_tokens += done.trained_tokens;
    // A part of the step may have been written down as training by a heartbeat: what does not fit
    // here is booked on a later stretch.
    stall_carry_ms_ += std::max(0.0, done.stall_seconds) * 1000;
    const auto fits = std::min(static_cast<std::int64_t>(std::llround(stall_carry_ms_)),
                               open.facts.ms - open.stall_ms);
    open.stall_ms += fits;
    stall_carry_ms_ -= static_cast<double>(fits);
  }
  tick();
}

void SegmentTimer::tick() {
  rethrow();
  bool due = false;
  {
    const std::lock_guard guard(mutex_);
    // A step does not wait for the ledger where a thread can.
    due = !finished_ && !thread_.joinable() &&
          ledger_.clock().steady_ms() - written_at_ms_ >= kHeartbeatMs;
  }
  if (due) write_or_keep();
}

void SegmentTimer::flush() {
  rethrow();
  write();
}

void SegmentTimer::finish(RunStatus status, int exit_code, const std::string& reason) {
  if (finished_) return;
  stop_thread();
  write();
  ledger_.end_attempt(attempt_, status, exit_code, reason);
  const std::lock_guard guard(mutex_);
  finished_ = true;
}

SegmentTimer::Spent SegmentTimer::spent() const {
  const std::lock_guard guard(mutex_);
  const std::int64_t open_ms =
      finished_ ? 0 : std::max<std::int64_t>(0, ledger_.clock().steady_ms() - since_ms_);
  const std::int64_t own = checked_multiply(own_ms_ + open_ms, devices_);
  Spent spent{prior_device_ms_ + own, std::nullopt};
  if (rate_.has_value() && prior_usd_micros_.has_value()) {
    spent.usd_micros = *prior_usd_micros_ + cost_usd_micros(*rate_, own);
  }
  return spent;
}

void SegmentTimer::spent_before_at_least(const Spent& before) {
  const std::lock_guard guard(mutex_);
  prior_device_ms_ = std::max(prior_device_ms_, before.device_ms);
  if (before.usd_micros && prior_usd_micros_) {
    prior_usd_micros_ = std::max(*prior_usd_micros_, *before.usd_micros);
  }
}

std::optional<double> SegmentTimer::Spent::usd() const {
  if (!usd_micros.has_value()) return std::nullopt;
  return static_cast<double>(*usd_micros) / static_cast<double>(kMicrosPerUsd);
}

/// Time up to now goes to the open phase. Called with the mutex held.
void SegmentTimer::account() {
  if (pending_.empty() || pending_.back().facts.phase != phase_) {
    pending_.push_back({{.phase = phase_, .step = step_}, 0});
  }
  const std::int64_t now = ledger_.clock().steady_ms();
  const std::int64_t passed = std::max<std::int64_t>(0, now - since_ms_);
  pending_.back().facts.ms += passed;
  own_ms_ += passed;
  since_ms_ = std::max(since_ms_, now);
}

/// Writes what is pending; on failure it stays pending, in order.
void SegmentTimer::write() {
  const std::lock_guard writing(write_mutex_);
  std::vector<Open> open;
  {
    const std::lock_guard guard(mutex_);
    if (finished_) return;
    account();
    open.swap(pending_);
  }
  share_measured(open);
  std::vector<SegmentFacts> rows;
  for (const Open& one : open) {
    SegmentFacts facts = one.facts;
    facts.ms -= one.stall_ms;
    if (facts.ms > 0 || facts.steps > 0 || facts.energy_mj || facts.busy_device_ms)
      rows.push_back(facts);
    if (one.stall_ms > 0) {
      rows.push_back({.phase = Phase::stall, .ms = one.stall_ms, .step = facts.step});
    }
  }
  try {
    ledger_.segments(attempt_, rows);
  } catch (...) {
    const std::lock_guard guard(mutex_);
    pending_.insert(pending_.begin(), open.begin(), open.end());
    throw;
  }
  const std::lock_guard guard(mutex_);
  written_at_ms_ = ledger_.clock().steady_ms();
}

/// What was measured since the last time, over the stretches it was for.
void SegmentTimer::share_measured(std::vector<Open>& open) {
  const auto millijoules = extras_.energy.take_millijoules();
  const auto busy_ms = extras_.busy.take_busy_ms();
  energy_carry_mj_ += millijoules.value_or(0);
  busy_carry_ms_ += busy_ms.value_or(0);
  std::int64_t all_ms = 0;
  for (const Open& one : open) all_ms += one.facts.ms;
  if (all_ms == 0) return;  // for the next stretch
  const auto share = [&](std::int64_t amount, std::optional<std::int64_t> SegmentFacts::*field) {
    __extension__ using Wide = __int128;
    std::int64_t until_ms = 0;
    std::int64_t given = 0;
    for (Open& one : open) {
      until_ms += one.facts.ms;
      const auto until = static_cast<std::int64_t>(static_cast<Wide>(amount) * until_ms / all_ms);
      one.facts.*field = (one.facts.*field).value_or(0) + until - given;
      given = until;
    }
  };
  if (millijoules) share(std::exchange(energy_carry_mj_, 0), &SegmentFacts::energy_mj);
  if (!busy_ms) return;
  // Clocks and samples end at slightly other moments: what is more than the time held waits.
  const std::int64_t busy =
      std::min(static_cast<std::int64_t>(busy_carry_ms_), checked_multiply(all_ms, devices_));
  busy_carry_ms_ -= static_cast<double>(busy);
  share(busy, &SegmentFacts::busy_device_ms);
}

/// As write(), but a ledger that cannot be written to for now does not stop the training: the time
/// stays pending and is written with the next attempt to.
void SegmentTimer::write_or_keep() {
  try {
    write();
  } catch (const Error& error) {
    if (error.fault() != Fault::io) throw;
    log_warning("the ledger cannot be written, will try again: " + error.parts().what + " (" +
                error.parts().where + ")");
    const std::lock_guard guard(mutex_);
    written_at_ms_ = ledger_.clock().steady_ms();
  }
}

void SegmentTimer::rethrow() {
  const std::lock_guard guard(mutex_);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void SegmentTimer::stop_thread() {
  {
    const std::lock_guard guard(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void SegmentTimer::beat() {
  while (true) {
    {
      std::unique_lock lock(mutex_);
      constexpr std::int64_t kRoundMs = kHeartbeatMs / 3;
      if (wake_.wait_for(lock, std::chrono::milliseconds(kRoundMs), [this] { return stopping_; })) {
        return;
      }
      // Where the next round comes too late, now.
      if (ledger_.clock().steady_ms() - written_at_ms_ < kHeartbeatMs - kRoundMs) continue;
    }
    try {
      write_or_keep();
      if (extras_.after_heartbeat) extras_.after_heartbeat();
    } catch (...) {
      const std::lock_guard guard(mutex_);
      error_ = std::current_exception();
      return;
    }
  }
}

}  // namespace tailor
