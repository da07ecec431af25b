#pragma once

#include <cstddef>
#include <span>

namespace tailor {

/// Bytes [begin, end) of a text.
struct ByteRange {
  std::size_t begin = 0;
  std::size_t end = 0;
  friend bool operator==(const ByteRange&, const ByteRange&) = default;
};

/// True when `range` shares a byte with one of `ranges`, which are sorted and do not overlap.
inline bool overlaps(std::span<const ByteRange> ranges, ByteRange range) {
  std::size_t low = 0;
  std::size_t high = ranges.size();
  while (low < high) {  // first range that ends after range.begin
    const std::size_t middle = low + (high - low) / 2;
    if (ranges[middle].end <= range.begin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < ranges.size() && ranges[low].begin < range.end;
}

}  // namespace tailor
