#include "data/runs/report.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/log.h"
#include "data/runs/run_folder.h"

namespace tailor {
namespace {

Json number_or_null(double value) { return std::isfinite(value) ? Json(value) : Json(); }
Json number_or_null(const std::optional<double>& value) {
  return value.has_value() ? number_or_null(*value) : Json();
}

Json usd_of(const std::optional<std::int64_t>& micros) {
  return micros.has_value() ? Json(static_cast<double>(*micros) / 1e6) : Json();
}

/// plan.json gives figures as {value, unit, working} or as plain numbers.
std::optional<double> planned_figure(const Json& plan, const std::string& key) {
  if (!plan.is_object() || !plan.contains(key)) return std::nullopt;
  const Json& figure = plan[key];
  const Json& value = figure.is_object() && figure.contains("value") ? figure["value"] : figure;
  if (!value.is_number()) return std::nullopt;
  return value.get<double>();
}

}  // namespace

RunReport read_report(const Ledger& ledger, const std::string& run) {
  RunReport report;
  report.record = ledger.read(run);
  report.totals = total(report.record);
  report.status = report.record.status(ledger.clock().unix_ms());
  const fs::path folder = report.record.facts.output_dir;
  if (folder.empty()) return report;
  try {  // the ledger's figures stand by themselves; damage in the folder costs only its part
    if (RunFolder::run_in(folder) != run) return report;
    report.metrics = read_metrics(RunFolder::metrics(folder));
    if (fs::exists(RunFolder::plan(folder))) report.plan = read_json(RunFolder::plan(folder));
  } catch (const Error& error) {
    log_warning("the report leaves out what cannot be read: " + error.parts().what + " (" +
                error.parts().where + ")");
  }
  return report;
}

double ran_seconds(const RunReport& report) {
  std::int64_t ms = 0;
  for (const SegmentRecord& segment : report.record.segments) ms += segment.facts.ms;
  return static_cast<double>(ms) / 1000;
}

StreamTotals stream_totals(const RunReport& report) {
  StreamTotals out;
  for (const StepMetrics& step : report.metrics.steps) {
    if (!std::isfinite(step.seconds)) continue;
    out.bytes += step.stream_bytes;
    out.stall_seconds += step.stall_seconds;
    out.step_seconds += step.seconds;
  }
  return out;
}

std::optional<std::int64_t> host_bytes_peak(const RunReport& report) {
  std::optional<std::int64_t> out;
  for (const StepMetrics& step : report.metrics.steps) {
    if (step.host_bytes_peak) out = std::max(out.value_or(0), *step.host_bytes_peak);
  }
  return out;
}

std::vector<PlannedFigure> planned_and_measured(const RunReport& report) {
  double seconds = 0;
  double tokens = 0;
  for (const StepMetrics& step : report.metrics.steps) {
    if (!std::isfinite(step.seconds)) continue;
    seconds += step.seconds;
    tokens += static_cast<double>(step.tokens);
  }
  const auto count = static_cast<double>(report.metrics.steps.size());
  const auto per_step = [&](double sum) {
    return count > 0 ? std::optional(sum / count) : std::nullopt;
  };
  const RunTotals& totals = report.totals;
  const auto stream_bytes = static_cast<double>(stream_totals(report).bytes);
  std::vector<PlannedFigure> figures = {
      {"steps", "steps", {}, static_cast<double>(totals.useful_steps)},
      {"seconds per step", "seconds_per_step", {}, per_step(seconds)},
      {"tokens per step", "tokens_per_step", {}, per_step(tokens)},
      {"tokens per second",
       "tokens_per_second",
       {},
       seconds > 0 ? std::optional(tokens / seconds) : std::nullopt},
      {"streamed bytes per step", "stream_bytes_per_step", {}, per_step(stream_bytes)},
      {"hours", "hours", {}, ran_seconds(report) / 3600},
      {"GPU-hours", "gpu_hours", {}, totals.gpu_hours()},
      {"USD", "usd", {}, totals.usd()},
  };
  // The plan speaks of a machine's ranks together, the measurement of one.
  const auto& attempts = report.record.attempts;
  if (const auto bytes = host_bytes_peak(report);
      bytes && !attempts.empty() && attempts.back().facts.world_size == 1) {
    figures.push_back({"peak host memory", "host_bytes_peak", {}, static_cast<double>(*bytes)});
  }
  for (PlannedFigure& figure : figures) figure.planned = planned_figure(report.plan, figure.key);
  return figures;
}

Json summary_json(const RunReport& report) {
  const RunRecord& record = report.record;
  const RunTotals& totals = report.totals;
  const AttemptRecord* last = record.attempts.empty() ? nullptr : &record.attempts.back();
  const auto& steps = report.metrics.steps;
  const auto& evals = report.metrics.evals;

  Json out;
  out["run"] = record.run();
  out["name"] = record.facts.name;
  out["project"] = record.facts.project;
  out["status"] = status_name(report.status);
  out["attempts"] = totals.attempts;
  out["steps"] = totals.useful_steps;
  out["loss"] = steps.empty() ? Json() : number_or_null(steps.back().loss);
  out["loss_first"] = steps.empty() ? Json() : number_or_null(steps.front().loss);
  out["eval_loss"] = evals.empty() ? Json() : number_or_null(evals.back().eval_loss);
  out["gpu_hours"] = totals.gpu_hours();
  out["usd"] = number_or_null(totals.usd());
  if (!totals.usd_micros.has_value()) out["usd_null_reason"] = totals.usd_null_reason;
  out["device_kind"] = last != nullptr ? Json(last->facts.device_kind) : Json();
  out["sku"] = last != nullptr ? Json(last->facts.sku) : Json();
  out["devices"] = last != nullptr ? Json(last->facts.devices) : Json();
  out["world_size"] = last != nullptr ? Json(last->facts.world_size) : Json();
  out["price_id"] =
      last != nullptr && !last->facts.price_id.empty() ? Json(last->facts.price_id) : Json();
  out["usd_per_gpu_hour"] =
      last != nullptr ? usd_of(last->facts.usd_micros_per_device_hour) : Json();
  out["seconds"] = ran_seconds(report);
  out["tokens"] = totals.tokens;
  out["trained_tokens"] = totals.trained_tokens;
  out["useful_tokens"] = totals.useful_tokens;
  out["useful_trained_tokens"] = totals.useful_trained_tokens;
  out["usd_per_million_useful_tokens"] = totals.usd_micros.has_value() && totals.useful_tokens > 0
                                             ? Json(static_cast<double>(*totals.usd_micros) /
                                                    static_cast<double>(totals.useful_tokens))
                                             : Json();
  for (const PlannedFigure& figure : planned_and_measured(report)) {
    if (figure.key == "tokens_per_second") out[figure.key] = number_or_null(figure.measured);
  }
  const StreamTotals stream = stream_totals(report);
  out["stream_bytes"] = stream.bytes;
  out["stall_seconds"] = stream.stall_seconds;
  out["bound"] = stream.step_seconds > 0 ? Json(stream.bound()) : Json();
  if (const auto bytes = host_bytes_peak(report)) out["host_bytes_peak"] = *bytes;
  out["estimated"] = totals.estimated;
  Json phases = Json::object();
  for (const Phase phase : kPhases) {
    const PhaseTotals& part = totals.of(phase);
    phases[std::string(phase_name(phase))] = {
        {"gpu_hours", static_cast<double>(part.device_ms) / 3.6e6},
        {"usd", usd_of(part.usd_micros)}};
  }
  out["phases"] = phases;
  Json planned = Json::object();
  for (const PlannedFigure& figure : planned_and_measured(report)) {
    if (figure.planned.has_value()) planned[figure.key] = number_or_null(figure.planned);
  }
  out["planned"] = report.plan.is_object() ? planned : Json();
  Json artifacts = Json::array();
  for (const ArtifactRecord& artifact : record.artifacts) {
    if (artifact.deleted || artifact.facts.kind == "checkpoint") continue;
    artifacts.push_back({{"kind", artifact.facts.kind},
                         {"path", artifact.facts.path},
                         {"bytes", artifact.facts.bytes},
                         {"sha256", artifact.facts.sha256}});
  }
  out["artifacts"] = artifacts;
  out["base_model"] = record.facts.base_model;
  out["output_dir"] = record.facts.output_dir;
  out["recipe_sha256"] = record.facts.recipe_sha256;
  out["code_version"] = record.facts.code_version;
  out["started"] = last != nullptr ? Json(utc_text(record.attempts.front().began_unix_ms)) : Json();
  out["ended"] = last != nullptr && last->ended_unix_ms.has_value()
                     ? Json(utc_text(*last->ended_unix_ms))
                     : Json();
  out["exit_code"] =
      last != nullptr && last->exit_code.has_value() ? Json(*last->exit_code) : Json();
  out["reason"] = last != nullptr ? Json(last->reason) : Json();
  return out;
}

RunReport write_report(const Ledger& ledger, const std::string& run) {
  RunReport report = read_report(ledger, run);
  const fs::path folder = report.record.facts.output_dir;
  TAILOR_CHECK(!folder.empty());
  // Paths and messages may hold bytes that are not UTF-8: they must not cost the report.
  const std::string text = summary_json(report).dump(2, ' ', false, Json::error_handler_t::replace);
  write_atomically(RunFolder::summary(folder), text + "\n");
  write_atomically(RunFolder::report(folder), report_html(report));
  return report;
}

}  // namespace tailor
