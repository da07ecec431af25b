#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/text.h"
#include "data/runs/report.h"
#include "data/runs/report_words.h"
#include "data/runs/table.h"

namespace tailor {

std::string attempts_words(const RunReport& report) {
  std::string out = counted(report.totals.attempts, "attempt");
  std::vector<std::string> others;
  for (const RunStatus status : {RunStatus::lost, RunStatus::failed, RunStatus::preempted,
                                 RunStatus::stopped_user, RunStatus::stopped_budget}) {
    const auto& attempts = report.record.attempts;
    const auto count = std::count_if(attempts.begin(), attempts.end(),
                                     [&](const AttemptRecord& a) { return a.status == status; });
    if (count > 0) others.push_back(std::to_string(count) + " " + status_words(status));
  }
  if (!others.empty()) out += " (" + join(others, ", ") + ")";
  return out;
}

std::string status_words(RunStatus status) {
  switch (status) {
    case RunStatus::stopped_user:
      return "stopped";
    case RunStatus::stopped_budget:
      return "stopped by budget";
    default:
      return std::string(status_name(status));
  }
}

std::string phase_words(Phase phase) {
  switch (phase) {
    case Phase::start:
      return "start of the job";
    case Phase::load:
      return "load model";
    case Phase::stall:
      return "wait for weights";
    case Phase::lost:
      return "lost, done again";
    default:
      return std::string(phase_name(phase));
  }
}

std::string device_words(const AttemptFacts& facts) {
  std::string out =
      std::to_string(facts.devices) + " x " + (facts.sku.empty() ? facts.device_kind : facts.sku);
  if (!facts.host.empty()) out += " on " + facts.host;
  if (facts.nodes > 1) out += " and " + counted(facts.nodes - 1, "more host");
  return out;
}

std::string hardware_words(const AttemptFacts& facts) {
  const bool cpu = facts.device_kind == "cpu";
  std::string out = device_words(facts);
  if (facts.usd_micros_per_device_hour.has_value()) {
    out += ", " + usd_text(*facts.usd_micros_per_device_hour) +
           (cpu ? " per device-hour" : " per GPU-hour");
    if (!facts.price_kind.empty()) out += " " + facts.price_kind;
    if (!facts.price_id.empty()) out += " (" + facts.price_id + ")";
  } else {
    out += facts.no_price_reason.empty() ? ", no price known" : ", " + facts.no_price_reason;
  }
  if (cpu) out += "; a rank on the CPU counts as one device";
  return out;
}

std::string hours_heading(const RunReport& report) {
  const auto& attempts = report.record.attempts;
  const bool cpu = !attempts.empty() && attempts.back().facts.device_kind == "cpu";
  return cpu ? "device-hours" : "GPU-hours";
}

std::string percent_text(std::int64_t part, std::int64_t whole) {
  if (whole == 0) return "-";
  return fixed_text(100.0 * static_cast<double>(part) / static_cast<double>(whole), 1) + "%";
}

std::string figure_text(const std::optional<double>& value, const std::string& key) {
  if (!value.has_value()) return "unknown";
  if (key == "usd") return usd_text(std::llround(*value * 1e6));
  if (key == "stream_bytes_per_step") return bytes_text(std::llround(*value));
  if (key == "steps") return count_text(std::llround(*value));
  if (std::abs(*value) >= 1000) return count_text(std::llround(*value));
  return number_text(*value, 4);
}

std::string tokens_words(const RunTotals& totals) {
  std::string out = count_text(totals.useful_tokens) + " useful tokens";
  if (totals.useful_tokens != totals.tokens) out += " of " + count_text(totals.tokens);
  return out + ", " + count_text(totals.useful_trained_tokens) + " of them carry loss";
}

std::vector<std::string> closing_words(const RunReport& report) {
  const RunTotals& totals = report.totals;
  std::vector<std::string> lines;
  if (totals.usd_micros.has_value() && totals.useful_tokens > 0) {
    const double micros_per_million =
        static_cast<double>(*totals.usd_micros) * 1e6 / static_cast<double>(totals.useful_tokens);
    lines.push_back("per million useful tokens  " + usd_text(std::llround(micros_per_million)));
  }
  if (!totals.usd_micros.has_value()) lines.push_back("USD unknown: " + totals.usd_null_reason);
  if (totals.busy_device_ms.has_value()) {
    lines.push_back("busy  " + percent_text(*totals.busy_device_ms, totals.device_ms) +
                    " of the device time");
  }
  if (const StreamTotals stream = stream_totals(report); stream.bytes > 0) {
    const Json& plan = report.plan;
    const bool planned = plan.is_object() && plan.contains("bound") && plan["bound"].is_object() &&
                         plan["bound"].contains("value") && plan["bound"]["value"].is_string();
    lines.push_back(
        "weights  " + bytes_text(stream.bytes) + " read from disk; steps waited for " +
        fixed_text(100 * stream.stall_share(), 1) + "% of their time: bound by " + stream.bound() +
        (planned ? " (planned: " + plan["bound"]["value"].get<std::string>() + ")" : ""));
  }
  if (totals.energy_mj.has_value()) {
    lines.push_back("energy  " + number_text(static_cast<double>(*totals.energy_mj) / 3.6e9, 4) +
                    " kWh");
  }
  const RunFacts& facts = report.record.facts;
  if (facts.usd_micros_limit.has_value() && totals.usd_micros.has_value()) {
    lines.push_back("budget  " + usd_text(*totals.usd_micros) + " of " +
                    usd_text(*facts.usd_micros_limit) + " (" +
                    percent_text(*totals.usd_micros, *facts.usd_micros_limit) + ")");
  }
  if (facts.device_ms_limit.has_value()) {
    lines.push_back("budget  " + number_text(totals.gpu_hours(), 4) + " of " +
                    number_text(static_cast<double>(*facts.device_ms_limit) / 3.6e6, 4) + " " +
                    hours_heading(report) + " (" +
                    percent_text(totals.device_ms, *facts.device_ms_limit) + ")");
  }
  if (totals.estimated) {
    lines.push_back(
        "an attempt that ended without a word is counted up to its last heartbeat "
        "(at most 15 s too little)");
  }
  return lines;
}

std::string report_text(const RunReport& report) {
  const RunRecord& record = report.record;
  const RunTotals& totals = report.totals;
  std::string out = record.facts.name + "   " + status_words(report.status) + "   " +
                    attempts_words(report) + "   run " + record.run() + "\n";
  if (!record.attempts.empty()) {
    out += " hardware  " + hardware_words(record.attempts.back().facts) + "\n";
    if (report.status != RunStatus::succeeded && !record.attempts.back().reason.empty()) {
      out += " reason    " + record.attempts.back().reason + "\n";
    }
  }

  const int hour_decimals = decimals_for(totals.gpu_hours()) + 1;
  const int usd_decimals = decimals_for(totals.usd().value_or(0));
  TextTable table({"", ">" + hours_heading(report), ">USD", ">share", ""});
  const auto row = [&](const std::string& label, const PhaseTotals& part, const std::string& note) {
    table.add({label, fixed_text(static_cast<double>(part.device_ms) / 3.6e6, hour_decimals),
               part.usd_micros.has_value()
                   ? fixed_text(static_cast<double>(*part.usd_micros) / 1e6, usd_decimals)
                   : "unknown",
               percent_text(part.device_ms, totals.device_ms), note});
  };
  for (const Phase phase : kPhases) {
    const PhaseTotals& part = totals.of(phase);
    if (part.device_ms == 0 && phase != Phase::train) continue;
    std::string note;
    if (phase == Phase::train) note = tokens_words(totals);
    if (phase == Phase::lost && totals.steps > totals.useful_steps) {
      note = counted(totals.steps - totals.useful_steps, "step") + " done again";
    }
    row(phase_words(phase), part, note);
  }
  row("total", {totals.device_ms, totals.usd_micros}, "");
  out += table.text(" ");
  for (const std::string& line : closing_words(report)) out += " " + line + "\n";

  if (!report.metrics.steps.empty()) {
    const auto& steps = report.metrics.steps;
    out += " loss  " + number_text(steps.front().loss, 5) + " at step " +
           count_text(steps.front().step) + ", " + number_text(steps.back().loss, 5) + " at step " +
           count_text(steps.back().step);
    if (!report.metrics.evals.empty()) {
      out += "; eval loss " + number_text(report.metrics.evals.back().eval_loss, 5);
    }
    out += "\n";
  }

  if (report.plan.is_object()) {
    TextTable plan({"", ">planned", ">measured", ">measured / planned"});
    for (const PlannedFigure& figure : planned_and_measured(report)) {
      if (!figure.planned.has_value()) continue;
      const bool both = figure.measured.has_value() && *figure.planned != 0;
      plan.add({figure.label, figure_text(figure.planned, figure.key),
                figure_text(figure.measured, figure.key),
                both ? fixed_text(*figure.measured / *figure.planned, 2) : "-"});
    }
    out += plan.text(" ");
  }
  for (const ArtifactRecord& artifact : record.artifacts) {
    if (artifact.deleted || artifact.facts.kind == "checkpoint") continue;
    out += " " + artifact.facts.kind + "  " + artifact.facts.path + "  " +
           bytes_text(artifact.facts.bytes) + "  sha256 " + artifact.facts.sha256 + "\n";
  }
  return out;
}

}  // namespace tailor
