#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tailor {

/// How the numbers of a frozen matrix [rows, columns] are stored. Rows are the outputs of a linear
/// layer, columns its inputs, as in a published `weight`; groups run along the inputs.
enum class WeightKind {
  f32,
  bf16,
  fp8,   ///< e4m3 (finite values and NaN), one float scale a block
  int4,  ///< symmetric group-wise, compressed-tensors' pack-quantized
  nf4,   ///< NormalFloat 4, blocks of 64, scales quantised once more: bitsandbytes' Linear4bit
};

struct WeightFormat {
  WeightKind kind = WeightKind::bf16;
  std::int64_t group = 0;          ///< int4: columns a scale covers
  std::int64_t block_rows = 0;     ///< fp8: 128 as DeepSeek publishes, 1 for a scale a row
  std::int64_t block_columns = 0;  ///< fp8: 128; 0: all columns
  bool operator==(const WeightFormat&) const = default;

  static WeightFormat f32() { return {WeightKind::f32}; }
  static WeightFormat bf16() { return {WeightKind::bf16}; }
  static WeightFormat fp8_blocks() { return {WeightKind::fp8, 0, 128, 128}; }
  static WeightFormat fp8_rows() { return {WeightKind::fp8, 0, 1, 0}; }
  /// The group is 128, or the largest of 64, 32 that divides `columns`, else all of them.
  static WeightFormat int4_for(std::int64_t columns);
  static WeightFormat int4(std::int64_t group) { return {WeightKind::int4, group}; }
  static WeightFormat nf4() { return {WeightKind::nf4}; }
};

/// "int4 g128", "fp8 128x128", "nf4", ...: for people.
std::string format_text(const WeightFormat& format);

/// Bytes of the codes of a [rows, columns] matrix, and of its scales. Both are arrays in row-major
/// order without gaps, little-endian:
///
/// kind | codes                                        | scales
/// f32  | float [rows, columns]                        | none
/// bf16 | bfloat16 [rows, columns]                     | none
/// fp8  | e4m3 byte [rows, columns]                    | float [ceil(rows / block_rows),
/// ceil(columns / block_columns)] int4 | uint32 [rows, ceil(columns / 8)]: element c  | bfloat16
/// [rows, ceil(columns / group)]
///      | is code + 8 in bits 4 (c % 8) of word c / 8; |
///      | the last word's unused bits are 0            |
/// nf4  | two codes a byte over the flattened matrix,  | float offset; float [ceil(blocks / 256)];
/// byte
///      | the first in the high bits; rows * columns   | [blocks], blocks = ceil(rows * columns /
///      64). | odd: the last low bits are 7, a zero         | A block's scale is | | code_map[byte]
///      * float[block / 256] + offset
std::int64_t code_bytes(const WeightFormat& format, std::int64_t rows, std::int64_t columns);
std::int64_t scale_bytes(const WeightFormat& format, std::int64_t rows, std::int64_t columns);

/// A matrix in its stored form; the bytes belong to someone else. Codes and scales are aligned to
/// 64 bytes.
struct EncodedMatrix {
  WeightFormat format;
  std::int64_t rows = 0, columns = 0;
  const std::byte* codes = nullptr;
  const std::byte* scales = nullptr;
};

}  // namespace tailor
