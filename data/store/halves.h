#pragma once

#include <cstdint>

namespace tailor {

/// The float of an IEEE half (F16 of safetensors), exactly.
float half_to_float(std::uint16_t bits);
/// `value` as the nearest IEEE half, ties to even, infinite beyond 65,504 and a half step.
float rounded_to_half(float value);

void widen_half(const std::uint16_t* from, std::int64_t count, float* out);
void widen_bf16(const std::uint16_t* from, std::int64_t count, float* out);

}  // namespace tailor
