#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "data/runs/ledger.h"

namespace tailor {

/// What costs are added up by.
enum class GroupBy { day, model, user, project };

struct CostGroup {
  std::string key;  ///< "2026-11-23", a base model, a user, a project; may be empty
  std::int64_t runs = 0;
  std::int64_t device_ms = 0;
  std::optional<std::int64_t> usd_micros{};  ///< of the time that has a price; null: none has
  std::int64_t unpriced_device_ms = 0;       ///< not in usd_micros
};

/// A part of a segment that lies within one day (UTC).
struct DayPart {
  std::int64_t day = 0;  ///< since 1970-01-01
  std::int64_t from_unix_ms = 0, to_unix_ms = 0;
  std::int64_t device_ms = 0;
  std::optional<std::int64_t> usd_micros{};
};
/// Cuts a segment at midnight UTC, by when its attempt began and the steady clock; the parts add up
/// to it exactly.
std::vector<DayPart> by_day(const AttemptRecord& attempt, const SegmentRecord& segment);

/// Costs of all runs: days newest first, the others by what they cost. `ledger` may be null.
std::vector<CostGroup> group_costs(const Ledger* ledger, GroupBy by);

/// [{day|model|user|project, runs, gpu_hours, usd, unpriced_gpu_hours}]
Json groups_json(const Ledger* ledger, GroupBy by);
std::string groups_text(const Ledger* ledger, GroupBy by);
std::string_view group_name(GroupBy by);

}  // namespace tailor
