#include <algorithm>
#include <cstring>

#include "adapters/merge/worker.h"
#include "data/quant/numbers.h"
#include "data/store/halves.h"

namespace tailor {

std::int64_t column_strip_rows(const MergePart& part) {
  constexpr std::int64_t kStripBytes = std::int64_t{1} << 20;
  const std::int64_t row_bytes =
      std::max<std::int64_t>(1, part.columns * static_cast<std::int64_t>(sizeof(float)));
  return std::clamp<std::int64_t>(kStripBytes / row_bytes, 1,
                                  std::max<std::int64_t>(1, part.slice_rows));
}

/// A column's scale is known when all rows are: so the slice stays in memory as codes, and its rows
/// are decoded and added to twice, first for the scales, then to be encoded where they lie.
MergedPiece MergeWorker::columns(const MergePart& part, const MergeJob& job) {
  const MergeTensor &in = plan_.inputs[part.in], &out = plan_.outputs[part.out];
  const MergeTensor& in_scales = plan_.inputs[*part.in_scales];
  const std::int64_t begin = job.slice * in.pieces.slice_bytes, bytes = in.pieces.slice_bytes;
  MergedPiece done;
  const std::int64_t scale_bytes = in_scales.pieces.slice_bytes;
  const std::byte* raw = files_.sources[in_scales.file]->read(
      in_scales.offset + job.slice * scale_bytes, scale_bytes, in_scales_);
  done.in_scales = piece_digest(span_of(raw, scale_bytes));
  std::vector<float> old_scales(static_cast<std::size_t>(part.columns));
  widen(in_scales.dtype, raw, part.columns, old_scales.data());
  std::byte* const codes = files_.sources[in.file]->read(in.offset + begin, bytes, in_);
  done.in = piece_digest(span_of(codes, bytes));

  const std::int64_t strip = column_strip_rows(part);
  base_.resize(static_cast<std::size_t>(strip * part.columns));
  target_.resize(base_.size());
  stored_.resize(base_.size());
  const auto sum_of_strip = [&](std::int64_t first, std::int64_t rows) {
    decode(part, {rows, codes + first * part.columns, in_scales.dtype, old_scales.data()},
           base_.data());
    MergeSums sums;
    add_to_strip(part, job, first, rows, &sums);
    return sums;
  };
  std::vector<float> scales(old_scales.size());
  for (std::int64_t first = 0; first < part.slice_rows; first += strip) {
    const std::int64_t rows = std::min(strip, part.slice_rows - first);
    static_cast<void>(sum_of_strip(first, rows));
    encode_.largest_in_columns(target_.data(), rows, part.columns, scales.data());
  }
  for (float& scale : scales) scale = fp8_scale(scale, in_scales.dtype == Dtype::bf16);
  for (std::int64_t first = 0; first < part.slice_rows; first += strip) {
    const std::int64_t rows = std::min(strip, part.slice_rows - first);
    MergeSums sums = sum_of_strip(first, rows);
    std::byte* const to = codes + first * part.columns;
    encode_.fp8_columns(target_.data(), rows, part.columns, scales.data(),
                        reinterpret_cast<std::uint8_t*>(to));
    decode(part, {rows, to, in_scales.dtype, scales.data()}, stored_.data());
    kernels_.compare(base_.data(), target_.data(), stored_.data(), rows * part.columns, &sums);
    done.sums.add(sums);
  }
  done.out = piece_digest(span_of(codes, bytes));
  write(out, begin, span_of(codes, bytes));
  write_scales(part, job, scales, &done);
  return done;
}

}  // namespace tailor
