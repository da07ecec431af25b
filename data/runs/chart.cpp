#include "data/runs/chart.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "base/text.h"
#include "data/runs/table.h"

namespace tailor {
namespace {

/// Of one of the two drawings.
struct Canvas {
  const char* kind;
  double width, height, left, right;
  int x_ticks, y_ticks;
  static constexpr double kTop = 30, kBottom = 44;
  double plot_width() const { return width - left - right; }
  double plot_height() const { return height - kTop - kBottom; }
};
constexpr Canvas kWide{"wide", 760, 250, 58, 12, 8, 5};
constexpr Canvas kNarrow{"narrow", 380, 220, 50, 8, 4, 4};

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  void take(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  double size() const { return high - low; }
};

/// Round values 1, 2 or 5 times a power of ten apart that cover the range, about `count` of them.
struct Ticks {
  double step = 1;
  std::vector<double> values;
};

Ticks ticks_for(const Range& range, int count, bool whole = false) {
  const double raw = range.size() / count;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  const double lead = raw / power;
  Ticks ticks;
  ticks.step = power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
  if (whole) ticks.step = std::max(1.0, ticks.step);
  const double first = std::ceil(range.low / ticks.step - 1e-9);
  for (double i = first; i * ticks.step <= range.high + ticks.step * 1e-9; ++i) {
    ticks.values.push_back(i * ticks.step);
  }
  return ticks;
}

std::string tick_text(double value, double step) {
  if (std::abs(value) < step * 1e-9) return "0";
  if (step >= 1) {
    return std::abs(value) < 1e6 ? count_text(std::llround(value)) : number_text(value, 3);
  }
  const int decimals = static_cast<int>(std::ceil(-std::log10(step) - 1e-9));
  return decimals <= 7 ? fixed_text(value, decimals) : number_text(value, 3);
}

/// Tenths of a pixel, without what says nothing.
std::string px(double value) {
  std::string text = fixed_text(value, 1);
  if (text.ends_with(".0")) text.resize(text.size() - 2);
  return text == "-0" ? "0" : text;
}

/// Where the axis ends if single values lie far above all others: at twice the range of all but
/// one in a thousand of them. Nothing where no value lies beyond that.
std::optional<double> cut_above(const Chart& chart) {
  std::vector<double> values;
  for (const Series& series : chart.series) {
    for (const auto& point : series.points) {
      if (is_finite(point)) values.push_back(point.second);
    }
  }
  if (!chart.may_cut || values.size() < 20) return std::nullopt;
  std::sort(values.begin(), values.end());
  const std::size_t few = std::max<std::size_t>(1, values.size() / 1000);
  const double most = values[values.size() - 1 - few], low = values.front();
  const double end = low + 2 * (most - low);
  return most > low && values.back() > end ? std::optional(end) : std::nullopt;
}

std::string text_at(double x, double y, const char* anchor, const std::string& text,
                    const char* kind = "") {
  return "<text x=\"" + px(x) + "\" y=\"" + px(y) + "\" text-anchor=\"" + anchor + "\"" + kind +
         ">" + escape_html(text) + "</text>\n";
}

std::string line_at(double x1, double y1, double x2, double y2, const char* kind) {
  return "<path class=\"" + std::string(kind) + "\" d=\"M" + px(x1) + " " + px(y1) + "L" + px(x2) +
         " " + px(y2) + "\"/>\n";
}

/// One drawing: ranges first, then what lies behind the lines, then these.
class Drawing {
 public:
  Drawing(const Chart& chart, const Canvas& canvas, const Range& x, const Range& y, bool cut)
      : chart_(chart), canvas_(canvas), x_(x), y_(y), cut_(cut) {
    canvas_.height = Canvas::kTop + Canvas::kBottom + canvas.plot_height() * chart.height;
  }

  std::string text() {
    const int count = std::max(2, static_cast<int>(std::lround(canvas_.y_ticks * chart_.height)));
    const Ticks y_ticks = ticks_for(y_, count);
    y_.low = std::floor(y_.low / y_ticks.step + 1e-9) * y_ticks.step;
    if (!cut_) y_.high = std::ceil(y_.high / y_ticks.step - 1e-9) * y_ticks.step;
    axes(y_ticks.step, count);
    levels();
    marks();
    for (const Series& series : chart_.series) line(series);
    return "<svg class=\"" + std::string(canvas_.kind) + "\" viewBox=\"0 0 " + px(canvas_.width) +
           " " + px(canvas_.height) + "\" role=\"img\" aria-label=\"" + escape_html(chart_.title) +
           "\">\n" + out_ + "</svg>\n";
  }

 private:
  double to_x(double v) const {
    return canvas_.left + (v - x_.low) / x_.size() * canvas_.plot_width();
  }
  double to_y(double v) const {
    return Canvas::kTop + (y_.high - std::min(v, y_.high)) / y_.size() * canvas_.plot_height();
  }
  double bottom() const { return Canvas::kTop + canvas_.plot_height(); }
  double end() const { return canvas_.left + canvas_.plot_width(); }

  void axes(double y_step, int count) {
    out_ += text_at(0, 14, "start", chart_.y_label, " class=\"q\"");
    for (const double tick : ticks_for(y_, count).values) {
      out_ += line_at(canvas_.left, to_y(tick), end(), to_y(tick), "grid");
      out_ += text_at(canvas_.left - 8, to_y(tick) + 4, "end", tick_text(tick, y_step));
    }
    const Ticks x_ticks = ticks_for(x_, canvas_.x_ticks, chart_.whole_x);
    for (const double tick : x_ticks.values) {
      out_ += line_at(to_x(tick), bottom(), to_x(tick), bottom() + 5, "axis");
      // A label at the end would be cut off if it stood in the middle of its tick.
      const bool last = to_x(tick) > end() - 18;
      out_ += text_at(last ? end() : to_x(tick), bottom() + 19, last ? "end" : "middle",
                      tick_text(tick, x_ticks.step));
    }
    out_ += line_at(canvas_.left, bottom(), end(), bottom(), "axis");
    out_ += text_at(canvas_.left + canvas_.plot_width() / 2, canvas_.height - 6, "middle",
                    chart_.x_label, " class=\"q\"");
  }

  void levels() {
    std::vector<std::pair<bool, double>> labels;
    for (const auto& [y, label] : chart_.levels) {
      if (y < y_.low || y > y_.high) continue;
      out_ += line_at(canvas_.left, to_y(y), end(), to_y(y), "level");
      // At the end where the lines are farther away.
      const bool left = gap(y, true) > gap(y, false);
      double at = to_y(y) - 5;
      const auto lies_on = [&](const auto& other) {
        return other.first == left && std::abs(other.second - at) < 13;
      };
      if (std::any_of(labels.begin(), labels.end(), lies_on)) at = to_y(y) + 13;
      labels.emplace_back(left, at);
      out_ += text_at(left ? canvas_.left + 4 : end(), at, left ? "start" : "end", label,
                      " class=\"q\"");
    }
  }

  /// From `y` to what is drawn first, or last.
  double gap(double y, bool first) const {
    double out = y_.size();
    for (const Series& series : chart_.series) {
      const Points& points = series.points;
      if (points.empty()) continue;
      const auto& [at, value] = first ? points.front() : points.back();
      const bool there = first ? to_x(at) < canvas_.left + canvas_.plot_width() / 4
                               : to_x(at) > end() - canvas_.plot_width() / 4;
      if (there) out = std::min(out, std::abs(y - value));
    }
    return out;
  }

  void marks() {
    double free_from = canvas_.left;
    for (const auto& [x, label] : chart_.marks) {
      if (x < x_.low || x > x_.high) continue;
      out_ += line_at(to_x(x), Canvas::kTop, to_x(x), bottom(), "mark");
      const double width = 6.2 * static_cast<double>(label.size());
      const double begin = std::min(to_x(x) + 4, end() - width);
      if (begin < free_from) continue;  // a label that would lie on another one
      free_from = begin + width + 8;
      out_ += text_at(begin, Canvas::kTop - 4, "start", label, " class=\"q\"");
    }
  }

  void line(const Series& series) {
    const Points points = thinned(series.points, static_cast<std::size_t>(canvas_.plot_width()));
    if (points.empty()) return;
    std::string path;
    for (const auto& [x, y] : points) {
      path += (path.empty() ? "M" : "L") + px(to_x(x)) + " " + px(to_y(y));
    }
    const std::string colour = escape_html(series.colour);
    if (series.area) {
      out_ += "<path class=\"area\" style=\"fill:" + colour + "\" d=\"" + path + "L" +
              px(to_x(points.back().first)) + " " + px(bottom()) + "L" +
              px(to_x(points.front().first)) + " " + px(bottom()) + "z\"/>\n";
    }
    out_ += "<path class=\"line" + std::string(series.faint ? " faint" : "") +
            (series.dashed ? " dashed" : "") + "\" style=\"stroke:" + colour + "\" d=\"" + path +
            "\"/>\n";
    if (series.dots || points.size() == 1) dots(points, colour);
    if (!cut_) return;
    for (const auto& [x, y] : points) {
      if (y <= y_.high) continue;
      out_ += "<path style=\"fill:" + colour + "\" d=\"M" + px(to_x(x)) + " " +
              px(Canvas::kTop + 1) + "l4 6h-8z\"/>\n";
    }
  }

  void dots(const Points& points, const std::string& colour) {
    const bool many = static_cast<double>(points.size()) > canvas_.plot_width() / 14;
    const std::string radius = many ? "2" : "3.2";
    for (const auto& [x, y] : points) {
      out_ += "<circle cx=\"" + px(to_x(x)) + "\" cy=\"" + px(to_y(y)) + "\" r=\"" + radius +
              "\" style=\"fill:" + colour + "\"/>\n";
    }
  }

  const Chart& chart_;
  Canvas canvas_;
  Range x_, y_;
  bool cut_;
  std::string out_;
};

std::string key(const Chart& chart) {
  const auto shown = std::count_if(chart.series.begin(), chart.series.end(), [](const Series& s) {
    return !s.points.empty() && !s.label.empty();
  });
  if (shown < 2) return {};
  std::string out = "<ul class=\"key\">\n";
  for (const Series& series : chart.series) {
    if (series.points.empty() || series.label.empty()) continue;
    out += "<li><i class=\"" + std::string(series.faint ? "pale" : "full") +
           "\" style=\"background:" + escape_html(series.colour) + "\"></i>" +
           escape_html(series.label) + "</li>\n";
  }
  return out + "</ul>\n";
}

/// The values beyond the axis' end, in words.
std::string cut_words(const Chart& chart, double end) {
  std::size_t count = 0;
  std::pair<double, double> most{0, -std::numeric_limits<double>::infinity()};
  for (const Series& series : chart.series) {
    if (series.points.empty()) continue;
    for (const auto& point : series.points) {
      if (!is_finite(point) || point.second <= end) continue;
      ++count;
      if (point.second > most.second) most = point;
    }
  }
  return counted(static_cast<std::int64_t>(count), "value") + " above the axis, the highest " +
         number_text(most.second, 4) + " at " + chart.x_label + " " +
         count_text(std::llround(most.first)) + ".";
}

}  // namespace

std::string to_figure(const Chart& chart) {
  Range x;
  Range y;
  for (const Series& series : chart.series) {
    for (const auto& point : series.points) {
      if (!is_finite(point)) continue;
      x.take(point.first);
      y.take(point.second);
    }
  }
  if (x.low > x.high) return {};
  const std::optional<double> cut = cut_above(chart);
  if (cut) y.high = *cut;
  if (chart.from_zero) y.take(0);
  for (const auto& [level, label] : chart.levels) {
    // One that is far away would leave no room for the line.
    if (level > y.high && level <= 1.8 * y.high) y.high = level * 1.04;
  }
  if (x.low == x.high) x = {x.low - 0.5, x.high + 0.5};
  if (y.low == y.high) {
    const double pad = y.low == 0 ? 1 : std::abs(y.low) * 0.1;
    y = {y.low == 0 ? 0 : y.low - pad, y.high + pad};
  }
  std::string note = chart.note;
  if (cut) note += (note.empty() ? "" : " ") + cut_words(chart, *cut);
  return "<figure>\n<h3>" + escape_html(chart.title) + "</h3>\n" + key(chart) +
         Drawing(chart, kWide, x, y, cut.has_value()).text() +
         Drawing(chart, kNarrow, x, y, cut.has_value()).text() +
         (note.empty() ? "" : "<figcaption>" + escape_html(note) + "</figcaption>\n") +
         "</figure>\n";
}

}  // namespace tailor
