#include "recipes/expert_report.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"
#include "base/text.h"
#include "data/runs/chart.h"
#include "data/runs/table.h"

namespace tailor {
namespace {

/// Fields are coloured by their share over an even one, 1 / experts: from each of these bounds on
/// the next colour. Doublings, so that quiet experts differ from silent ones and from each other.
constexpr std::array<double, 8> kBounds = {0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8};
constexpr const char* kLegend[] = {"none", "below 1/16", "1/16", "1/8", "1/4",
                                   "1/2",  "1",          "2",    "4",   "8 and more"};
constexpr std::size_t kColours = kBounds.size() + 2;  ///< none, below the first, then one a bound

// One letter a class and no closing tags: a page of 58 x 256 fields stays below 1 MB.
constexpr const char* kStyle = R"css(
:root { color-scheme: light dark; --ink: #1a1a1a; --quiet: #555; --paper: #fff; --line: #d5d5d5;
  --mark: #b8420b; --a: #f3f3f3; --b: #e6eef7; --c: #d3e2f2; --d: #b7d0ea; --e: #93b8dd; --f: #6b9bcd;
  --g: #457db8; --h: #265f9e; --i: #12437b; --j: #062650; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --quiet: #a8a8a8; --paper: #161616;
  --line: #3a3a3a; --mark: #ff9a5c; --a: #202020; --b: #14263a; --c: #17324f; --d: #1b4168; --e: #225585;
  --f: #2f6da6; --g: #4889c4; --h: #70a8dc; --i: #a3caee; --j: #dcecfb; } }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 90rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .35rem 0; }
.quiet { color: var(--quiet); }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.heat { border-collapse: separate; border-spacing: 1px; table-layout: fixed; }
.heat th { width: 56px; padding: 0 6px 0 0; font-weight: 400; font-size: .75rem; text-align: right;
  color: var(--quiet); }
.heat .x { width: auto; padding: 0; text-align: left; }
.heat td { padding: 0; height: .9rem; }
td.a, b.a { background: var(--a) } td.b, b.b { background: var(--b) } td.c, b.c { background: var(--c) }
td.d, b.d { background: var(--d) } td.e, b.e { background: var(--e) } td.f, b.f { background: var(--f) }
td.g, b.g { background: var(--g) } td.h, b.h { background: var(--h) } td.i, b.i { background: var(--i) }
td.j, b.j { background: var(--j) }
td.s, b.s { outline: 1.5px solid var(--mark); outline-offset: -1.5px }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: 0; margin: .5rem 0; list-style: none;
  font-size: .85rem; }
.key b { display: inline-block; width: 1.4rem; height: .8rem; margin-right: .35rem; vertical-align: -1px; }
.list { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.list th, .list td { text-align: right; padding: .35rem 0 .35rem 1rem; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
.list td:last-child, .list th:last-child { text-align: left; white-space: normal; }
.list th { font-weight: 600; }
)css";

std::size_t colour_of(double share, std::int64_t tokens, std::size_t experts) {
  if (tokens == 0) return 0;
  const double times = share * static_cast<double>(experts);
  return 1 + static_cast<std::size_t>(std::upper_bound(kBounds.begin(), kBounds.end(), times) -
                                      kBounds.begin());
}

std::string letter(std::size_t colour) {
  return {static_cast<char>('a' + static_cast<int>(colour))};
}

std::string percent(double share, int decimals = 1) {
  return fixed_text(100 * share, decimals) + " %";
}

std::string heat_map(const ExpertLoad& load, const ExpertSelection& selection, ExpertScore by) {
  const std::size_t experts = load.layers.front().tokens.size();
  // As wide as fits a page where experts are few, never so narrow that a field cannot be pointed
  // at.
  const auto width = std::clamp<std::size_t>(1200 / experts, 4, 28);
  std::string out = "<div class=\"wide\"><table class=\"heat\" style=\"width:" +
                    std::to_string(66 + experts * (width + 1)) + "px\">\n";
  for (std::size_t l = 0; l < load.layers.size(); ++l) {
    const LayerLoad& layer = load.layers[l];
    const std::vector<double> shares = expert_shares(layer, by);
    const std::vector<double> gates = expert_shares(layer, ExpertScore::gate);
    const std::vector<std::int32_t>& chosen = selection.layers[l].experts;
    out += "<tr><th>layer " + std::to_string(layer.layer);
    for (std::size_t e = 0; e < experts; ++e) {
      const bool is_chosen =
          std::binary_search(chosen.begin(), chosen.end(), static_cast<std::int32_t>(e));
      const std::string colour = letter(colour_of(shares[e], layer.tokens[e], experts));
      out += is_chosen ? "<td class=\"" + colour + " s\"" : "<td class=" + colour;
      out += " title=\"" + std::to_string(e) + ": " + std::to_string(layer.tokens[e]);
      if (layer.tokens[e] > 0) out += ", gate " + percent(gates[e], 2);
      out += "\">";
    }
    out += "\n";
  }
  out += "<tr><th>expert";
  const std::size_t step = experts <= 32 ? 1 : 16;
  for (std::size_t e = 0; e < experts; e += step) {
    out += "<th class=x colspan=" + std::to_string(std::min(step, experts - e)) + ">" +
           std::to_string(e);
  }
  return out + "</table></div>\n";
}

std::string legend() {
  std::string out = "<ul class=\"key\">\n";
  for (std::size_t c = 0; c < kColours; ++c) {
    out += "<li><b class=\"" + letter(c) + "\"></b>" + kLegend[c] + "</li>\n";
  }
  return out + "<li><b class=\"a s\"></b>chosen</li>\n</ul>\n";
}

std::string layer_table(const ExpertLoad& load, const ExpertSelection& selection) {
  std::string out =
      "<div class=\"wide\"><table class=\"list\">\n<tr><th>layer</th><th>top expert</th><th>its "
      "share</th><th>effective experts</th><th>chosen</th><th>choices covered</th><th>gate weight "
      "covered</th><th>factors</th><th>experts</th></tr>\n";
  const std::vector<LayerSummary> rows = summarise(load, selection);
  for (std::size_t l = 0; l < rows.size(); ++l) {
    const LayerSummary& row = rows[l];
    out += "<tr><td>" + std::to_string(row.layer) + "</td><td>" +
           (row.top_expert < 0 ? "-" : std::to_string(row.top_expert)) + "</td><td>" +
           percent(row.top_share) + "</td><td>" + number_text(row.effective_experts, 3) +
           "</td><td>" + std::to_string(row.chosen) + "</td><td>" + percent(row.tokens_covered) +
           "</td><td>" + percent(row.gate_covered) + "</td><td>" + bytes_text(row.bytes) +
           "</td><td>" + runs_text(selection.layers[l].experts) + "</td></tr>\n";
  }
  return out + "</table></div>\n";
}

}  // namespace

std::vector<LayerSummary> summarise(const ExpertLoad& load, const ExpertSelection& selection) {
  TAILOR_CHECK(load.layers.size() == selection.layers.size());
  const ExpertScore by = selection.by == "gate" ? ExpertScore::gate : ExpertScore::token;
  const std::int64_t each = selection.bytes / std::max<std::int64_t>(1, selection.expert_count());
  std::vector<LayerSummary> out;
  for (std::size_t l = 0; l < load.layers.size(); ++l) {
    const std::vector<double> shares = expert_shares(load.layers[l], by);
    const auto top = std::max_element(shares.begin(), shares.end());
    LayerSummary row;
    row.layer = load.layers[l].layer;
    if (top != shares.end() && *top > 0) {
      row.top_expert = static_cast<std::int32_t>(top - shares.begin());
      row.top_share = *top;
    }
    row.effective_experts = effective_experts(shares);
    row.chosen = static_cast<std::int64_t>(selection.layers[l].experts.size());
    row.tokens_covered = selection.layers[l].tokens_covered;
    row.gate_covered = selection.layers[l].gate_covered;
    row.bytes = row.chosen * each;
    out.push_back(row);
  }
  return out;
}

std::string expert_report_html(const ExpertLoad& load, const ExpertSelection& selection) {
  TAILOR_CHECK(!load.layers.empty());
  const ExpertScore by = selection.by == "gate" ? ExpertScore::gate : ExpertScore::token;
  const std::string what = by == ExpertScore::gate ? "gate weight" : "choices";
  std::string out =
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>" +
      escape_html(selection.model_name) + " - experts</title>\n<style>" + kStyle +
      "</style>\n</head>\n<body>\n<h1>Where tokens go in " + escape_html(selection.model_name) +
      "</h1>\n<p>" + count_text(load.tokens) +
      (selection.counted == "trained" ? " tokens that carry loss" : " tokens") + ", " +
      counted(selection.model.experts_per_token, "choice") + " each, over " +
      std::to_string(selection.model.experts) + " experts in " +
      counted(static_cast<std::int64_t>(load.layers.size()), "layer") + ".</p>\n";
  std::vector<std::string> data;
  for (const std::string& path : selection.data) {
    data.push_back("<code>" + escape_html(path) + "</code>");
  }
  out += "<p class=\"quiet\">Data: " + join(data, ", ") + "</p>\n<p class=\"quiet\">" +
         count_text(selection.expert_count()) + " experts chosen by " +
         (by == ExpertScore::gate ? "gate weight" : "share of choices") + " (" +
         escape_html(selection.rule) + " " + exact_text(selection.value) +
         "): " + percent(selection.tokens_covered()) + " of all choices, " +
         bytes_text(selection.bytes) + " of factors at rank " +
         std::to_string(selection.expert_rank) + ".</p>\n";
  out += "<h2>Share of a layer's " + what +
         "</h2>\n<p class=\"quiet\">A field is an expert. Its "
         "colour says how many times an even share, 1/" +
         std::to_string(selection.model.experts) +
         ", it has: from the number given up to the next. Pointing at it shows its number, the "
         "choices counted, and its share of gate weight.</p>\n" +
         legend() + heat_map(load, selection, by);
  return out + "<h2>By layer</h2>\n" + layer_table(load, selection) + "</body>\n</html>\n";
}

}  // namespace tailor
