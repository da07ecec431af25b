#pragma once

#include <cstdint>

namespace tailor {

/// Sums over the elements of merged rows: b the base's weight, d the adapters' change, s what is
/// stored in the end.
struct MergeSums {
  double base_squares = 0;   ///< sum of b^2
  double delta_squares = 0;  ///< sum of d^2
  double error_squares = 0;  ///< sum of (s - (b + d))^2: rounding, or quantisation
  double kept = 0;           ///< sum of (s - b) d: delta_squares where all of the change survived

  void add(const MergeSums& other) {
    base_squares += other.base_squares;
    delta_squares += other.delta_squares;
    error_squares += other.error_squares;
    kept += other.kept;
  }
};

/// Rows to add a low-rank product to: out[k][j] = base[k][j] + sum_t coefficients[k][t]
/// vectors[t][j], t ascending, every product and sum rounded to float32, then once to out's type.
struct RowsToMerge {
  enum class Number { f32, bf16 };
  const void* base = nullptr;  ///< [rows, columns] of base_number
  void* out = nullptr;         ///< [rows, columns] of out_number; may be `base` where both are one
  Number base_number = Number::bf16, out_number = Number::bf16;
  std::int64_t rows = 0, columns = 0, terms = 0;
  const float* coefficients = nullptr;    ///< [rows, terms]
  const float* const* vectors = nullptr;  ///< [terms] of [columns]
};

/// The inner loops of a merge at one instruction-set level. Every level gives the same bits.
struct LowRankKernels {
  void (*merge)(const RowsToMerge& rows, MergeSums* sums);
  /// Adds to error_squares and kept what `stored` makes of base and target = base + change.
  void (*compare)(const float* base, const float* target, const float* stored, std::int64_t count,
                  MergeSums* sums);
  /// out[i] = table[codes[i]] * scale
  void (*scale_codes)(const std::uint8_t* codes, const float* table, float scale,
                      std::int64_t count, float* out);
  /// out[i] = table[codes[i]] * scales[i]
  void (*scale_columns)(const std::uint8_t* codes, const float* table, const float* scales,
                        std::int64_t count, float* out);
};

extern const LowRankKernels kLowRankV4, kLowRankV3, kLowRankBase;

/// What this machine can run, best first.
struct LowRankLevels {
  struct Level {
    const char* name;
    const LowRankKernels* kernels;
  };
  Level levels[3];
  int count;
};
LowRankLevels runnable_low_rank_levels();

}  // namespace tailor
