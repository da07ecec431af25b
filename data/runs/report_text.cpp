#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/text.h"
#include "data/runs/report.h"
#include "data/runs/report_words.h"
#include "data/runs/table.h"

namespace tailor {

std::string report_text(const RunReport& report) {
  const RunRecord& record = report.record;
  const RunTotals& totals = report.totals;
  std::string out = visible_text(record.facts.name) + "   " + status_words(report.status) + "   " +
                    attempts_words(report) + "   run " + record.run() + "\n";
  if (!record.attempts.empty()) {
    out += " hardware  " + visible_text(hardware_words(record.attempts.back().facts)) + "\n";
    if (report.status != RunStatus::succeeded && !record.attempts.back().reason.empty()) {
      out += " reason    " + visible_text(record.attempts.back().reason) + "\n";
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
    row(phase_words(phase), part, phase_note(report, phase));
  }
  row("total", {totals.device_ms, totals.usd_micros}, total_note(report));
  out += table.text(" ");
  for (const std::string& line : closing_words(report)) out += " " + visible_text(line) + "\n";

  if (!report.metrics.steps.empty()) {
    const auto& steps = report.metrics.steps;
    out += " loss  " + number_text(steps.front().loss, 5) + " at step " +
           count_text(steps.front().step) + ", " + number_text(steps.back().loss, 5) + " at step " +
           count_text(steps.back().step);
    if (!report.metrics.evals.empty()) {
      out += "; held-out " + number_text(report.metrics.evals.back().eval_loss, 5);
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
    out += " " +
           visible_text(artifact.facts.kind + "  " + artifact.facts.path + "  " +
                        bytes_text(artifact.facts.bytes) + "  sha256 " + artifact.facts.sha256) +
           "\n";
  }
  return out;
}

std::string details_text(const RunReport& report) {
  std::vector<double> loss;
  std::vector<double> speed;
  std::vector<double> stall;
  for (const StepMetrics& step : report.metrics.steps) {
    loss.push_back(step.loss);
    speed.push_back(step.tokens_per_second);
    stall.push_back(step.seconds > 0 ? 100 * step.stall_seconds / step.seconds : 0);
  }
  std::string out;
  if (!loss.empty()) {
    TextTable lines({"over the steps", "", ">least", ">most", ">last"});
    const auto add = [&](const std::string& label, const std::vector<double>& values) {
      const auto [low, high] = std::minmax_element(values.begin(), values.end());
      lines.add({label, sparkline(values, 48), number_text(*low, 4), number_text(*high, 4),
                 number_text(values.back(), 4)});
    };
    add("loss", loss);
    if (report.metrics.evals.size() > 1) {
      std::vector<double> held_out;
      for (const EvalMetrics& eval : report.metrics.evals) held_out.push_back(eval.eval_loss);
      add("held-out loss", held_out);
    }
    add("tokens per second", speed);
    if (std::any_of(stall.begin(), stall.end(), [](double share) { return share > 0; })) {
      add("% waiting for weights", stall);
    }
    out += "\n" + lines.text(" ");
  }
  out += "\n";
  for (const auto& [label, value] : memory_and_energy_words(report)) {
    out += " " + lower(label) + "  " + value + "\n";
  }
  if (const std::string words = expert_words(report); !words.empty()) {
    out += " experts  " + words + "\n";
  }
  return out;
}

}  // namespace tailor
