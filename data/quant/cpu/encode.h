#pragma once

#include <cstddef>
#include <cstdint>

namespace tailor {

/// What int4_row() found of a row: sums over its elements.
struct Int4Sums {
  double squared_error = 0, absmax_squared_error = 0;
};

/// What nf4_block() keeps of a block [64 values or fewer] with u = value / absmax and v = NF4's
/// value of its code: the block's error under a scale that is not yet known is
/// absmax^2 (sum (u - v)^2 - 2 t cross + t^2 codes), t = scale / absmax - 1.
struct Nf4Block {
  float absmax;
  float error;  ///< sum of (u - v)^2
  float cross;  ///< sum of (u - v) v
  float codes;  ///< sum of v^2
};

/// The inner loops of MatrixEncoder at one instruction-set level. Every level gives the same bits:
/// sums run in 16 lanes that are added as a tree, and nothing is fused or approximated.
struct EncodeKernels {
  /// The index of the first value that is infinite or no number, else `count`; adds to `squares`.
  std::int64_t (*scan)(const float* values, std::int64_t count, double* squares);
  /// To bfloat16; returns the squared error.
  double (*bf16)(const float* values, std::int64_t count, std::uint16_t* out);
  /// A row [columns] to ceil(columns / 8) words and ceil(columns / group) scales. `scratch` holds
  /// int4_scratch_bytes(columns), aligned to 64.
  Int4Sums (*int4_row)(const float* values, std::int64_t columns, std::int64_t group, bool any_sign,
                       std::byte* scratch, std::uint8_t* codes, std::uint16_t* scales);
  /// `count` <= 64 values to (count + 1) / 2 bytes; `last`: bitsandbytes divides in the block that
  /// is not whole, and multiplies by the inverse in the others.
  Nf4Block (*nf4_block)(const float* values, std::int64_t count, bool last, std::uint8_t* codes);
  /// rows x columns values, rows `stride` apart, also in `codes`; returns the squared error.
  double (*fp8_block)(const float* values, std::int64_t rows, std::int64_t columns,
                      std::int64_t stride, bool bf16_scale, std::uint8_t* codes, float* scale);
  /// Raises largest[columns] to the magnitudes of values[rows, columns].
  void (*largest_in_columns)(const float* values, std::int64_t rows, std::int64_t columns,
                             float* largest);
  /// values[rows, columns] to codes [rows, columns] under a scale a column.
  void (*fp8_columns)(const float* values, std::int64_t rows, std::int64_t columns,
                      const float* scales, std::uint8_t* codes);
};

/// A row of floats and one of codes, each with room for whole vectors.
constexpr std::int64_t int4_scratch_bytes(std::int64_t columns) {
  return (columns + 32) * (static_cast<std::int64_t>(sizeof(float)) + 1);
}

extern const EncodeKernels kEncodeV4, kEncodeV3, kEncodeBase;

/// What this machine can run, best first; the encoder takes the first.
struct EncodeLevels {
  struct Level {
    const char* name;
    const EncodeKernels* kernels;
  };
  Level levels[3];
  int count;
};
EncodeLevels runnable_encode_levels();

}  // namespace tailor
