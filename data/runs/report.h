#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "data/runs/ledger.h"
#include "data/runs/metrics.h"

namespace tailor {

/// All a report is made from. Read it with read_report().
struct RunReport {
  RunRecord record;
  RunTotals totals;
  RunStatus status = RunStatus::created;  ///< seen at the time of reading
  Metrics metrics;                        ///< empty where the folder is gone
  Json plan;                              ///< plan.json of the folder, or null
};

/// From the ledger and the run's folder, as far as it is still there.
RunReport read_report(const Ledger& ledger, const std::string& run);

/// A figure of plan.json beside what the run gave; either may be unknown.
struct PlannedFigure {
  std::string label, key;
  std::optional<double> planned, measured;
};
std::vector<PlannedFigure> planned_and_measured(const RunReport& report);

/// What streaming the frozen weights meant for the steps that metrics.jsonl holds.
struct StreamTotals {
  std::int64_t bytes = 0;  ///< read from disk
  double stall_seconds = 0, step_seconds = 0;
  double stall_share() const { return step_seconds > 0 ? stall_seconds / step_seconds : 0; }
  /// "disk" where computing waited for more than a tenth of the steps' time, else "compute".
  std::string bound() const { return stall_share() > 0.1 ? "disk" : "compute"; }
};
StreamTotals stream_totals(const RunReport& report);

/// Time all attempts together took, in seconds.
double ran_seconds(const RunReport& report);

/// Most memory the first rank's process has held; nothing where no step says.
std::optional<std::int64_t> host_bytes_peak(const RunReport& report);

/// The table at the end of a run: device-hours, USD and share by phase, what was kept, planned
/// beside measured.
std::string report_text(const RunReport& report);
/// What report.html draws, in characters: curves over the steps, memory, energy, expert load.
std::string details_text(const RunReport& report);
/// The document summary.json: plain unrounded numbers; usd null with `usd_null_reason`.
Json summary_json(const RunReport& report);
/// One self-contained page (docs/reports.md): inline SVG, no script, nothing loaded.
std::string report_html(const RunReport& report);

/// Writes summary.json and report.html into the run's folder, each atomically. Call after the
/// attempt is closed, so that the figures are final.
RunReport write_report(const Ledger& ledger, const std::string& run);

}  // namespace tailor
