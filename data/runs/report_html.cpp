#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "base/text.h"
#include "data/runs/report_page.h"
#include "data/runs/report_words.h"
#include "data/runs/table.h"

namespace tailor {
namespace {

std::string header(const RunReport& report) {
  const RunFacts& facts = report.record.facts;
  const std::string title = facts.name.empty() ? report.record.run() : facts.name;
  std::string out = "<header>\n" + element("p", "Report of a Tailor run", "kicker") + "\n" +
                    element("h1", escape_html(title)) + "\n";
  out += element("p",
                 element("span", escape_html(status_words(report.status)),
                         "status " + std::string(status_name(report.status))) +
                     " " + escape_html(summary_words(report)),
                 "lead") +
         "\n";
  std::string rows;
  const auto fact = [&](const std::string& label, const std::string& html) {
    rows += element("dt", escape_html(label)) + element("dd", html) + "\n";
  };
  fact("Base model", code(facts.base_model));
  const auto& attempts = report.record.attempts;
  if (!attempts.empty()) {
    fact("Hardware", escape_html(hardware_words(attempts.back().facts)));
    std::string when = minute_text(attempts.front().began_unix_ms);
    if (attempts.back().ended_unix_ms) when += " to " + minute_text(*attempts.back().ended_unix_ms);
    fact("When", escape_html(when + " UTC"));
  }
  if (!facts.project.empty()) fact("Project", escape_html(facts.project));
  fact("Run", code(report.record.run()) + " in " + code(facts.output_dir));
  return out + "<dl class=\"facts\">\n" + rows + "</dl>\n</header>\n";
}

std::string tiles(const RunReport& report) {
  std::string out;
  const auto tile = [&](const std::string& label, const std::string& value,
                        const std::string& more) {
    out += "<div>" + element("dt", escape_html(label)) +
           element("dd", escape_html(value), "value") +
           (more.empty() ? "" : element("dd", escape_html(more), "more")) + "</div>\n";
  };
  const auto& steps = report.metrics.steps;
  const auto& evals = report.metrics.evals;
  if (!evals.empty()) {
    const bool several = evals.size() > 1;
    tile("Held-out loss", number_text(evals.back().eval_loss, 4),
         several ? "from " + number_text(evals.front().eval_loss, 4) + " at step " +
                       count_text(evals.front().step)
                 : "at step " + count_text(evals.back().step));
  }
  if (!steps.empty()) {
    tile("Training loss", number_text(steps.back().loss, 4),
         "from " + number_text(steps.front().loss, 4) + " at step " +
             count_text(steps.front().step));
  }
  const RunTotals& totals = report.totals;
  tile("Steps", count_text(totals.useful_steps), count_text(totals.useful_tokens) + " tokens");
  for (const PlannedFigure& measured : planned_and_measured(report)) {
    if (measured.key != "tokens_per_second" || !measured.measured) continue;
    tile("Tokens per second", figure_text(measured.measured, measured.key),
         measured.planned ? "planned " + figure_text(measured.planned, measured.key) : "");
  }
  tile(hours_heading(report) == "GPU-hours" ? "GPU-hours" : "Device-hours",
       number_text(totals.gpu_hours(), 4), seconds_text(ran_seconds(report)) + " held");
  std::string more;
  if (totals.usd_micros && totals.useful_tokens > 0) {
    more = usd_text(usd_micros_per_million(totals)) + " per million tokens";
  }
  tile("Cost", usd_or_unknown(totals.usd_micros), more);
  return "<dl class=\"tiles\">\n" + out + "</dl>\n";
}

std::string costs(const RunReport& report) {
  const RunTotals& totals = report.totals;
  const int hour_decimals = decimals_for(totals.gpu_hours()) + 1;
  const int usd_decimals = decimals_for(totals.usd().value_or(0));
  std::string rows;
  const auto add = [&](const std::string& label, const PhaseTotals& part, const std::string& note,
                       bool sum) {
    rows += row(
        "<td><span class=\"t\">" + label + "</span>" +
            (note.empty() ? "" : element("div", escape_html(note), "quiet narrow-only")) + "</td>" +
            number_cell(fixed_text(static_cast<double>(part.device_ms) / 3.6e6, hour_decimals)) +
            number_cell(part.usd_micros.has_value()
                            ? fixed_text(static_cast<double>(*part.usd_micros) / 1e6, usd_decimals)
                            : "unknown") +
            number_cell(percent_text(part.device_ms, totals.device_ms)) +
            element("td", escape_html(note), "wide-only"),
        sum ? "sum" : "");
  };
  for (const Phase phase : kPhases) {
    if (totals.of(phase).device_ms == 0) continue;
    add("<i class=\"box\" style=\"background:" + phase_colour(phase) + "\"></i>" +
            escape_html(phase_words(phase)),
        totals.of(phase), phase_note(report, phase), false);
  }
  add("total", {totals.device_ms, totals.usd_micros}, total_note(report), true);
  std::string out = phase_bar(totals, "bar");
  out += html_table({"", ">" + hours_heading(report), ">USD", ">share", "|"}, rows);
  for (std::string line : closing_words(report)) {
    if (line.front() >= 'a' && line.front() <= 'z') line.front() -= 'a' - 'A';
    out += paragraph(line + ".");
  }
  return out + cost_chart(report);
}

std::string plan(const RunReport& report) {
  if (!report.plan.is_object()) return {};
  std::string rows;
  for (const PlannedFigure& figure : planned_and_measured(report)) {
    if (!figure.planned.has_value()) continue;
    const bool both = figure.measured.has_value() && *figure.planned > 0;
    const double ratio = both ? *figure.measured / *figure.planned : 0;
    const std::string bar = both ? "<div class=\"ratio\"><i style=\"width:" +
                                       fixed_text(50 * std::clamp(ratio, 0.0, 2.0), 1) +
                                       "%\"></i><b></b></div>"
                                 : "";
    rows += row(cell(figure.label) + number_cell(figure_text(figure.planned, figure.key)) +
                number_cell(figure_text(figure.measured, figure.key)) +
                number_cell(both ? fixed_text(ratio, 2) : "-") + element("td", bar, "wide-only"));
  }
  if (rows.empty()) return {};
  return html_table({"", ">planned", ">measured", ">ratio", "|measured beside planned"}, rows) +
         paragraph("The upright line is the plan; a bar twice as long fills its field.",
                   "quiet wide-only");
}

std::string memory_and_energy(const RunReport& report) {
  std::string rows;
  for (const auto& [label, value] : memory_and_energy_words(report)) {
    rows += element("dt", escape_html(label)) + element("dd", escape_html(value)) + "\n";
  }
  return "<dl class=\"facts\">\n" + rows + "</dl>\n";
}

std::string attempts(const RunReport& report) {
  const auto& all = report.record.attempts;
  // On what is said above for all, and here where they differ.
  const bool alike = std::all_of(all.begin(), all.end(), [&](const AttemptRecord& attempt) {
    return device_words(attempt.facts) == device_words(all.front().facts);
  });
  std::string rows;
  for (const AttemptRecord& attempt : report.record.attempts) {
    const RunTotals totals = total(report.record, attempt.attempt);
    std::string how = status_words(attempt.status);
    if (attempt.estimated && attempt.reason.empty()) how += " (end estimated)";
    if (!attempt.reason.empty()) how += ": " + attempt.reason;
    rows += row(number_cell(std::to_string(attempt.attempt)) +
                element("td", minute_text(attempt.began_unix_ms), "t") +
                number_cell(count_text(attempt.facts.resumed_from_step)) +
                number_cell(count_text(totals.steps)) +
                number_cell(number_text(totals.gpu_hours(), 4)) +
                number_cell(usd_or_unknown(totals.usd_micros)) +
                element("td", phase_bar(totals, "bar small")) + cell(how) +
                (alike ? "" : cell(device_words(attempt.facts))));
  }
  std::vector<std::string> headings = {
      ">no.",  "began (UTC)",   ">from step",  ">steps", ">" + hours_heading(report),
      ">cost", "where it went", "how it ended"};
  if (!alike) headings.emplace_back("hardware");
  return html_table(headings, rows);
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
  return html_table({"kind", "path", ">step", ">size", "SHA-256 begins"}, rows);
}

/// Of many events the first and the last: a page is no log.
std::string events(const RunReport& report) {
  const std::vector<EventRecord>& all = report.record.events;
  constexpr std::size_t kEnd = 50;
  std::string rows;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (all.size() > 2 * kEnd && i == kEnd) {
      rows += row(cell("...") + number_cell("") + cell("") +
                  cell(count_text(static_cast<std::int64_t>(all.size() - 2 * kEnd)) +
                       " more, which `tailor runs show` lists"));
      i = all.size() - kEnd;
    }
    const EventRecord& event = all[i];
    rows += row(element("td", minute_text(event.unix_ms), "t") +
                number_cell(event.step.has_value() ? count_text(*event.step) : "") +
                cell(event.kind) + cell(event.text));
  }
  if (rows.empty()) return {};
  return html_table({"when (UTC)", ">step", "kind", "what"}, rows);
}

}  // namespace

std::string html_table(const std::vector<std::string>& headings, const std::string& rows) {
  std::string head;
  for (const std::string& heading : headings) {
    const bool number = heading.starts_with('>'), wide = heading.starts_with('|');
    head += element("th", escape_html(number || wide ? heading.substr(1) : heading),
                    number ? "n"
                    : wide ? "wide-only"
                           : "");
  }
  return "<div class=\"scroll\"><table>\n<thead><tr>" + head + "</tr></thead>\n<tbody>\n" + rows +
         "</tbody></table></div>\n";
}

std::string phase_colour(Phase phase) { return "var(--" + std::string(phase_name(phase)) + ")"; }

std::string phase_bar(const RunTotals& totals, const std::string& kind) {
  if (totals.device_ms <= 0) return {};
  std::string out = "<div class=\"" + kind + "\">";
  for (const Phase phase : kPhases) {
    const double share =
        static_cast<double>(totals.of(phase).device_ms) / static_cast<double>(totals.device_ms);
    if (share <= 0) continue;
    out += "<i style=\"width:" + fixed_text(100 * share, 2) +
           "%;background:" + phase_colour(phase) + "\" title=\"" + escape_html(phase_words(phase)) +
           "\"></i>";
  }
  return out + "</div>\n";
}

std::string report_html(const RunReport& report) {
  const RunFacts& facts = report.record.facts;
  const std::string title = facts.name.empty() ? report.record.run() : facts.name;
  std::string out =
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
      "<title>" +
      escape_html(title) + " - Tailor run</title>\n<style>" + kReportStyle +
      "</style>\n</head>\n<body>\n";
  out += header(report) + tiles(report);
  std::string charts = step_charts(report);
  if (charts.empty()) charts = paragraph("No steps are recorded.");
  out += section("How it learned", charts);
  out += section("Where the " + hours_heading(report) + " went", costs(report));
  out += section("Planned and measured", plan(report));
  out += section("Memory and energy", memory_and_energy(report));
  out += expert_section(report);
  out += section("Attempts", attempts(report));
  out += section("Files", files(report)) + section("Events", events(report));
  if (!facts.recipe_text.empty()) {
    out += section("Recipe", "<pre>" + escape_html(facts.recipe_text) + "</pre>\n");
  }
  return out +
         element("footer", "Made by Tailor " + escape_html(facts.code_version) +
                               " from its ledger and the run&#39;s folder. One file: it loads "
                               "nothing and runs nothing.") +
         "\n</body>\n</html>\n";
}

}  // namespace tailor
