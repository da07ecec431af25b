#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/text.h"
#include "data/runs/report_page.h"
#include "data/runs/report_words.h"
#include "data/runs/table.h"

namespace tailor {
namespace {

/// Rows of all samples, by layer.
using Load = std::map<int, std::vector<std::int64_t>>;

/// Fields are coloured by their share over an even one, 1 / experts; doublings, so that quiet
/// experts differ from silent ones and from each other. The same steps as those of `experts scan`.
constexpr std::array<double, 8> kBounds = {0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8};
constexpr std::array kLegend = {"no rows",    "below 1/16", "1/16 and up", "1/8 and up",
                                "1/4 and up", "1/2 and up", "1 and up",    "2 and up",
                                "4 and up",   "8 and up"};

std::size_t colour_of(std::int64_t rows, std::int64_t layer_rows, std::size_t experts) {
  if (rows == 0) return 0;
  const double times =
      static_cast<double>(rows) * static_cast<double>(experts) / static_cast<double>(layer_rows);
  return 1 + static_cast<std::size_t>(std::upper_bound(kBounds.begin(), kBounds.end(), times) -
                                      kBounds.begin());
}

std::int64_t sum(const std::vector<std::int64_t>& rows) {
  std::int64_t out = 0;
  for (const std::int64_t count : rows) out += count;
  return out;
}

Load load_of(const std::vector<ExpertMetrics>& samples) {
  Load out;
  for (const ExpertMetrics& sample : samples) {
    for (const ExpertMetrics::Layer& layer : sample.layers) {
      std::vector<std::int64_t>& rows = out[layer.layer];
      if (rows.size() < layer.rows.size()) rows.resize(layer.rows.size());
      for (std::size_t e = 0; e < layer.rows.size(); ++e) rows[e] += layer.rows[e];
    }
  }
  return out;
}

/// Most experts of a layer, and rows of all layers.
std::pair<std::size_t, std::int64_t> extent(const Load& load) {
  std::pair<std::size_t, std::int64_t> out{0, 0};
  for (const auto& [layer, counts] : load) {
    out.first = std::max(out.first, counts.size());
    out.second += sum(counts);
  }
  return out;
}

std::string text_at(double x, double y, const char* anchor, const std::string& text) {
  return "<text class=\"q\" x=\"" + fixed_text(x, 1) + "\" y=\"" + fixed_text(y, 1) +
         "\" text-anchor=\"" + anchor + "\">" + text + "</text>\n";
}

/// One path a colour, in fields of 1 x 1, scaled to their place: 58 layers of 256 experts are some
/// hundred kilobytes.
std::string map_svg(const Load& load, std::size_t experts, double width, const char* kind) {
  const double left = 34, top = 4;
  const double field = (width - left) / static_cast<double>(experts);
  const double row = std::clamp(420.0 / static_cast<double>(load.size()), 9.0, 18.0);
  const bool dense = field < 8;
  std::vector<std::string> paths(kLegend.size());
  int y = 0;
  std::string labels;
  const std::size_t every = row < 12 ? 2 : 1;
  for (const auto& [layer, rows] : load) {
    const std::int64_t all = sum(rows);
    for (std::size_t e = 0; e < rows.size();) {
      const std::size_t colour = colour_of(rows[e], all, experts);
      std::size_t end = e + 1;
      while (dense && end < rows.size() && colour_of(rows[end], all, experts) == colour) ++end;
      const std::string w = std::to_string(end - e);
      paths[colour] +=
          "M" + std::to_string(e) + " " + std::to_string(y) + "h" + w + "v1h-" + w + "z";
      e = end;
    }
    if (static_cast<std::size_t>(y) % every == 0) {
      labels += text_at(left - 6, top + (y + 0.5) * row + 4, "end", std::to_string(layer));
    }
    ++y;
  }
  const double bottom = top + static_cast<double>(load.size()) * row;
  std::string out = "<svg class=\"" + std::string(kind) + " heat" + (dense ? " dense" : "") +
                    "\" viewBox=\"0 0 " + fixed_text(width, 0) + " " + fixed_text(bottom + 36, 0) +
                    "\" role=\"img\" aria-label=\"Rows by layer and expert\">\n" + labels +
                    "<g transform=\"translate(" + fixed_text(left, 1) + " " + fixed_text(top, 1) +
                    ") scale(" + fixed_text(field, 4) + " " + fixed_text(row, 4) + ")\">\n";
  for (std::size_t c = 0; c < paths.size(); ++c) {
    if (paths[c].empty()) continue;
    out += "<path style=\"fill:var(--h" + std::to_string(c) + ")\" d=\"" + paths[c] + "\"/>\n";
  }
  out += "</g>\n";
  std::size_t step = 1;
  for (const std::size_t next : {2U, 4U, 8U, 16U, 32U, 64U}) {
    if (static_cast<double>(step) * field < 30) step = next;
  }
  for (std::size_t e = 0; e < experts; e += step) {
    out += text_at(left + (static_cast<double>(e) + 0.5) * field, bottom + 15, "middle",
                   std::to_string(e));
  }
  return out + text_at(left + (width - left) / 2, bottom + 32, "middle", "expert (rows: layers)") +
         "</svg>\n";
}

std::string words(const Load& load, std::size_t experts, std::size_t samples) {
  std::int64_t total = 0, silent = 0, fields = 0;
  double effective = 0, most = 0;
  std::pair<int, std::size_t> busiest{0, 0};
  for (const auto& [layer, rows] : load) {
    const std::int64_t all = sum(rows);
    total += all;
    double entropy = 0;
    for (std::size_t e = 0; e < rows.size(); ++e) {
      ++fields;
      if (rows[e] == 0) {
        ++silent;
        continue;
      }
      const double share = static_cast<double>(rows[e]) / static_cast<double>(all);
      entropy -= share * std::log(share);
      if (share > most) {
        most = share;
        busiest = {layer, e};
      }
    }
    effective += std::exp(entropy);
  }
  std::string out = count_text(total) + " rows of " +
                    counted(static_cast<std::int64_t>(samples), "sampled step") +
                    ". The busiest is expert " + std::to_string(busiest.second) + " of layer " +
                    std::to_string(busiest.first) + ", with " +
                    number_text(most * static_cast<double>(experts), 3) + " times an even share; ";
  out += silent == 0 ? "none got no rows. "
                     : count_text(silent) + " of " + count_text(fields) + " got no rows. ";
  return out + "The load of a layer is spread as evenly as over " +
         number_text(effective / static_cast<double>(load.size()), 3) + " of its " +
         std::to_string(experts) + " experts (mean of the layers).";
}

}  // namespace

std::string expert_words(const RunReport& report) {
  const Load load = load_of(report.metrics.experts);
  const auto [experts, rows] = extent(load);
  return rows == 0 ? "" : words(load, experts, report.metrics.experts.size());
}

std::string expert_section(const RunReport& report) {
  const Load load = load_of(report.metrics.experts);
  const auto [experts, rows] = extent(load);
  if (rows == 0) return {};
  std::string key = "<ul class=\"key\">\n";
  for (std::size_t c = 0; c < kLegend.size(); ++c) {
    key += "<li><i class=\"box\" style=\"background:var(--h" + std::to_string(c) + ")\"></i>" +
           kLegend[c] + "</li>\n";
  }
  key += "</ul>\n";
  // Few experts: fields no wider than a thumb.
  const double wide = std::min(760.0, 34 + 56.0 * static_cast<double>(experts));
  std::string svg = map_svg(load, experts, wide, "wide");
  if (wide < 760) {
    svg.replace(svg.find("<svg "), 5,
                "<svg style=\"width:" + fixed_text(100 * wide / 760, 1) + "%\" ");
  }
  return section("Where tokens went: load of the routed experts",
                 paragraph(words(load, experts, report.metrics.experts.size())) + "<figure>\n" +
                     svg + map_svg(load, experts, 380, "narrow") +
                     paragraph("Colour: an expert's rows as a multiple of an even share.") + key +
                     "</figure>\n");
}

}  // namespace tailor
