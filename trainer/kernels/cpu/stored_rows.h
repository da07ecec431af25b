#pragma once
// Rows of W for the products of few rows (few_rows.h, few_rows_t.h): as they lie in memory, or
// decoded from their stored form piece by piece into a block that stays in L2. Decoding a whole
// matrix first would write and read four times the stored bytes in memory, which for few rows takes
// longer than the product.

#include <algorithm>
#include <cstring>

#include "data/quant/format.h"
#include "trainer/kernels/cpu/dequantise.h"
#include "trainer/kernels/simd.h"

namespace tailor {
namespace {

#if defined(__AVX512BF16__)

/// Elements [column_begin, column_end) of rows [row_begin, row_end): the bits of dequantise(). For
/// fp8, int4 and nf4; columns begin at a multiple of the format's group or block, or of its row.
/// `ahead`: how far behind a code in memory lies the one that will be wanted next but a block.
inline void dequantise_block(const EncodedMatrix& matrix, std::int64_t row_begin,
                             std::int64_t row_end, std::int64_t column_begin,
                             std::int64_t column_end, Bf16* out, std::int64_t out_stride,
                             std::int64_t ahead) {
  const std::int64_t columns = matrix.columns;
  const auto* codes = reinterpret_cast<const std::uint8_t*>(matrix.codes);
  switch (matrix.format.kind) {
    case WeightKind::int4: {
      const std::int64_t group = matrix.format.group;
      const std::int64_t row_bytes = (columns + 7) / 8 * 4, groups = (columns + group - 1) / group;
      for (std::int64_t row = row_begin; row < row_end; ++row, out += out_stride) {
        const auto* scales =
            reinterpret_cast<const Bf16*>(matrix.scales) + row * groups + column_begin / group;
        for (std::int64_t c = column_begin; c < column_end; c += group) {
          const Sixteen<Bf16, false> values(kInt4Codes, to_float(*scales++), true);
          values.template expand<Store::plain>(codes + row * row_bytes, c,
                                               std::min(group, column_end - c),
                                               out + (c - column_begin), ahead);
        }
      }
      return;
    }
    case WeightKind::nf4: {
      const std::int64_t blocks = (matrix.rows * columns + kNf4Block - 1) / kNf4Block;
      const auto* floats = reinterpret_cast<const float*>(matrix.scales);
      const float offset = floats[0], *second = floats + 1;
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(second + (blocks + 255) / 256);
      for (std::int64_t row = row_begin; row < row_end; ++row, out += out_stride) {
        for (std::int64_t c = column_begin; c < column_end;) {
          const std::int64_t element = row * columns + c, block = element / kNf4Block;
          const std::int64_t n = std::min(column_end - c, (block + 1) * kNf4Block - element);
          float product = kDynamicMap[bytes[block]] * second[block / 256];
          asm("" : "+x"(product));  // rounded, as in dequantise_nf4
          const Sixteen<Bf16, true> values(kNf4, product + offset, false);
          values.template expand<Store::plain>(codes, element, n, out + (c - column_begin), ahead);
          c += n;
        }
      }
      return;
    }
    default: {  // fp8
      const std::int64_t block_rows = matrix.format.block_rows;
      const std::int64_t width =
          matrix.format.block_columns == 0 ? columns : matrix.format.block_columns;
      const std::int64_t across = (columns + width - 1) / width;
      for (std::int64_t c = column_begin; c < column_end;) {
        const std::int64_t n = std::min(column_end - c, (c / width + 1) * width - c);
        Magnitudes<Bf16> table;
        for (std::int64_t row = row_begin; row < row_end; ++row) {
          if (row == row_begin || row % block_rows == 0) {
            table.fill(reinterpret_cast<const float*>(
                matrix.scales)[row / block_rows * across + c / width]);
          }
          expand_fp8<Store::plain>(table, codes + row * columns + c, n,
                                   out + (row - row_begin) * out_stride + (c - column_begin),
                                   ahead);
        }
        c += n;
      }
    }
  }
}

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

  std::int64_t count() const {  ///< of rows
    std::int64_t all = 0;
    for (std::int64_t i = 0; i < parts_.count; ++i) all += parts_.first[i].rows;
    return all;
  }
  std::int64_t columns() const { return parts_.first->columns; }

  /// Rows [row, row + rows), which lie in one matrix.
  RowBlock block(std::int64_t row, std::int64_t rows, std::int64_t column,
                 std::int64_t columns) const {
    const EncodedMatrix* part = parts_.first;
    for (; row >= part->rows; ++part) row -= part->rows;
    // The same columns of the rows that follow, or in whole rows what follows in memory.
    const std::int64_t row_codes = code_row_bytes(*part);
    const std::int64_t ahead = columns == part->columns ? kPrefetchBytes : rows * row_codes;
    dequantise_block(*part, row, row + rows, column, column + columns, block_.get(), stride_,
                     ahead);
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
