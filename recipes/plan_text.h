#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "base/text.h"

namespace tailor {

/// How the plan's workings write their numbers.

inline double as_double(std::int64_t value) { return static_cast<double>(value); }
/// "12.1 GB"
inline std::string gb(double bytes) { return bytes_text(std::llround(bytes)); }
/// "32,768"
inline std::string whole(double value) { return count_text(std::llround(value)); }
/// "0.312"
inline std::string short_text(double value) { return number_text(value, 3); }

}  // namespace tailor
