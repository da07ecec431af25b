#pragma once

#include <cstdint>
#include <cstring>
#include <unordered_map>

#include "base/aligned_memory.h"

namespace tailor {

/// Rows that were read by index before, in memory: of an embedding of which no rank holds all.
/// Takes rows as they come until it is full; what fine-tuning data speaks of is a small part of a
/// vocabulary, and the same in every step.
class RowCache {
 public:
  RowCache() = default;
  /// Room for `rows` of `row_bytes` each; memory is taken as it fills.
  RowCache(std::int64_t rows, std::int64_t row_bytes)
      : rows_(rows), row_bytes_(row_bytes), memory_(rows * row_bytes) {}

  /// nullptr: it is not here.
  const std::byte* find(std::int32_t row) const {
    const auto found = place_of_.find(row);
    return found == place_of_.end() ? nullptr : memory_.data() + found->second * row_bytes_;
  }
  void keep(std::int32_t row, const std::byte* bytes) {
    const auto place = static_cast<std::int64_t>(place_of_.size());
    if (place >= rows_ || !place_of_.emplace(row, place).second) return;
    std::memcpy(memory_.data() + place * row_bytes_, bytes, static_cast<std::size_t>(row_bytes_));
  }
  std::int64_t memory_bytes() const { return rows_ * row_bytes_; }

 private:
  std::int64_t rows_ = 0, row_bytes_ = 0;
  AlignedMemory memory_;
  std::unordered_map<std::int32_t, std::int64_t> place_of_;
};

}  // namespace tailor
