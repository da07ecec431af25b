#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/json.h"
#include "data/runs/ledger.h"

namespace tailor {

/// What `tailor runs ls`, `show` and `export` print. `ledger` may be null (no ledger yet): then
/// there are no runs.

/// Rows [{run, name, project, status, attempts, gpu_hours, usd, usd_null_reason, started,
/// ended, steps, tokens, device_kind, sku, devices, base_model, output_dir}], newest first.
Json runs_json(const Ledger* ledger);
/// The same as a table for people.
std::string runs_text(const Ledger* ledger);

/// One run with its attempts, phases, artifacts and events. `what` as in Ledger::find_run.
/// Throws Error{usage} when nothing fits, naming what is near.
Json run_json(const Ledger* ledger, std::string_view what);
std::string run_text(const Ledger* ledger, std::string_view what);
/// Ledger::find_run, or Error{usage} that says what there is.
std::string require_run(const Ledger* ledger, std::string_view what);

/// Everything, a row for each run, attempt and phase, for spreadsheets: RFC 4180, one header line.
std::string export_csv(const Ledger* ledger);
/// All runs as `runs show --json` gives them, in an array.
Json export_json(const Ledger* ledger);
/// FOCUS 1.0 (FinOps Open Cost and Usage Specification), all its columns: a row for each run,
/// attempt, phase and day (UTC), so that months add up. FOCUS has no unknown costs: what has no
/// price is left out, and counted.
struct FocusExport {
  std::string csv;
  std::int64_t unpriced_device_ms = 0;
};
FocusExport export_focus(const Ledger* ledger);

}  // namespace tailor
