#pragma once

#include <cmath>
#include <string>

#include "base/text.h"
#include "recipes/plan.h"

namespace tailor {

/// A figure in the words of its unit; "not known: reason" without a value.
inline std::string words(const Figure& figure) {
  if (!figure.value) return "not known: " + figure.working;
  const double value = *figure.value;
  if (figure.unit == "bytes") return bytes_text(std::llround(value));
  if (figure.unit == "usd") return usd_text(std::llround(value * 1e6));
  if (figure.unit == "seconds") return seconds_text(value);
  if (figure.unit == "hours") return seconds_text(value * 3600);
  if (figure.unit == "tokens/s") return number_text(value, 3) + " tokens/s";
  if (value == std::floor(value)) return count_text(std::llround(value)) + " " + figure.unit;
  return number_text(value, 3) + " " + figure.unit;
}

}  // namespace tailor
