#pragma once

// Elementary functions that give the same bits on CPU and GPU, whose own libraries do not: only
// IEEE sums, products, quotients and fused multiply-adds. The bounds were measured over all floats
// (exp) and hold in tests/cuda/math_test.cpp over a part of them.

#include "trainer/cuda/bodies/words.h"

namespace tailor::cuda {

/// e^x for x <= 0 within 0.9 units in the last place; exactly 1 at 0, 0 below -87.3 (where e^x
/// nears the smallest normal float), NaN of NaN. Greater x are not for this function.
///
/// Cody and Waite: x = n ln 2 + r with ln 2 in two parts, |r| <= ln(2) / 2, and e^r by a polynomial
/// whose coefficients above the second are a minimax fit of e^r's relative error.
TAILOR_HOST_DEVICE inline float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: a sum with it is a whole number
  const float shifted = std::fma(x, 0x1.715476p+0F, kRound);
  const float n = shifted - kRound;
  const float r = std::fma(n, 0x1.bd0106p-13F, std::fma(n, -0x1.63p-1F, x));
  float tail = 0x1.6a23d0p-10F;
  tail = std::fma(tail, r, 0x1.123a20p-7F);
  tail = std::fma(tail, r, 0x1.5558f2p-5F);
  tail = std::fma(tail, r, 0x1.555492p-3F);
  tail = std::fma(tail, r, 0x1.fffffcp-2F);
  const float power = std::fma(std::fma(tail, r, 1.0F), r, 1.0F);
  // n stands in the last bits of `shifted`; all above them are shifted out.
  const auto scale = bits_as<float>((bits_as<std::uint32_t>(shifted) << 23U) + 0x3F800000U);
  return x < -87.3F ? 0.0F : power * scale;
}

/// ln x in double, within 4e-16 of its value or of 1, whichever is more; as in C of 0, infinity,
/// negative numbers and NaN. Denormals count as 0. x = 2^k m with m about 1, f = (m - 1) / (m + 1),
/// ln m = 2 (f + f^3/3 + f^5/5 + ...), |f| <= 0.172.
TAILOR_HOST_DEVICE inline double log_of(double x) {
  const auto bits = bits_as<std::uint64_t>(x);
  if (!(x >= 0x1.0p-1022)) {
    return bits_as<double>(x > -0x1.0p-1022 ? 0xFFF0000000000000ULL : 0x7FF8000000000000ULL);
  }
  if (bits >= 0x7FF0000000000000ULL) return x;
  // Mantissas from sqrt(1/2) on: 0x3FE6A09E667F3BCD are its bits.
  const std::uint64_t above = bits - 0x3FE6A09E667F3BCDULL;
  const auto k = static_cast<std::int64_t>(above) >> 52;
  const auto m = bits_as<double>(bits - (static_cast<std::uint64_t>(k) << 52U));
  const double f = (m - 1.0) / (m + 1.0), square = f * f;
  double sum = 1.0 / 23.0;
  TAILOR_UNROLL
  for (int odd = 21; odd >= 1; odd -= 2) sum = std::fma(sum, square, 1.0 / odd);
  return std::fma(static_cast<double>(k), 0x1.62e42fefa39efp-1, 2.0 * f * sum);
}

/// 1 / (1 + e^-x) within 3 units in the last place, 0 below -87.3.
TAILOR_HOST_DEVICE inline float sigmoid(float x) {
  const float e = exp_nonpositive(x < 0 ? x : -x);
  return (x < 0 ? e : 1.0F) / (1.0F + e);
}

}  // namespace tailor::cuda
