#include "data/runs/grouping.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/clock.h"
#include "base/text.h"
#include "data/runs/table.h"

namespace tailor {
namespace {

constexpr std::int64_t kDayMs = 86'400'000;

std::int64_t day_of(std::int64_t unix_ms) {
  return unix_ms >= 0 ? unix_ms / kDayMs : (unix_ms - kDayMs + 1) / kDayMs;
}

}  // namespace

std::string_view group_name(GroupBy by) {
  switch (by) {
    case GroupBy::day:
      return "day";
    case GroupBy::model:
      return "model";
    case GroupBy::user:
      return "user";
    case GroupBy::project:
      return "project";
  }
  return "";
}

std::vector<DayPart> by_day(const AttemptRecord& attempt, const SegmentRecord& segment) {
  std::vector<DayPart> parts;
  const std::int64_t begin = attempt.began_unix_ms + segment.from_ms;
  const std::int64_t end = begin + segment.facts.ms;
  __extension__ using Wide = __int128;
  std::int64_t usd_before = 0;
  for (std::int64_t from = begin; from < end;) {
    DayPart part;
    part.day = day_of(from);
    part.from_unix_ms = from;
    part.to_unix_ms = std::min(end, (part.day + 1) * kDayMs);
    part.device_ms = (part.to_unix_ms - from) * attempt.facts.devices;
    if (segment.usd_micros) {
      const std::int64_t usd = static_cast<std::int64_t>(static_cast<Wide>(*segment.usd_micros) *
                                                         (part.to_unix_ms - begin) / (end - begin));
      part.usd_micros = usd - usd_before;
      usd_before = usd;
    }
    from = part.to_unix_ms;
    parts.push_back(part);
  }
  return parts;
}

std::vector<CostGroup> group_costs(const Ledger* ledger, GroupBy by) {
  std::map<std::string, CostGroup> groups;
  std::map<std::string, std::set<std::string>> runs;
  const auto book = [&](const std::string& key, const std::string& run, std::int64_t device_ms,
                        const std::optional<std::int64_t>& usd) {
    CostGroup& group = groups[key];
    group.key = key;
    runs[key].insert(run);
    group.device_ms += device_ms;
    if (usd) {
      group.usd_micros = group.usd_micros.value_or(0) + *usd;
    } else {
      group.unpriced_device_ms += device_ms;
    }
  };
  for (const std::string& run : ledger != nullptr ? ledger->runs() : std::vector<std::string>()) {
    const RunRecord record = ledger->read(run);
    const std::string& key = by == GroupBy::model  ? record.facts.base_model
                             : by == GroupBy::user ? record.facts.owner
                                                   : record.facts.project;
    for (const SegmentRecord& segment : record.segments) {
      if (by != GroupBy::day) {
        book(key, run, segment.device_ms, segment.usd_micros);
        continue;
      }
      for (const DayPart& part : by_day(record.attempt_of(segment.attempt), segment)) {
        book(utc_text(part.day * kDayMs).substr(0, 10), run, part.device_ms, part.usd_micros);
      }
    }
  }
  std::vector<CostGroup> out;
  for (auto& [key, group] : groups) {
    group.runs = static_cast<std::int64_t>(runs[key].size());
    out.push_back(group);
  }
  if (by == GroupBy::day) {
    std::reverse(out.begin(), out.end());
  } else {
    std::stable_sort(out.begin(), out.end(), [](const CostGroup& a, const CostGroup& b) {
      return std::pair(a.usd_micros.value_or(0), a.device_ms) >
             std::pair(b.usd_micros.value_or(0), b.device_ms);
    });
  }
  return out;
}

Json groups_json(const Ledger* ledger, GroupBy by) {
  Json rows = Json::array();
  for (const CostGroup& group : group_costs(ledger, by)) {
    rows.push_back(
        {{std::string(group_name(by)), group.key},
         {"runs", group.runs},
         {"gpu_hours", static_cast<double>(group.device_ms) / 3.6e6},
         {"usd", group.usd_micros ? Json(static_cast<double>(*group.usd_micros) / 1e6) : Json()},
         {"unpriced_gpu_hours", static_cast<double>(group.unpriced_device_ms) / 3.6e6}});
  }
  return rows;
}

std::string groups_text(const Ledger* ledger, GroupBy by) {
  const std::vector<CostGroup> groups = group_costs(ledger, by);
  if (groups.empty()) {
    return ledger == nullptr ? "no runs yet\n" : "no runs yet in " + ledger->place() + "\n";
  }
  TextTable table({by == GroupBy::day ? "day (UTC)" : std::string(group_name(by)), ">runs",
                   ">GPU-hours", ">USD", ">GPU-hours without a price"});
  CostGroup sum;
  const auto add = [&](const std::string& key, const std::string& count, const CostGroup& group) {
    table.add({key, count, number_text(static_cast<double>(group.device_ms) / 3.6e6, 4),
               usd_or_unknown(group.usd_micros),
               group.unpriced_device_ms == 0
                   ? "-"
                   : number_text(static_cast<double>(group.unpriced_device_ms) / 3.6e6, 4)});
  };
  for (const CostGroup& group : groups) {
    add(group.key.empty() ? "(none)" : group.key, count_text(group.runs), group);
    sum.device_ms += group.device_ms;
    sum.unpriced_device_ms += group.unpriced_device_ms;
    if (group.usd_micros) sum.usd_micros = sum.usd_micros.value_or(0) + *group.usd_micros;
  }
  if (groups.size() > 1) add("total", "", sum);
  return table.text();
}

}  // namespace tailor
