#include "data/runs/ledger.h"

#include <algorithm>
#include <array>
#include <limits>
#include <random>

#include "base/error.h"
#include "base/text.h"
#include "base/units.h"

namespace tailor {
namespace {

constexpr std::array<std::string_view, kPhases.size()> kPhaseNames = {
    "start", "load", "train", "stall", "evaluate", "checkpoint", "idle", "lost"};
constexpr std::array<std::string_view, 8> kStatusNames = {
    "created",   "running",      "succeeded",      "failed",
    "preempted", "stopped_user", "stopped_budget", "lost"};

/// amount * part / whole, rounded down; 0 <= part <= whole.
std::int64_t share(std::int64_t amount, std::int64_t part, std::int64_t whole) {
  __extension__ using Wide = __int128;
  return static_cast<std::int64_t>(static_cast<Wide>(amount) * part / whole);
}

/// The parts of a segment that a later attempt did again: lost of whole.
struct Redone {
  std::int64_t lost = 0, whole = 1;
};

/// `kept`: the last step of this attempt that later ones built on.
Redone redone(const SegmentFacts& facts, std::int64_t kept) {
  switch (facts.phase) {
    case Phase::train:
      // Without a finished step the time went into the step after `step`.
      if (facts.steps == 0) return {facts.step >= kept ? 1 : 0, 1};
      return {std::clamp<std::int64_t>(facts.step - kept, 0, facts.steps), facts.steps};
    case Phase::stall:
    case Phase::evaluate:
    case Phase::checkpoint:
      return {facts.step > kept ? 1 : 0, 1};
    case Phase::start:
    case Phase::load:
    case Phase::idle:
    case Phase::lost:
      return {};
  }
  return {};
}

void add(std::optional<std::int64_t>& sum, const std::optional<std::int64_t>& value) {
  if (value.has_value()) sum = sum.value_or(0) + *value;
}

}  // namespace

std::string_view phase_name(Phase phase) { return kPhaseNames[static_cast<std::size_t>(phase)]; }

std::string_view status_name(RunStatus status) {
  return kStatusNames[static_cast<std::size_t>(status)];
}

const AttemptRecord& RunRecord::attempt_of(int number) const {
  TAILOR_CHECK(number >= 1 && static_cast<std::size_t>(number) <= attempts.size());
  return attempts[static_cast<std::size_t>(number - 1)];
}

RunStatus RunRecord::status(std::int64_t now_unix_ms) const {
  if (attempts.empty()) return RunStatus::created;
  const AttemptRecord& last = attempts.back();
  const bool silent = now_unix_ms - last.heartbeat_unix_ms > kSilentMs;
  return last.status == RunStatus::running && silent ? RunStatus::lost : last.status;
}

bool ProjectSpending::Running::alive(std::int64_t now_unix_ms) const {
  return now_unix_ms - heartbeat_unix_ms <= kSilentMs;
}

std::optional<double> RunTotals::usd() const {
  if (!usd_micros.has_value()) return std::nullopt;
  return static_cast<double>(*usd_micros) / static_cast<double>(kMicrosPerUsd);
}

namespace {

/// Sums over the attempts that `counts` names.
template <class Counts>
RunTotals fold(const RunRecord& record, const Counts& counts) {
  RunTotals totals;
  std::vector<std::int64_t> kept(record.attempts.size());  // by attempt - 1
  std::int64_t kept_by_later = std::numeric_limits<std::int64_t>::max();
  for (std::size_t i = record.attempts.size(); i-- > 0;) {
    kept[i] = kept_by_later;
    kept_by_later = std::min(kept_by_later, record.attempts[i].facts.resumed_from_step);
  }

  bool priced = true;
  for (const AttemptRecord& attempt : record.attempts) {
    if (!counts(attempt.attempt)) continue;
    totals.attempts += 1;
    totals.estimated |= attempt.estimated;
    if (attempt.facts.usd_micros_per_device_hour.has_value() || !priced) continue;
    priced = false;
    totals.usd_null_reason =
        attempt.facts.no_price_reason.empty()
            ? "no price is known for attempt " + std::to_string(attempt.attempt)
            : attempt.facts.no_price_reason;
  }

  if (totals.attempts == 0) {
    priced = false;
    totals.usd_null_reason = "the run has no attempt yet";
  }

  std::int64_t usd_micros = 0;
  std::array<std::int64_t, kPhases.size()> usd_by_phase{};
  const auto book = [&](Phase phase, std::int64_t device_ms, std::int64_t usd) {
    totals.phases[static_cast<std::size_t>(phase)].device_ms += device_ms;
    usd_by_phase[static_cast<std::size_t>(phase)] += usd;
  };
  for (const SegmentRecord& segment : record.segments) {
    if (!counts(segment.attempt)) continue;
    const SegmentFacts& facts = segment.facts;
    const auto index = static_cast<std::size_t>(segment.attempt - 1);
    TAILOR_CHECK(index < kept.size());
    const auto [lost, whole] = redone(facts, kept[index]);
    const std::int64_t usd = segment.usd_micros.value_or(0);
    const std::int64_t lost_ms = share(segment.device_ms, lost, whole);
    const std::int64_t lost_usd = share(usd, lost, whole);
    totals.device_ms += segment.device_ms;
    usd_micros += usd;
    book(facts.phase, segment.device_ms - lost_ms, usd - lost_usd);
    book(Phase::lost, lost_ms, lost_usd);
    totals.steps += facts.steps;
    totals.tokens += facts.tokens;
    totals.trained_tokens += facts.trained_tokens;
    totals.useful_steps += facts.steps - share(facts.steps, lost, whole);
    totals.useful_tokens += facts.tokens - share(facts.tokens, lost, whole);
    totals.useful_trained_tokens += facts.trained_tokens - share(facts.trained_tokens, lost, whole);
    add(totals.busy_device_ms, facts.busy_device_ms);
    add(totals.energy_mj, facts.energy_mj);
  }
  if (priced) {
    totals.usd_micros = usd_micros;
    for (std::size_t i = 0; i < kPhases.size(); ++i) totals.phases[i].usd_micros = usd_by_phase[i];
  }
  return totals;
}

}  // namespace

RunTotals total(const RunRecord& record) {
  return fold(record, [](int) { return true; });
}

RunTotals total(const RunRecord& record, int attempt) {
  return fold(record, [attempt](int other) { return other == attempt; });
}

std::string new_ulid(std::int64_t unix_ms) {
  constexpr std::string_view kDigits = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
  std::random_device random;
  std::string out(26, '0');
  for (std::size_t i = 10; i-- > 0; unix_ms /= 32) {
    out[i] = kDigits[static_cast<std::size_t>(unix_ms % 32)];
  }
  for (std::size_t i = 10; i < out.size(); ++i) out[i] = kDigits[random() % 32];
  return out;
}

std::string Ledger::default_place() { return (data_folder() / "ledger.db").string(); }

}  // namespace tailor
