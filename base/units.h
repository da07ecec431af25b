#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "base/error.h"

namespace tailor {

/// a * b of non-negative sizes; throws Error{does_not_fit} instead of wrapping.
inline std::int64_t checked_multiply(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) {
    throw Error(Fault::does_not_fit,
                {"a size overflows 64 bits: " + std::to_string(a) + " * " + std::to_string(b), "",
                 "Check the sizes in the file; one of them is far too large."});
  }
  return product;
}

constexpr std::int64_t div_ceil(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t align_up(std::int64_t value, std::int64_t step) {
  return div_ceil(value, step) * step;
}

/// Integer conversion that may not lose the value; a mistake of ours if it does.
template <class To, class From>
To narrow(From value) {
  static_assert(std::is_integral_v<To> && std::is_integral_v<From>);
  const auto result = static_cast<To>(value);
  TAILOR_CHECK(static_cast<From>(result) == value && ((result < To{}) == (value < From{})));
  return result;
}

constexpr std::int64_t kMicrosPerUsd = 1'000'000;

/// Price * time as integer micro-dollars, rounded to nearest. `usd_micros_per_hour` and
/// `device_milliseconds` are non-negative; the product is formed in 128 bits.
inline std::int64_t cost_usd_micros(std::int64_t usd_micros_per_hour,
                                    std::int64_t device_milliseconds) {
  __extension__ using Wide = __int128;
  constexpr std::int64_t kMillisecondsPerHour = 3'600'000;
  const Wide product = static_cast<Wide>(usd_micros_per_hour) * device_milliseconds;
  return static_cast<std::int64_t>((product + kMillisecondsPerHour / 2) / kMillisecondsPerHour);
}

}  // namespace tailor
