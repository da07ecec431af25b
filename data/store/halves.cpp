#include "data/store/halves.h"

#include <bit>
#include <cmath>
#include <limits>

namespace tailor {

float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16U, exponent = (bits >> 10U) & 31U;
  const std::uint32_t fraction = bits & 0x3FFU;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000U | (fraction << 13U));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112U) << 23U) | fraction << 13U);
  const float size = static_cast<float>(fraction) * 0x1p-24F;
  return sign != 0 ? -size : size;
}

float rounded_to_half(float value) {
  const float size = std::fabs(value);
  if (!(size < 65520.0F)) {
    return std::isnan(value) ? value : std::copysign(std::numeric_limits<float>::infinity(), value);
  }
  const int exponent = size < 0x1p-14F ? -14 : std::ilogb(size);
  return std::ldexp(std::nearbyint(std::ldexp(value, 10 - exponent)), exponent - 10);
}

void widen_half(const std::uint16_t* from, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = half_to_float(from[i]);
}

void widen_bf16(const std::uint16_t* from, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = std::bit_cast<float>(std::uint32_t{from[i]} << 16U);
  }
}

}  // namespace tailor
