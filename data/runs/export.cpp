#include <string>
#include <vector>

#include "base/text.h"
#include "data/runs/csv.h"
#include "data/runs/listing.h"
#include "data/runs/report_words.h"

namespace tailor {
namespace {

std::string usd_field(const std::optional<std::int64_t>& micros) {
  return micros.has_value() ? exact_text(static_cast<double>(*micros) / 1e6) : "";
}

std::string hours_field(std::int64_t device_ms) {
  return exact_text(static_cast<double>(device_ms) / 3.6e6);
}

/// Calls `use(report, attempt, phase, totals of the attempt)` for all that took time.
template <class Use>
void for_each_charge(const Ledger* ledger, const Use& use) {
  for (const RunReport& report : ledger_reports(ledger)) {
    for (const AttemptRecord& attempt : report.record.attempts) {
      const RunTotals totals = total(report.record, attempt.attempt);
      for (const Phase phase : kPhases) {
        if (totals.of(phase).device_ms > 0) use(report, attempt, phase, totals);
      }
    }
  }
}

}  // namespace

std::string export_csv(const Ledger* ledger) {
  Csv csv;
  csv.add({"run",          "name",       "project",
           "run_status",   "attempt",    "attempt_status",
           "began",        "ended",      "launcher",
           "launcher_job", "host",       "device_kind",
           "sku",          "devices",    "usd_per_gpu_hour",
           "price_id",     "price_kind", "price_source",
           "phase",        "gpu_hours",  "usd",
           "estimated",    "base_model", "output_dir"});
  for_each_charge(ledger, [&](const RunReport& report, const AttemptRecord& attempt, Phase phase,
                              const RunTotals& totals) {
    const RunFacts& run = report.record.facts;
    const AttemptFacts& facts = attempt.facts;
    const PhaseTotals& part = totals.of(phase);
    csv.add({run.run,
             run.name,
             run.project,
             std::string(status_name(report.status)),
             std::to_string(attempt.attempt),
             std::string(status_name(attempt.status)),
             utc_text(attempt.began_unix_ms),
             attempt.ended_unix_ms.has_value() ? utc_text(*attempt.ended_unix_ms) : "",
             facts.launcher,
             facts.launcher_job,
             facts.host,
             facts.device_kind,
             facts.sku,
             std::to_string(facts.devices),
             usd_field(facts.usd_micros_per_device_hour),
             facts.price_id,
             facts.price_kind,
             facts.price_source,
             std::string(phase_name(phase)),
             hours_field(part.device_ms),
             usd_field(part.usd_micros),
             attempt.estimated ? "true" : "false",
             run.base_model,
             run.output_dir});
  });
  return csv.text();
}

}  // namespace tailor
