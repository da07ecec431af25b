#include "data/store/synthetic_unit.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "data/store/synthetic_matrix.h"

namespace tailor {

bool SyntheticUnitMaker::make(const StoredUnit& unit, const StoreFile& file,
                              std::atomic<std::int64_t>& bytes_written, UnitHash& hash) {
  unit_ = &unit;
  file_ = &file;
  bytes_written_ = &bytes_written;
  at_ = 0;
  write_unit_header({unit.id, mark_, unit.bytes, unit.matrices}, memory_.bytes());
  held_ = kUnitHeaderBytes;
  std::vector<SyntheticMatrix> matrices;
  matrices.reserve(unit.matrices.size());
  for (const MatrixPlace& place : unit.matrices) matrices.emplace_back(unit.id, place, seed_);
  for (std::size_t i = 0; i < matrices.size() && !ended_; ++i) {
    add(unit.matrices[i].codes_offset, unit.matrices[i].codes_bytes,
        [&](std::int64_t begin, std::span<std::byte> out) { matrices[i].draw_codes(begin, out); });
  }
  for (std::size_t i = 0; i < matrices.size() && !ended_; ++i) {
    add(unit.matrices[i].scales_offset, unit.matrices[i].scales_bytes,
        [&](std::int64_t begin, std::span<std::byte> out) { matrices[i].draw_scales(begin, out); });
  }
  const bool whole = !ended_;
  if (whole) {
    pad(unit.bytes);
    flush();
  }
  hash = hasher_.finish();
  return whole;
}

void SyntheticUnitMaker::add(std::int64_t offset, std::int64_t bytes, const Draw& draw) {
  pad(offset);
  for (std::int64_t done = 0; done < bytes && !ended_;) {
    if (held_ == kPieceBytes) flush();
    const std::int64_t n = std::min(bytes - done, kPieceBytes - held_);
    draw(done, room(n));
    held_ += n;
    done += n;
  }
}

/// Zeros up to `offset`, which is less than a page away.
void SyntheticUnitMaker::pad(std::int64_t offset) {
  std::int64_t left = offset - at_ - held_;
  TAILOR_CHECK(left >= 0 && left < kUnitAlignment);
  while (left > 0) {
    if (held_ == kPieceBytes) flush();
    const std::int64_t n = std::min(left, kPieceBytes - held_);
    std::memset(room(n).data(), 0, static_cast<std::size_t>(n));
    held_ += n;
    left -= n;
  }
}

std::span<std::byte> SyntheticUnitMaker::room(std::int64_t bytes) const {
  return memory_.bytes().subspan(static_cast<std::size_t>(held_), static_cast<std::size_t>(bytes));
}

void SyntheticUnitMaker::flush() {
  const auto piece = memory_.bytes().first(static_cast<std::size_t>(held_));
  hasher_.add(piece);
  file_->write(unit_->offset + at_, piece);
  *bytes_written_ += held_;
  at_ += held_;
  held_ = 0;
}

}  // namespace tailor
