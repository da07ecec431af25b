#include <algorithm>
#include <cmath>
#include <string>

#include "base/text.h"
#include "data/runs/report_page.h"
#include "data/runs/report_words.h"
#include "data/runs/table.h"

namespace tailor {
namespace {

using Marks = std::vector<std::pair<double, std::string>>;

/// Where later attempts went on.
Marks attempt_marks(const RunReport& report) {
  Marks out;
  for (const AttemptRecord& attempt : report.record.attempts) {
    if (attempt.attempt == 1) continue;
    out.emplace_back(static_cast<double>(attempt.facts.resumed_from_step),
                     "attempt " + std::to_string(attempt.attempt));
  }
  return out;
}

/// The steps' own line: of many of them pale, with their median before it; of few as it is.
void add_steps(Chart& chart, const Series& steps) {
  constexpr std::size_t kPointsToSmooth = 60;
  if (steps.points.size() < kPointsToSmooth) {
    chart.series.push_back(steps);
    return;
  }
  const std::size_t width = steps.points.size() / 40 * 2 + 1;
  chart.series.push_back(
      {.label = "each step", .colour = steps.colour, .points = steps.points, .faint = true});
  chart.series.push_back(
      {.label = "median of " + count_text(static_cast<std::int64_t>(width)) + " steps",
       .colour = steps.colour,
       .points = moving_median(steps.points, width, 400)});
}

std::string loss_chart(const RunReport& report) {
  Points loss;
  Points eval_loss;
  for (const StepMetrics& step : report.metrics.steps) {
    loss.emplace_back(static_cast<double>(step.step), step.loss);
  }
  for (const EvalMetrics& eval : report.metrics.evals) {
    eval_loss.emplace_back(static_cast<double>(eval.step), eval.eval_loss);
  }
  Chart chart;
  chart.title = "Loss";
  chart.x_label = "step";
  chart.y_label = "mean loss of a trained token";
  chart.whole_x = chart.may_cut = true;
  chart.marks = attempt_marks(report);
  add_steps(
      chart,
      {.label = "training", .colour = "var(--blue)", .points = loss, .dots = loss.size() < 20});
  chart.series.push_back(
      {.label = "held-out", .colour = "var(--orange)", .points = eval_loss, .dots = true});
  return to_figure(chart);
}

/// Tokens a second, and how much of each step waiting for weights took.
std::string speed_charts(const RunReport& report) {
  Points speed;
  Points stall;
  double stalled = 0;
  for (const StepMetrics& step : report.metrics.steps) {
    const auto x = static_cast<double>(step.step);
    speed.emplace_back(x, step.tokens_per_second);
    if (step.seconds > 0) stall.emplace_back(x, 100 * step.stall_seconds / step.seconds);
    stalled += step.stall_seconds;
  }
  Chart chart;
  chart.title = "Speed";
  chart.x_label = "step";
  chart.y_label = "tokens per second";
  chart.whole_x = chart.from_zero = true;
  chart.marks = attempt_marks(report);
  add_steps(chart, {.colour = "var(--teal)", .points = speed});
  if (stalled <= 0) chart.note = "No step waited for weights.";
  std::string out = to_figure(chart);
  if (stalled <= 0) return out;
  chart.title = "Waiting for weights";
  chart.y_label = "% of a step's time";
  chart.series = {{.colour = "var(--stall)", .points = stall, .area = true}};
  chart.height = 0.5;
  const StreamTotals totals = stream_totals(report);
  chart.note = fixed_text(100 * totals.stall_share(), 1) + "% of all steps' time.";
  return out + to_figure(chart);
}

/// Clock time in a unit that suits the run.
struct Unit {
  const char* name;
  double seconds;
};
Unit unit_for(double seconds) {
  if (seconds < 180) return {"seconds", 1};
  if (seconds < 3 * 3600) return {"minutes", 60};
  if (seconds < 72 * 3600) return {"hours", 3600};
  return {"days", 86400};
}

}  // namespace

std::string step_charts(const RunReport& report) {
  if (report.metrics.steps.empty() && report.metrics.evals.empty()) return {};
  return loss_chart(report) + speed_charts(report);
}

std::string cost_chart(const RunReport& report) {
  const RunRecord& record = report.record;
  if (record.segments.empty()) return {};
  const bool priced = report.totals.usd_micros.has_value();
  const std::int64_t first = record.attempts.front().began_unix_ms;
  double last_seconds = 0;
  for (const SegmentRecord& segment : record.segments) {
    const AttemptRecord& attempt = record.attempt_of(segment.attempt);
    last_seconds = std::max(last_seconds, static_cast<double>(attempt.began_unix_ms - first +
                                                              segment.from_ms + segment.facts.ms) /
                                              1000);
  }
  const Unit unit = unit_for(last_seconds);
  const auto at = [&](std::int64_t unix_ms) {
    return static_cast<double>(unix_ms - first) / 1000 / unit.seconds;
  };

  Chart chart;
  chart.title = priced ? "Cost over time" : "Device time over time";
  chart.x_label = std::string(unit.name) + " since the first attempt began";
  chart.y_label = priced ? "USD, all attempts" : hours_heading(report) + ", all attempts";
  chart.from_zero = true;
  Series held{.label = "devices held", .colour = "var(--purple)", .area = true};
  Series between{.label = "between attempts", .colour = "var(--strong)", .dashed = true};
  double sum = 0;
  int attempt = 0;
  const auto finish_line = [&] {
    if (!held.points.empty()) chart.series.push_back(held);
    held.points.clear();
    held.label.clear();  // one entry in the key
  };
  for (const SegmentRecord& segment : record.segments) {
    const AttemptRecord& of = record.attempt_of(segment.attempt);
    const double from = at(of.began_unix_ms + segment.from_ms);
    if (segment.attempt != attempt) {
      if (!held.points.empty()) {
        between.points = {held.points.back(), {from, sum}};
        finish_line();
        chart.series.push_back(between);
        between.label.clear();
      }
      attempt = segment.attempt;
      if (attempt > 1) chart.marks.emplace_back(from, "attempt " + std::to_string(attempt));
      held.points.emplace_back(from, sum);
    }
    sum += priced ? static_cast<double>(segment.usd_micros.value_or(0)) / 1e6
                  : static_cast<double>(segment.device_ms) / 3.6e6;
    held.points.emplace_back(at(of.began_unix_ms + segment.from_ms + segment.facts.ms), sum);
  }
  finish_line();
  const auto level = [&](double value, const std::string& label) {
    if (value > 1.8 * sum) {
      chart.note += (chart.note.empty() ? "" : " ") + label + " is beyond the axis.";
    }
    chart.levels.emplace_back(value, label);
  };
  const RunFacts& facts = record.facts;
  if (priced && facts.usd_micros_limit) {
    level(static_cast<double>(*facts.usd_micros_limit) / 1e6,
          "Budget " + usd_text(*facts.usd_micros_limit));
  } else if (!priced && facts.device_ms_limit) {
    const double hours = static_cast<double>(*facts.device_ms_limit) / 3.6e6;
    level(hours, "Budget " + number_text(hours, 4) + " " + hours_heading(report));
  }
  for (const PlannedFigure& figure : planned_and_measured(report)) {
    if (figure.key != (priced ? "usd" : "gpu_hours") || !figure.planned) continue;
    level(*figure.planned, "Planned " + figure_text(figure.planned, figure.key) +
                               (priced ? "" : " " + hours_heading(report)));
  }
  return to_figure(chart);
}

}  // namespace tailor
