#include "data/store/halves.h"

#include <cmath>
#include <cstring>

#include "base/error.h"

namespace tailor {

float rounded_to_half(float value) {
  return std::isnan(value) ? value : half_to_float(half_from_float(value));
}

namespace {

template <class Convert>
void widen_each(const std::byte* from, std::int64_t count, float* out, const Convert& convert) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, from + 2 * i, sizeof bits);
    out[i] = convert(bits);
  }
}

}  // namespace

void widen(Dtype dtype, const std::byte* from, std::int64_t count, float* out) {
  switch (dtype) {
    case Dtype::f32:
      std::memcpy(out, from, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case Dtype::f16:
      return widen_each(from, count, out, [](std::uint16_t bits) { return half_to_float(bits); });
    case Dtype::bf16:
      return widen_each(from, count, out, [](std::uint16_t bits) { return bf16_to_float(bits); });
    default:
      TAILOR_CHECK(false, "an element type of numbers");
  }
}

}  // namespace tailor
