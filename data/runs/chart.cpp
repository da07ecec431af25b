#include "data/runs/chart.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/text.h"
#include "data/runs/table.h"

namespace tailor {
namespace {

constexpr double kWidth = 860, kHeight = 300;
constexpr double kLeft = 78, kRight = 18, kTop = 40, kBottom = 52;
constexpr double kPlotWidth = kWidth - kLeft - kRight, kPlotHeight = kHeight - kTop - kBottom;

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  void take(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
};

/// Round values 1, 2 or 5 times a power of ten apart that cover the range, about `count` of them.
struct Ticks {
  double step = 1;
  std::vector<double> values;
};

Ticks ticks_for(const Range& range, int count) {
  const double raw = (range.high - range.low) / count;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  const double lead = raw / power;
  Ticks ticks;
  ticks.step = power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
  const double first = std::ceil(range.low / ticks.step - 1e-9);
  for (double i = first; i * ticks.step <= range.high + ticks.step * 1e-9; ++i) {
    ticks.values.push_back(i * ticks.step);
  }
  return ticks;
}

std::string tick_text(double value, double step) {
  if (std::abs(value) < step * 1e-9) return "0";
  if (step >= 1) {
    return std::abs(value) < 1e9 ? count_text(std::llround(value)) : number_text(value, 3);
  }
  const int decimals = static_cast<int>(std::ceil(-std::log10(step) - 1e-9));
  return decimals <= 7 ? fixed_text(value, decimals) : number_text(value, 3);
}

std::string px(double value) { return fixed_text(value, 1); }

bool finite(const std::pair<double, double>& point) {
  return std::isfinite(point.first) && std::isfinite(point.second);
}

/// Where more points than pixels come, each pixel keeps its lowest and highest.
std::vector<std::pair<double, double>> thinned(const std::vector<std::pair<double, double>>& all) {
  std::vector<std::pair<double, double>> points;
  std::copy_if(all.begin(), all.end(), std::back_inserter(points), finite);
  constexpr std::size_t kBuckets = 700;
  if (points.size() <= 2 * kBuckets) return points;
  std::vector<std::pair<double, double>> out;
  for (std::size_t b = 0; b < kBuckets; ++b) {
    const auto begin = points.begin() + static_cast<std::ptrdiff_t>(b * points.size() / kBuckets);
    const auto end =
        points.begin() + static_cast<std::ptrdiff_t>((b + 1) * points.size() / kBuckets);
    auto [low, high] = std::minmax_element(
        begin, end, [](const auto& p, const auto& q) { return p.second < q.second; });
    if (low > high) std::swap(low, high);
    out.push_back(*low);
    if (low != high) out.push_back(*high);
  }
  return out;
}

std::string text_at(double x, double y, const std::string& anchor, const std::string& text,
                    const std::string& more = "") {
  return "<text x=\"" + px(x) + "\" y=\"" + px(y) + "\" text-anchor=\"" + anchor + "\"" + more +
         ">" + escape_html(text) + "</text>\n";
}

std::string line_at(double x1, double y1, double x2, double y2, const std::string& colour) {
  return "<line x1=\"" + px(x1) + "\" y1=\"" + px(y1) + "\" x2=\"" + px(x2) + "\" y2=\"" + px(y2) +
         "\" stroke=\"" + colour + "\"/>\n";
}

}  // namespace

std::string escape_html(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::vector<std::pair<double, double>> moving_mean(
    const std::vector<std::pair<double, double>>& points, std::size_t width) {
  std::vector<std::pair<double, double>> finite_points;
  std::copy_if(points.begin(), points.end(), std::back_inserter(finite_points), finite);
  std::vector<double> sums = {0};
  for (const auto& point : finite_points) sums.push_back(sums.back() + point.second);
  std::vector<std::pair<double, double>> out;
  const std::size_t half = width / 2;
  for (std::size_t i = 0; i < finite_points.size(); ++i) {
    // Narrower towards both ends, so that the window stays centred.
    const std::size_t reach = std::min({half, i, finite_points.size() - 1 - i});
    const double sum = sums[i + reach + 1] - sums[i - reach];
    out.emplace_back(finite_points[i].first, sum / static_cast<double>(2 * reach + 1));
  }
  return out;
}

std::string to_svg(const Chart& chart) {
  Range x;
  Range y;
  for (const Series& series : chart.series) {
    for (const auto& point : series.points) {
      if (!finite(point)) continue;
      x.take(point.first);
      y.take(point.second);
    }
  }
  if (x.low > x.high) return {};
  if (chart.from_zero) y.take(0);
  if (x.low == x.high) x = {x.low - 0.5, x.high + 0.5};
  if (y.low == y.high) {
    const double pad = y.low == 0 ? 1 : std::abs(y.low) * 0.1;
    y = {y.low == 0 ? 0 : y.low - pad, y.high + pad};
  }
  const Ticks y_ticks = ticks_for(y, 5);
  y.low = std::floor(y.low / y_ticks.step + 1e-9) * y_ticks.step;
  y.high = std::ceil(y.high / y_ticks.step - 1e-9) * y_ticks.step;
  Ticks x_ticks = ticks_for(x, 8);
  if (x_ticks.step < 1) x_ticks = {1, {}};  // steps are whole
  if (x_ticks.values.empty()) {
    for (double v = std::ceil(x.low); v <= x.high; ++v) x_ticks.values.push_back(v);
  }

  const auto to_x = [&](double v) { return kLeft + (v - x.low) / (x.high - x.low) * kPlotWidth; };
  const auto to_y = [&](double v) { return kTop + (y.high - v) / (y.high - y.low) * kPlotHeight; };

  std::string out = "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + px(kWidth) + " " +
                    px(kHeight) + "\" role=\"img\" aria-label=\"" + escape_html(chart.title) +
                    "\" font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\" "
                    "font-size=\"12\" fill=\"#1a1a1a\">\n";
  out += text_at(kLeft, 20, "start", chart.title, " font-size=\"15\" font-weight=\"600\"");
  for (const double tick : ticks_for(y, 5).values) {
    out += line_at(kLeft, to_y(tick), kLeft + kPlotWidth, to_y(tick), "#e6e6e6");
    out += text_at(kLeft - 8, to_y(tick) + 4, "end", tick_text(tick, y_ticks.step));
  }
  for (const double tick : x_ticks.values) {
    out += line_at(to_x(tick), kTop + kPlotHeight, to_x(tick), kTop + kPlotHeight + 5, "#767676");
    out += text_at(to_x(tick), kTop + kPlotHeight + 19, "middle", tick_text(tick, x_ticks.step));
  }
  out += line_at(kLeft, kTop + kPlotHeight, kLeft + kPlotWidth, kTop + kPlotHeight, "#767676");
  out += text_at(kLeft + kPlotWidth / 2, kHeight - 12, "middle", chart.x_label);
  out += text_at(0, 0, "middle", chart.y_label,
                 " transform=\"translate(16 " + px(kTop + kPlotHeight / 2) + ") rotate(-90)\"");

  for (const Series& series : chart.series) {
    const auto points = thinned(series.points);
    if (points.empty()) continue;
    std::string path;
    for (const auto& [px_x, px_y] : points) {
      path += (path.empty() ? "M" : " L") + px(to_x(px_x)) + " " + px(to_y(px_y));
    }
    out += "<path d=\"" + path + "\" fill=\"none\" stroke=\"" + series.colour +
           "\" stroke-linejoin=\"round\" stroke-width=\"" +
           (series.faint ? "1\" stroke-opacity=\"0.35" : "2") + "\"/>\n";
    if (!series.dots && points.size() > 1) continue;
    for (const auto& [dot_x, dot_y] : points) {
      out += "<circle cx=\"" + px(to_x(dot_x)) + "\" cy=\"" + px(to_y(dot_y)) +
             "\" r=\"3.5\" fill=\"" + series.colour + "\"/>\n";
    }
  }

  double legend_x = kLeft + kPlotWidth;
  const bool several = std::count_if(chart.series.begin(), chart.series.end(),
                                     [](const Series& s) { return !s.points.empty(); }) > 1;
  for (auto series = chart.series.rbegin(); several && series != chart.series.rend(); ++series) {
    if (series->points.empty()) continue;
    out += text_at(legend_x, 20, "end", series->label);
    legend_x -= 7.0 * static_cast<double>(series->label.size()) + 6;
    out += "<line x1=\"" + px(legend_x - 18) + "\" y1=\"16\" x2=\"" + px(legend_x) +
           "\" y2=\"16\" stroke=\"" + series->colour + "\" stroke-width=\"" +
           (series->faint ? "1.5\" stroke-opacity=\"0.5" : "3") + "\"/>\n";
    legend_x -= 34;
  }
  return out + "</svg>\n";
}

}  // namespace tailor
