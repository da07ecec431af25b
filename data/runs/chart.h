#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tailor {

using Points = std::vector<std::pair<double, double>>;

/// A line of a chart.
struct Series {
  std::string label{};
  std::string colour{};  ///< as in CSS
  Points points{};       ///< by x; not finite ones are left out
  bool faint = false;    ///< thin and pale, as a background to another line
  bool dots = false;     ///< a dot at each point
  bool area = false;     ///< filled down to the axis
  bool dashed = false;
};

struct Chart {
  std::string title{}, x_label{}, y_label{};
  std::vector<Series> series{};
  bool from_zero = false;  ///< the y axis begins at zero
  bool whole_x = false;    ///< x counts something: ticks are whole
  /// Where single values lie far above all others the axis ends below them; they are marked at its
  /// end and named in the note.
  bool may_cut = false;
  std::vector<std::pair<double, std::string>> marks{};  ///< upright lines at x
  std::vector<std::pair<double, std::string>>
      levels{};        ///< level lines at y, if the axis comes near
  double height = 1;   ///< 1: as usual
  std::string note{};  ///< a sentence below
};

/// A <figure>: the title, a key where there are several lines, two <svg> of one content, for wide
/// and narrow windows (classes "wide" and "narrow"; the page's style shows one), the note. Colours
/// of axes and text are the page's custom properties --ink, --quiet, --line. Empty when no line
/// has a point. Long lines are thinned: each pixel column keeps its lowest and its highest point.
std::string to_figure(const Chart& chart);

/// Text made safe inside HTML and SVG: markup is escaped; control characters and what is not UTF-8
/// become U+FFFD.
std::string escape_html(const std::string& text);

/// Both numbers are.
bool is_finite(const std::pair<double, double>& point);

/// The finite points; where there are more than pixel columns, each column's lowest and highest.
Points thinned(const Points& all, std::size_t columns);

/// Medians of `points` over windows of `width` points, centred, at `count` places at most: unlike a
/// mean a median stays where the others are when single values lie far away.
Points moving_median(const Points& points, std::size_t width, std::size_t count);

}  // namespace tailor
