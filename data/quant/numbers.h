#pragma once

// One number at a time: the conversions the formats are made of. The kernels have their own vector
// forms, and may not include this: an inline function compiled for AVX-512 could be handed to
// another file by the linker.

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace tailor {

inline float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(std::uint32_t{bits} << 16U);
}

/// To nearest, ties to even; every NaN becomes 0x7FC0, as in torch.
inline std::uint16_t bf16_from_float(float value) {
  if (std::isnan(value)) return 0x7FC0;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U);
}

/// The float of an IEEE half (F16 of safetensors), exactly.
inline float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16U, exponent = (bits >> 10U) & 31U;
  const std::uint32_t fraction = bits & 0x3FFU;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000U | (fraction << 13U));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112U) << 23U) | fraction << 13U);
  const float size = static_cast<float>(fraction) * 0x1p-24F;
  return sign != 0 ? -size : size;
}

/// To nearest, ties to even, infinite from 65,520 on; of what is a number.
inline std::uint16_t half_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16U & 0x8000U;
  const float magnitude = std::fabs(value);
  if (magnitude < 0x1p-14F) {  // a denormal: the sum's own rounding leaves whole steps of 2^-24
    const float shifted = magnitude + 0.5F;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3F000000U));
  }
  const std::uint32_t low = bits & 0x7FFFFFFFU;
  const std::uint32_t rounded = low + 0xFFFU + (low >> 13U & 1U);
  if (rounded >= 0x47800000U) return static_cast<std::uint16_t>(sign | 0x7C00U);
  return static_cast<std::uint16_t>(sign | ((rounded >> 13U) - (112U << 10U)));
}

/// One NaN for all: what a product of two NaNs holds is up to the processor.
inline float plain_nan(float value) {
  return std::isnan(value) ? std::bit_cast<float>(0x7FC00000U) : value;
}

/// The magnitude of an e4m3 code without its sign bit (OCP 8-bit floating point, E4M3): 4 exponent
/// bits of bias 7, 3 mantissa bits, denormals, no infinity; 0x7F is NaN.
inline float e4m3_magnitude(std::uint8_t code) {
  const std::uint32_t exponent = code >> 3U, mantissa = code & 7U;
  if (code == 0x7F) return std::numeric_limits<float>::quiet_NaN();
  if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-9F;
  return std::bit_cast<float>((exponent + 120U) << 23U | mantissa << 20U);
}

constexpr float kE4m3Largest = 448;

/// The scale under which fp8 holds weights of that magnitude: absmax / 448, no smaller than a
/// normal float. Rounded to a bfloat16 it may be smaller, and 448 is what a few of them saturate
/// at: they are nearest to it anyway.
inline float fp8_scale(float absmax, bool bf16) {
  const float scale = std::fmax(absmax / kE4m3Largest, 0x1p-126F);
  return bf16 ? bf16_to_float(bf16_from_float(scale)) : scale;
}

}  // namespace tailor
