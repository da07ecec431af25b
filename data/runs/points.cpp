#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "data/runs/chart.h"

namespace tailor {

bool is_finite(const std::pair<double, double>& point) {
  return std::isfinite(point.first) && std::isfinite(point.second);
}

Points thinned(const Points& all, std::size_t columns) {
  Points points;
  std::copy_if(all.begin(), all.end(), std::back_inserter(points), is_finite);
  if (points.size() <= 2 * columns) return points;
  Points out;
  for (std::size_t b = 0; b < columns; ++b) {
    const auto at = [&](std::size_t i) {
      return points.begin() + static_cast<std::ptrdiff_t>(i * points.size() / columns);
    };
    auto [low, high] = std::minmax_element(
        at(b), at(b + 1), [](const auto& p, const auto& q) { return p.second < q.second; });
    if (low > high) std::swap(low, high);
    out.push_back(*low);
    if (low != high) out.push_back(*high);
  }
  return out;
}

Points moving_median(const Points& points, std::size_t width, std::size_t count) {
  Points all;
  std::copy_if(points.begin(), points.end(), std::back_inserter(all), is_finite);
  Points out;
  const std::size_t half = width / 2;
  const std::size_t places = std::min(count, all.size());
  std::vector<double> window;
  for (std::size_t p = 0; p < places; ++p) {
    // From the first point to the last.
    const std::size_t i = places == 1 ? 0 : p * (all.size() - 1) / (places - 1);
    // Narrower towards both ends, so that the window stays centred.
    const std::size_t reach = std::min({half, i, all.size() - 1 - i});
    window.clear();
    for (std::size_t k = i - reach; k <= i + reach; ++k) window.push_back(all[k].second);
    const auto middle = window.begin() + static_cast<std::ptrdiff_t>(reach);
    std::nth_element(window.begin(), middle, window.end());
    out.emplace_back(all[i].first, *middle);
  }
  return out;
}

}  // namespace tailor
