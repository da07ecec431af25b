#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "base/text.h"
#include "data/runs/chart.h"
#include "data/runs/report.h"
#include "data/runs/report_words.h"
#include "data/runs/table.h"

namespace tailor {
namespace {

constexpr const char* kStyle = R"css(
:root { color-scheme: light; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 60rem; background: #fff; color: #1a1a1a;
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .35rem 0; }
.quiet { color: #555; }
.status { font-weight: 600; padding: .1rem .55rem; border-radius: .3rem; background: #eee; }
.succeeded { background: #d8f0de; color: #0b4f22; }
.failed, .lost { background: #fbe0dd; color: #7d1a10; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; padding: 0; }
.figures div { border: 1px solid #d5d5d5; border-radius: .4rem; padding: .6rem .8rem; }
.figures dt { color: #555; font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; margin: 1.25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid #e3e3e3;
  vertical-align: top; }
th { font-weight: 600; border-bottom-color: #999; }
.n { text-align: right; white-space: nowrap; }
.t { white-space: nowrap; }
tr.sum td { font-weight: 600; border-top: 1px solid #999; }
.bar { display: inline-block; height: .7rem; background: #1f5fa8; border-radius: 2px; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
@media print { body { padding: 0; } }
)css";

std::string element(const std::string& tag, const std::string& inner,
                    const std::string& kind = "") {
  return "<" + tag + (kind.empty() ? "" : " class=\"" + kind + "\"") + ">" + inner + "</" + tag +
         ">";
}

std::string cell(const std::string& text) { return element("td", escape_html(text)); }
std::string number_cell(const std::string& text) { return element("td", escape_html(text), "n"); }
std::string code(const std::string& text) { return element("code", escape_html(text)); }

/// Headings beginning with '>' stand over numbers.
std::string table(const std::vector<std::string>& headings, const std::string& rows) {
  std::string head;
  for (const std::string& heading : headings) {
    const bool number = heading.starts_with('>');
    head += element("th", escape_html(number ? heading.substr(1) : heading), number ? "n" : "");
  }
  return "<div class=\"wide\"><table>\n<thead><tr>" + head + "</tr></thead>\n<tbody>\n" + rows +
         "</tbody></table></div>\n";
}

std::string row(const std::string& cells, const std::string& kind = "") {
  return element("tr", cells, kind) + "\n";
}

std::string figures(const RunReport& report) {
  std::string out;
  const auto figure = [&](const std::string& label, const std::string& value) {
    out += "<div>" + element("dt", escape_html(label)) + element("dd", escape_html(value)) +
           "</div>\n";
  };
  const auto& steps = report.metrics.steps;
  figure("Steps", count_text(report.totals.useful_steps));
  if (!steps.empty()) figure("Loss at the end", number_text(steps.back().loss, 4));
  if (!report.metrics.evals.empty()) {
    figure("Eval loss", number_text(report.metrics.evals.back().eval_loss, 4));
  }
  for (const PlannedFigure& measured : planned_and_measured(report)) {
    if (measured.key == "tokens_per_second" && measured.measured.has_value()) {
      figure("Tokens per second", figure_text(measured.measured, measured.key));
    }
  }
  figure("Time", seconds_text(ran_seconds(report)));
  figure(hours_heading(report) == "GPU-hours" ? "GPU-hours" : "Device-hours",
         number_text(report.totals.gpu_hours(), 4));
  figure("Cost", usd_or_unknown(report.totals.usd_micros));
  return "<dl class=\"figures\">\n" + out + "</dl>\n";
}

std::string charts(const RunReport& report) {
  using Points = std::vector<std::pair<double, double>>;
  Points loss;
  Points eval_loss;
  Points speed;
  Points usd;
  Points hours;
  for (const StepMetrics& step : report.metrics.steps) {
    const auto x = static_cast<double>(step.step);
    loss.emplace_back(x, step.loss);
    speed.emplace_back(x, step.tokens_per_second);
    hours.emplace_back(x, step.gpu_hours);
    if (step.usd.has_value()) usd.emplace_back(x, *step.usd);
  }
  for (const EvalMetrics& eval : report.metrics.evals) {
    eval_loss.emplace_back(static_cast<double>(eval.step), eval.eval_loss);
  }

  Chart losses{"Loss", "step", "loss per trained token", {}, false};
  constexpr std::size_t kPointsToSmooth = 60;
  if (loss.size() >= kPointsToSmooth) {
    const std::size_t width = loss.size() / 40 * 2 + 1;
    losses.series.push_back({"each step", "#1f5fa8", loss, true, false});
    losses.series.push_back({"mean of " + std::to_string(width) + " steps", "#1f5fa8",
                             moving_mean(loss, width), false, false});
  } else {
    losses.series.push_back({"training", "#1f5fa8", loss, false, loss.size() < 20});
  }
  losses.series.push_back({"evaluation", "#b8420b", eval_loss, false, true});

  std::string out = to_svg(losses);
  out += to_svg({"Speed",
                 "step",
                 "tokens per second",
                 {{"tokens per second", "#0b6e64", speed, false, false}},
                 true});
  if (!usd.empty()) {
    out += to_svg({"Cost of the run so far, all attempts",
                   "step",
                   "USD",
                   {{"USD", "#6b2fb3", usd, false, false}},
                   true});
  } else {
    const std::string what = hours_heading(report);
    out += to_svg({"Device time of the run so far, all attempts",
                   "step",
                   what,
                   {{what, "#6b2fb3", hours, false, false}},
                   true});
  }
  if (out.empty()) return element("p", "No steps are recorded.", "quiet") + "\n";
  return out;
}

std::string costs(const RunReport& report) {
  const RunTotals& totals = report.totals;
  const int hour_decimals = decimals_for(totals.gpu_hours()) + 1;
  const int usd_decimals = decimals_for(totals.usd().value_or(0));
  std::string rows;
  const auto add = [&](const std::string& label, const PhaseTotals& part, bool sum) {
    const double share = totals.device_ms > 0 ? static_cast<double>(part.device_ms) /
                                                    static_cast<double>(totals.device_ms)
                                              : 0;
    const std::string bar =
        sum ? ""
            : "<span class=\"bar\" style=\"width:" + fixed_text(share * 100, 1) + "%\"></span>";
    rows += row(
        cell(label) +
            number_cell(fixed_text(static_cast<double>(part.device_ms) / 3.6e6, hour_decimals)) +
            number_cell(part.usd_micros.has_value()
                            ? fixed_text(static_cast<double>(*part.usd_micros) / 1e6, usd_decimals)
                            : "unknown") +
            number_cell(percent_text(part.device_ms, totals.device_ms)) +
            "<td style=\"width:30%\">" + bar + "</td>",
        sum ? "sum" : "");
  };
  for (const Phase phase : kPhases) {
    if (totals.of(phase).device_ms > 0) add(phase_words(phase), totals.of(phase), false);
  }
  add("total", {totals.device_ms, totals.usd_micros}, true);
  std::string out = table({"", ">" + hours_heading(report), ">USD", ">share", ""}, rows);
  out += element("p", escape_html(tokens_words(totals)), "quiet") + "\n";
  for (const std::string& line : closing_words(report)) {
    out += element("p", escape_html(line), "quiet") + "\n";
  }
  return out;
}

std::string plan(const RunReport& report) {
  if (!report.plan.is_object()) return {};
  std::string rows;
  for (const PlannedFigure& figure : planned_and_measured(report)) {
    if (!figure.planned.has_value()) continue;
    const bool both = figure.measured.has_value() && *figure.planned != 0;
    rows += row(cell(figure.label) + number_cell(figure_text(figure.planned, figure.key)) +
                number_cell(figure_text(figure.measured, figure.key)) +
                number_cell(both ? fixed_text(*figure.measured / *figure.planned, 2) : "-"));
  }
  if (rows.empty()) return {};
  return element("h2", "Planned and measured") + "\n" +
         table({"", ">planned", ">measured", ">measured / planned"}, rows);
}

std::string attempts(const RunReport& report) {
  std::string rows;
  for (const AttemptRecord& attempt : report.record.attempts) {
    const RunTotals totals = total(report.record, attempt.attempt);
    rows += row(number_cell(std::to_string(attempt.attempt)) +
                cell(status_words(attempt.status) + (attempt.estimated ? " (end estimated)" : "")) +
                element("td", minute_text(attempt.began_unix_ms), "t") +
                number_cell(count_text(attempt.facts.resumed_from_step)) +
                number_cell(count_text(totals.steps)) +
                number_cell(number_text(totals.gpu_hours(), 4)) +
                number_cell(usd_or_unknown(totals.usd_micros)) + cell(device_words(attempt.facts)) +
                cell(attempt.reason));
  }
  return element("h2", "Attempts") + "\n" +
         table({">no.", "status", "began (UTC)", ">from step", ">steps",
                ">" + hours_heading(report), ">cost", "hardware", "reason"},
               rows);
}

std::string files(const RunReport& report) {
  std::string rows;
  for (const ArtifactRecord& artifact : report.record.artifacts) {
    if (artifact.deleted) continue;
    rows += row(cell(artifact.facts.kind) + element("td", code(artifact.facts.path)) +
                number_cell(count_text(artifact.facts.step)) +
                number_cell(bytes_text(artifact.facts.bytes)) +
                element("td", code(artifact.facts.sha256.substr(0, 16))));
  }
  if (rows.empty()) return {};
  return element("h2", "Files") + "\n" +
         table({"kind", "path", ">step", ">size", "SHA-256 begins"}, rows);
}

std::string events(const RunReport& report) {
  std::string rows;
  for (const EventRecord& event : report.record.events) {
    rows += row(element("td", minute_text(event.unix_ms), "t") +
                number_cell(event.step.has_value() ? count_text(*event.step) : "") +
                cell(event.kind) + cell(event.text));
  }
  if (rows.empty()) return {};
  return element("h2", "Events") + "\n" + table({"when (UTC)", ">step", "kind", "what"}, rows);
}

}  // namespace

std::string report_html(const RunReport& report) {
  const RunFacts& facts = report.record.facts;
  const std::string title = facts.name.empty() ? report.record.run() : facts.name;
  std::string out =
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>" +
      escape_html(title) + " - Tailor run</title>\n<style>" + kStyle +
      "</style>\n</head>\n<body>\n";
  out += element("h1", escape_html(title)) + "\n";
  out += element("p", element("span", escape_html(status_words(report.status)),
                              "status " + std::string(status_name(report.status))) +
                          " " + escape_html(attempts_words(report))) +
         "\n";
  out += element("p",
                 "Run " + code(report.record.run()) + ", base model " + code(facts.base_model) +
                     ", folder " + code(facts.output_dir),
                 "quiet") +
         "\n";
  if (!report.record.attempts.empty()) {
    out += element("p", escape_html(hardware_words(report.record.attempts.back().facts)), "quiet") +
           "\n";
  }
  out += figures(report) + charts(report);
  out += element("h2", "Where the time went") + "\n" + costs(report);
  out += plan(report) + attempts(report) + files(report) + events(report);
  return out + "</body>\n</html>\n";
}

}  // namespace tailor
