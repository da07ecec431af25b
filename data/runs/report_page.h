#pragma once

#include <string>
#include <vector>

#include "data/runs/chart.h"
#include "data/runs/report.h"

namespace tailor {

// The parts report.html is put together from. All text is escaped on its way in; the page is
// well-formed XML too.

extern const char* const kReportStyle;

inline std::string element(const std::string& tag, const std::string& inner,
                           const std::string& kind = "") {
  return "<" + tag + (kind.empty() ? "" : " class=\"" + kind + "\"") + ">" + inner + "</" + tag +
         ">";
}
inline std::string cell(const std::string& text) { return element("td", escape_html(text)); }
inline std::string number_cell(const std::string& text) {
  return element("td", escape_html(text), "n");
}
inline std::string code(const std::string& text) { return element("code", escape_html(text)); }
inline std::string row(const std::string& cells, const std::string& kind = "") {
  return element("tr", cells, kind) + "\n";
}
inline std::string paragraph(const std::string& text, const std::string& kind = "quiet") {
  return element("p", escape_html(text), kind) + "\n";
}
inline std::string section(const std::string& title, const std::string& inner) {
  if (inner.empty()) return {};
  return "<section>\n" + element("h2", escape_html(title)) + "\n" + inner + "</section>\n";
}
/// Headings beginning with '>' stand over numbers, with '|' over what narrow windows leave out.
std::string html_table(const std::vector<std::string>& headings, const std::string& rows);

/// The custom property of a phase's colour.
std::string phase_colour(Phase phase);
/// A bar of the phases' shares of the device time; `kind` is its class.
std::string phase_bar(const RunTotals& totals, const std::string& kind);

/// The drawings over steps: loss, speed, waiting. Empty where no step is recorded.
std::string step_charts(const RunReport& report);
/// What the run had cost by when, over all attempts; of device time where no price is known.
std::string cost_chart(const RunReport& report);
/// How the sampled steps' rows fell on the routed experts; empty where nothing was sampled.
std::string expert_section(const RunReport& report);

}  // namespace tailor
