#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "data/store/unit.h"

namespace tailor {

/// Random codes and scales of one matrix of a unit, drawn in its stored form: decoded, its elements
/// are as of N(0, 1 / columns), and never exist as such. Norms are 1.
///
/// Every 16 bytes of codes, or 16 scales, come from one Philox block named by (seed, unit, role,
/// codes or scales, position), so that any stretch can be drawn alone and is the same bytes on any
/// thread. A random byte picks one of 256 entries of a table:
///
/// int4, nf4  two codes: of quantiles i and 121 i + 157 (modulo 256) of 256 of a normal
///            distribution. Each code then has its normal share to 1 / 256, and the two of a byte
///            are as good as independent.
/// fp8        the i-th of 256 quantiles, as e4m3.
/// bf16       12 random bits pick one of 4,096 quantiles.
/// scales     1/8 up or down at most, evenly: a group, a block of 128 x 128 (fp8), a block of 64
///            (nf4, by the byte of its dynamic map).
///
/// Scales are such that the mean square of what the tables can decode to is exactly 1 / columns but
/// for the rounding of a scale to its type.
class SyntheticMatrix {
 public:
  /// Throws Error{internal} for f32: nothing of a synthetic store is kept in it.
  SyntheticMatrix(const UnitId& unit, const MatrixPlace& place, std::uint64_t seed);

  /// Codes [begin, begin + out.size()) of the matrix, in bytes; `begin` is a multiple of 16.
  void draw_codes(std::int64_t begin, std::span<std::byte> out) const;
  /// Scales [begin, begin + out.size()) of the matrix, in bytes; `begin` is a multiple of 64.
  void draw_scales(std::int64_t begin, std::span<std::byte> out) const;

 private:
  enum class Part : std::uint32_t { codes = 0, scales = 1 };
  /// 16 random bytes from block `block` on for each 16 bytes of `out`, the last ones cut off.
  void random_bytes(Part part, std::int64_t block, std::span<std::uint8_t> out) const;
  template <class T>
  void draw_from(const T* table, Part part, std::int64_t begin, std::span<std::byte> out) const;
  void draw_bf16(std::int64_t begin, std::span<std::byte> out) const;
  void draw_nf4_scales(std::int64_t begin, std::span<std::byte> out) const;
  void clear_unused_int4(std::int64_t begin, std::span<std::byte> out) const;

  const MatrixPlace& place_;
  std::uint64_t seed_;
  std::uint32_t unit_words_[2];  ///< of the counter: which unit
  bool ones_ = false;
  std::vector<std::uint16_t> values_;             ///< bf16: by 12 random bits
  std::array<std::uint16_t, 256> bf16_scales_{};  ///< int4
  std::array<float, 256> float_scales_{};         ///< fp8
  float offset_ = 0, second_ = 0;                 ///< nf4
};

}  // namespace tailor
