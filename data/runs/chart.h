#pragma once

#include <string>
#include <utility>
#include <vector>

namespace tailor {

/// A line of a chart.
struct Series {
  std::string label;
  std::string colour;                             ///< as in CSS
  std::vector<std::pair<double, double>> points;  ///< by x; not finite ones are left out
  bool faint = false;  ///< thin and pale, as a background to another line
  bool dots = false;   ///< a dot at each point
};

struct Chart {
  std::string title, x_label, y_label;
  std::vector<Series> series;
  bool from_zero = false;  ///< the y axis begins at zero
};

/// An <svg> element: axes with ticks and labels, a legend where there are several lines. Empty
/// when no line has a point.
std::string to_svg(const Chart& chart);

/// Text made safe inside HTML and SVG.
std::string escape_html(const std::string& text);

/// Mean of `points` over windows of `width` points, centred.
std::vector<std::pair<double, double>> moving_mean(
    const std::vector<std::pair<double, double>>& points, std::size_t width);

}  // namespace tailor
