#include "data/tokens/packer.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>

#include "base/error.h"

namespace tailor {

std::vector<std::vector<std::int64_t>> pack_documents(std::span<const std::int64_t> lengths,
                                                      std::int64_t sequence_len,
                                                      std::int64_t window) {
  TAILOR_CHECK(window > 0 && sequence_len > 0);
  std::vector<std::vector<std::int64_t>> rows;
  // Rows with room left, by (room, row): the smallest room that still fits is the best fit. They
  // stay open into the next window, whose short documents fill them.
  std::set<std::pair<std::int64_t, std::size_t>> open;
  std::vector<std::int64_t> order;
  const auto count = static_cast<std::int64_t>(lengths.size());
  for (std::int64_t begin = 0; begin < count; begin += window) {
    order.resize(static_cast<std::size_t>(std::min(window, count - begin)));
    std::iota(order.begin(), order.end(), begin);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      return lengths[static_cast<std::size_t>(a)] > lengths[static_cast<std::size_t>(b)];
    });
    for (const std::int64_t document : order) {
      const std::int64_t length = lengths[static_cast<std::size_t>(document)];
      TAILOR_CHECK(length > 0 && length <= sequence_len);
      std::int64_t room = sequence_len;
      std::size_t row = rows.size();
      if (const auto best = open.lower_bound({length, 0}); best != open.end()) {
        std::tie(room, row) = *best;
        open.erase(best);
      } else {
        rows.emplace_back();
      }
      rows[row].push_back(document);
      if (room > length) open.emplace(room - length, row);
    }
    // Rows older than this window are shut, so that a document never moves further than it.
    std::erase_if(open, [&](const auto& entry) { return rows[entry.second].front() < begin; });
  }
  for (auto& row : rows) std::sort(row.begin(), row.end());
  std::sort(rows.begin(), rows.end(),
            [](const auto& a, const auto& b) { return a.front() < b.front(); });
  return rows;
}

std::vector<std::vector<std::int64_t>> one_document_a_row(std::int64_t documents) {
  std::vector<std::vector<std::int64_t>> rows(static_cast<std::size_t>(documents));
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = {static_cast<std::int64_t>(i)};
  return rows;
}

}  // namespace tailor
