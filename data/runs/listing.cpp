#include "data/runs/listing.h"

#include "base/error.h"
#include "base/text.h"
#include "data/runs/report.h"
#include "data/runs/report_words.h"
#include "data/runs/table.h"

namespace tailor {
namespace {

Json hours(std::int64_t device_ms) { return static_cast<double>(device_ms) / 3.6e6; }

Json usd(const std::optional<std::int64_t>& micros) {
  return micros.has_value() ? Json(static_cast<double>(*micros) / 1e6) : Json();
}

Json time_or_null(const std::optional<std::int64_t>& unix_ms) {
  return unix_ms.has_value() ? Json(utc_text(*unix_ms)) : Json();
}

Json run_row(const RunReport& report) {
  const RunRecord& record = report.record;
  const bool begun = !record.attempts.empty();
  const AttemptFacts facts = begun ? record.attempts.back().facts : AttemptFacts{};
  Json row;
  row["run"] = record.run();
  row["name"] = record.facts.name;
  row["project"] = record.facts.project;
  row["status"] = status_name(report.status);
  row["attempts"] = report.totals.attempts;
  row["gpu_hours"] = report.totals.gpu_hours();
  row["usd"] = usd(report.totals.usd_micros);
  if (!report.totals.usd_micros.has_value()) row["usd_null_reason"] = report.totals.usd_null_reason;
  row["started"] = utc_text(begun ? record.attempts.front().began_unix_ms : record.created_unix_ms);
  row["ended"] = begun ? time_or_null(record.attempts.back().ended_unix_ms) : Json();
  row["steps"] = report.totals.useful_steps;
  row["tokens"] = report.totals.tokens;
  row["device_kind"] = begun ? Json(facts.device_kind) : Json();
  row["sku"] = begun ? Json(facts.sku) : Json();
  row["devices"] = begun ? Json(facts.devices) : Json();
  row["base_model"] = record.facts.base_model;
  row["output_dir"] = record.facts.output_dir;
  return row;
}

Json phases_json(const RunTotals& totals) {
  Json out = Json::object();
  for (const Phase phase : kPhases) {
    const PhaseTotals& part = totals.of(phase);
    out[std::string(phase_name(phase))] = {{"gpu_hours", hours(part.device_ms)},
                                           {"usd", usd(part.usd_micros)}};
  }
  return out;
}

Json attempt_json(const RunRecord& record, const AttemptRecord& attempt) {
  const RunTotals totals = total(record, attempt.attempt);
  const AttemptFacts& facts = attempt.facts;
  Json out;
  out["attempt"] = attempt.attempt;
  out["status"] = status_name(attempt.status);
  out["estimated"] = attempt.estimated;
  out["began"] = utc_text(attempt.began_unix_ms);
  out["heartbeat"] = utc_text(attempt.heartbeat_unix_ms);
  out["ended"] = time_or_null(attempt.ended_unix_ms);
  out["exit_code"] = attempt.exit_code.has_value() ? Json(*attempt.exit_code) : Json();
  out["reason"] = attempt.reason;
  out["launcher"] = facts.launcher;
  out["launcher_job"] = facts.launcher_job;
  out["world_size"] = facts.world_size;
  out["nodes"] = facts.nodes;
  out["devices"] = facts.devices;
  out["host"] = facts.host;
  out["device_kind"] = facts.device_kind;
  out["sku"] = facts.sku;
  out["usd_per_gpu_hour"] = usd(facts.usd_micros_per_device_hour);
  if (!facts.usd_micros_per_device_hour.has_value()) {
    out["usd_null_reason"] = facts.no_price_reason;
  }
  out["price_id"] = facts.price_id;
  out["price_kind"] = facts.price_kind;
  out["price_source"] = facts.price_source;
  out["resumed_from_step"] = facts.resumed_from_step;
  out["steps"] = totals.steps;
  out["useful_steps"] = totals.useful_steps;
  out["tokens"] = totals.tokens;
  out["trained_tokens"] = totals.trained_tokens;
  out["useful_tokens"] = totals.useful_tokens;
  out["gpu_hours"] = totals.gpu_hours();
  out["usd"] = usd(totals.usd_micros);
  out["phases"] = phases_json(totals);
  return out;
}

Json run_document(const RunReport& report) {
  const RunRecord& record = report.record;
  Json out = run_row(report);
  out["recipe_sha256"] = record.facts.recipe_sha256;
  out["base_sha256"] = record.facts.base_sha256;
  out["dataset_sha256"] = record.facts.dataset_sha256;
  out["code_version"] = record.facts.code_version;
  out["seed"] = record.facts.seed;
  out["usd_limit"] = usd(record.facts.usd_micros_limit);
  out["gpu_hours_limit"] =
      record.facts.device_ms_limit.has_value() ? hours(*record.facts.device_ms_limit) : Json();
  out["estimated"] = report.totals.estimated;
  out["trained_tokens"] = report.totals.trained_tokens;
  out["useful_tokens"] = report.totals.useful_tokens;
  out["useful_trained_tokens"] = report.totals.useful_trained_tokens;
  out["energy_kwh"] = report.totals.energy_mj
                          ? Json(static_cast<double>(*report.totals.energy_mj) / 3.6e9)
                          : Json();  // not measured
  out["phases"] = phases_json(report.totals);
  out["attempt_list"] = Json::array();
  for (const AttemptRecord& attempt : record.attempts) {
    out["attempt_list"].push_back(attempt_json(record, attempt));
  }
  out["segments"] = Json::array();
  for (const SegmentRecord& segment : record.segments) {
    out["segments"].push_back({{"attempt", segment.attempt},
                               {"phase", phase_name(segment.facts.phase)},
                               {"from_ms", segment.from_ms},
                               {"to_ms", segment.from_ms + segment.facts.ms},
                               {"device_ms", segment.device_ms},
                               {"usd", usd(segment.usd_micros)},
                               {"step", segment.facts.step},
                               {"steps", segment.facts.steps},
                               {"tokens", segment.facts.tokens},
                               {"trained_tokens", segment.facts.trained_tokens},
                               {"estimated", segment.estimated}});
  }
  out["artifacts"] = Json::array();
  for (const ArtifactRecord& artifact : record.artifacts) {
    out["artifacts"].push_back({{"attempt", artifact.attempt},
                                {"kind", artifact.facts.kind},
                                {"path", artifact.facts.path},
                                {"step", artifact.facts.step},
                                {"bytes", artifact.facts.bytes},
                                {"sha256", artifact.facts.sha256},
                                {"at", utc_text(artifact.unix_ms)},
                                {"deleted", artifact.deleted}});
  }
  out["events"] = Json::array();
  for (const EventRecord& event : record.events) {
    out["events"].push_back({{"attempt", event.attempt.has_value() ? Json(*event.attempt) : Json()},
                             {"at", utc_text(event.unix_ms)},
                             {"step", event.step.has_value() ? Json(*event.step) : Json()},
                             {"kind", event.kind},
                             {"text", event.text}});
  }
  return out;
}

/// The beginning of an identifier that people type: its time and 20 random bits.
std::string short_run(const std::string& run) { return run.substr(0, 14); }

}  // namespace

RunReport ledger_report(const Ledger& ledger, const std::string& run) {
  RunReport report;
  report.record = ledger.read(run);
  report.totals = total(report.record);
  report.status = report.record.status(ledger.clock().unix_ms());
  return report;
}

std::vector<RunReport> ledger_reports(const Ledger* ledger) {
  std::vector<RunReport> out;
  if (ledger == nullptr) return out;
  for (const std::string& run : ledger->runs()) out.push_back(ledger_report(*ledger, run));
  return out;
}

Json runs_json(const Ledger* ledger) {
  Json rows = Json::array();
  for (const RunReport& report : ledger_reports(ledger)) rows.push_back(run_row(report));
  return rows;
}

std::string runs_text(const Ledger* ledger) {
  const std::vector<RunReport> reports = ledger_reports(ledger);
  if (reports.empty()) {
    return ledger == nullptr ? "no runs yet\n" : "no runs yet in " + ledger->place() + "\n";
  }
  TextTable table({"run", "name", "status", ">attempts", ">steps", ">GPU-hours", ">USD", "device",
                   "started (UTC)", "output_dir"});
  for (const RunReport& report : reports) {
    const RunRecord& record = report.record;
    const bool begun = !record.attempts.empty();
    const AttemptFacts facts = begun ? record.attempts.back().facts : AttemptFacts{};
    table.add({short_run(record.run()), record.facts.name, status_words(report.status),
               std::to_string(report.totals.attempts), count_text(report.totals.useful_steps),
               number_text(report.totals.gpu_hours(), 4), usd_or_unknown(report.totals.usd_micros),
               begun ? std::to_string(facts.devices) + " x " +
                           (facts.sku.empty() ? facts.device_kind : facts.sku)
                     : "-",
               minute_text(begun ? record.attempts.front().began_unix_ms : record.created_unix_ms),
               record.facts.output_dir});
  }
  return table.text();
}

std::string require_run(const Ledger* ledger, std::string_view what) {
  if (ledger == nullptr) {
    throw Error(Fault::usage, {"there is no ledger yet, so no run '" + std::string(what) + "'", "",
                               "`tailor train` makes it; --ledger names another one."});
  }
  if (const auto run = ledger->find_run(what)) return *run;
  if (!what.empty()) {
    std::string folder = fs::absolute(what).lexically_normal().string();
    while (folder.size() > 1 && folder.back() == '/') folder.pop_back();
    if (const auto run = ledger->run_in_folder(folder)) return *run;
  }
  std::vector<std::string> names;
  for (const std::string& run : ledger->runs()) names.push_back(ledger->read(run).facts.name);
  const std::string near = nearest_name(what, names);
  throw Error(Fault::usage,
              {"no run '" + std::string(what) + "'", ledger->place(),
               (near.empty() ? "" : "Did you mean '" + near + "'? ") +
                   "Give a run's identifier or the beginning of one, its name, or its folder; "
                   "`tailor runs ls` lists them."});
}

Json run_json(const Ledger* ledger, std::string_view what) {
  const std::string run = require_run(ledger, what);
  return run_document(ledger_report(*ledger, run));
}

std::string run_text(const Ledger* ledger, std::string_view what) {
  const std::string run = require_run(ledger, what);
  const RunReport report = read_report(*ledger, run);
  const RunRecord& record = report.record;
  std::string out = report_text(report);
  out += " base model  " + record.facts.base_model + "\n output_dir  " + record.facts.output_dir +
         "\n";

  out += "\nattempts\n";
  TextTable attempts({">no.", "status", "began (UTC)", ">from step", ">steps",
                      ">" + hours_heading(report), ">USD", "host", "reason"});
  for (const AttemptRecord& attempt : record.attempts) {
    const RunTotals totals = total(record, attempt.attempt);
    attempts.add({std::to_string(attempt.attempt),
                  status_words(attempt.status) + (attempt.estimated ? " (end estimated)" : ""),
                  minute_text(attempt.began_unix_ms), count_text(attempt.facts.resumed_from_step),
                  count_text(totals.steps), number_text(totals.gpu_hours(), 4),
                  usd_or_unknown(totals.usd_micros), attempt.facts.host, attempt.reason});
  }
  out += attempts.text(" ");

  if (!record.artifacts.empty()) {
    out += "\nfiles\n";
    TextTable files({"kind", ">step", ">size", "state", "path"});
    for (const ArtifactRecord& artifact : record.artifacts) {
      files.add({artifact.facts.kind, count_text(artifact.facts.step),
                 bytes_text(artifact.facts.bytes), artifact.deleted ? "deleted" : "complete",
                 artifact.facts.path});
    }
    out += files.text(" ");
  }
  if (!record.events.empty()) {
    out += "\nevents\n";
    TextTable events({"when (UTC)", ">step", "kind", "what"});
    for (const EventRecord& event : record.events) {
      events.add({minute_text(event.unix_ms),
                  event.step.has_value() ? count_text(*event.step) : "-", event.kind, event.text});
    }
    out += events.text(" ");
  }
  return out;
}

Json export_json(const Ledger* ledger) {
  Json out = Json::array();
  for (const RunReport& report : ledger_reports(ledger)) out.push_back(run_document(report));
  return out;
}

}  // namespace tailor
