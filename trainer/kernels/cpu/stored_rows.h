#pragma once
// Rows of W for the products of few rows (few_rows.h, few_rows_t.h): as they lie in memory, or
// decoded from their stored form piece by piece into a block that stays in L2. Decoding a whole
// matrix first would write and read four times the stored bytes in memory, which for few rows takes
// longer than the product.

#include "trainer/kernels/cpu/dequantise.h"
#include "trainer/kernels/simd.h"

namespace tailor {
namespace {

#if defined(__AVX512BF16__)

struct RowBlock {
  const Bf16* w;
  std::int64_t stride;
};

/// Matrices of one number of columns, one below the other. Decoded blocks are the caller's until
/// the next call.
class StoredRows {
 public:
  /// Blocks of at most `rows` times `columns` elements.
  StoredRows(const StoredParts& parts, std::int64_t rows, std::int64_t columns)
      : parts_(parts), stride_((columns + 31) / 32 * 32 + 32), block_(rows * stride_) {}

  std::int64_t count() const { return parts_.rows(); }
  std::int64_t columns() const { return parts_.first->columns; }

  /// Rows [row, row + rows), which lie in one matrix.
  RowBlock block(std::int64_t row, std::int64_t rows, std::int64_t column,
                 std::int64_t columns) const {
    const EncodedMatrix* part = parts_.first;
    for (; row >= part->rows; ++part) row -= part->rows;
    // The same columns of the rows that follow, or in whole rows what follows in memory.
    const std::int64_t ahead =
        columns == part->columns ? kPrefetchBytes : rows * code_row_bytes(*part);
    const Columns wanted{column, column + columns, ahead};
    switch (part->format.kind) {
      case WeightKind::int4:
        dequantise_int4<Store::plain>(row, row + rows, *part, wanted, block_.get(), stride_);
        break;
      case WeightKind::nf4:
        dequantise_nf4<Store::plain>(row, row + rows, *part, wanted, block_.get(), stride_);
        break;
      default:
        dequantise_fp8<Store::plain>(row, row + rows, *part, wanted, block_.get(), stride_);
    }
    return {block_.get(), stride_};
  }

 private:
  static std::int64_t code_row_bytes(const EncodedMatrix& matrix) {
    return matrix.format.kind == WeightKind::fp8 ? matrix.columns : matrix.columns / 2;
  }
  StoredParts parts_;
  std::int64_t stride_;  ///< not a multiple of 4 KiB: rows would fall on few sets of L1
  Scratch<Bf16> block_;
};

#endif

}  // namespace
}  // namespace tailor
