#include "recipes/scalars.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <utility>

#include "base/text.h"

namespace tailor {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// [-+]? digits (. digits)? ([eE] [-+]? digits)?, a digit on one side of the point at least.
struct NumberShape {
  bool is_number = false, whole = false, leading_zero = false;
};

NumberShape shape_of(std::string_view text) {
  NumberShape shape;
  std::size_t at = 0;
  if (at < text.size() && (text[at] == '-' || text[at] == '+')) ++at;
  const std::size_t first = at;
  while (at < text.size() && is_digit(text[at])) ++at;
  const std::size_t before_point = at - first;
  shape.leading_zero = before_point > 1 && text[first] == '0';
  std::size_t after_point = 0;
  bool point = false, exponent = false;
  if (at < text.size() && text[at] == '.') {
    point = true;
    const std::size_t begin = ++at;
    while (at < text.size() && is_digit(text[at])) ++at;
    after_point = at - begin;
  }
  if (before_point + after_point == 0) return shape;
  if (at < text.size() && (text[at] == 'e' || text[at] == 'E')) {
    exponent = true;
    ++at;
    if (at < text.size() && (text[at] == '-' || text[at] == '+')) ++at;
    const std::size_t begin = at;
    while (at < text.size() && is_digit(text[at])) ++at;
    if (at == begin) return shape;
  }
  shape.is_number = at == text.size();
  shape.whole = !point && !exponent;
  return shape;
}

bool any_of(std::string_view word, std::initializer_list<std::string_view> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

/// 0x1F, 0o17, 0b1, 1_000, 12:30: numbers to YAML 1.1 only.
bool is_old_number(std::string_view text) {
  if (!text.empty() && (text.front() == '-' || text.front() == '+')) text.remove_prefix(1);
  if (text.empty() || !is_digit(text.front())) return false;
  if (text.size() > 2 && text[0] == '0' && any_of(text.substr(1, 1), {"x", "X", "o", "b"})) {
    return std::all_of(text.begin() + 2, text.end(), [](char c) {
      return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F') || c == '_';
    });
  }
  return text.find_first_of("_:") != std::string_view::npos &&
         std::all_of(text.begin(), text.end(),
                     [](char c) { return is_digit(c) || c == '_' || c == ':' || c == '.'; });
}

}  // namespace

ScalarMeaning scalar_meaning(std::string_view text) {
  if (any_of(text, {"", "~", "null", "Null", "NULL"})) return ScalarMeaning::null;
  if (any_of(text, {"true", "True", "TRUE", "false", "False", "FALSE"})) {
    return ScalarMeaning::boolean;
  }
  const std::string word = lower(text);
  if (any_of(word, {"yes", "no", "on", "off", "y", "n"})) return ScalarMeaning::ambiguous;
  if (any_of(word, {".inf", "+.inf", "-.inf", ".nan"})) return ScalarMeaning::not_finite;
  const NumberShape shape = shape_of(text);
  if (shape.is_number) {
    if (shape.leading_zero) return ScalarMeaning::ambiguous;
    return shape.whole ? ScalarMeaning::integer : ScalarMeaning::number;
  }
  return is_old_number(text) ? ScalarMeaning::ambiguous : ScalarMeaning::text;
}

std::optional<double> parse_number(std::string_view text) {
  const NumberShape shape = shape_of(text);
  if (!shape.is_number || shape.leading_zero) return std::nullopt;
  if (text.front() == '+') text.remove_prefix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<std::int64_t> parse_integer(std::string_view text) {
  const NumberShape shape = shape_of(text);
  if (!shape.is_number || shape.leading_zero) return std::nullopt;
  if (text.front() == '+') text.remove_prefix(1);
  if (shape.whole) {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
    return value;
  }
  if (text.find('.') != std::string_view::npos) return std::nullopt;
  const std::optional<double> value = parse_number(text);
  constexpr double kExact = 9007199254740992.0;  // 2^53: doubles below hold every whole number
  if (!value || std::abs(*value) > kExact || std::trunc(*value) != *value) return std::nullopt;
  return static_cast<std::int64_t>(*value);
}

std::optional<std::int64_t> parse_bytes(std::string_view text) {
  text = trim(text);
  constexpr std::array<std::pair<std::string_view, double>, 9> kUnits = {{{"KiB", 0x1p10},
                                                                          {"MiB", 0x1p20},
                                                                          {"GiB", 0x1p30},
                                                                          {"TiB", 0x1p40},
                                                                          {"KB", 1e3},
                                                                          {"MB", 1e6},
                                                                          {"GB", 1e9},
                                                                          {"TB", 1e12},
                                                                          {"B", 1}}};
  double factor = 1;
  for (const auto& [unit, bytes] : kUnits) {
    if (text.ends_with(unit)) {
      factor = bytes;
      text = trim(text.substr(0, text.size() - unit.size()));
      break;
    }
  }
  if (factor == 1) {
    const std::optional<std::int64_t> whole = parse_integer(text);
    return whole && *whole >= 0 ? whole : std::nullopt;
  }
  const std::optional<double> value = parse_number(text);
  constexpr double kLargest = 0x1p62;
  if (!value || *value < 0 || *value * factor > kLargest) return std::nullopt;
  return static_cast<std::int64_t>(*value * factor);
}

std::optional<std::int64_t> parse_micros(std::string_view text) {
  constexpr std::int64_t kDollarsMax = 1'000'000'000;
  const std::size_t point = std::min(text.find('.'), text.size());
  const std::string_view whole = text.substr(0, point);
  const std::string_view fraction = point < text.size() ? text.substr(point + 1) : "";
  const auto digits = [](std::string_view part) {
    return std::all_of(part.begin(), part.end(), is_digit);
  };
  if (whole.empty() || whole.size() > 10 || fraction.size() > 6 || !digits(whole) ||
      !digits(fraction) || (point < text.size() && fraction.empty()) ||
      (whole.size() > 1 && whole.front() == '0')) {
    return std::nullopt;
  }
  std::int64_t micros = 0;
  for (const char c : whole) micros = micros * 10 + (c - '0');
  if (micros > kDollarsMax) return std::nullopt;
  for (std::size_t i = 0; i < 6; ++i) {
    micros = micros * 10 + (i < fraction.size() ? fraction[i] - '0' : 0);
  }
  return micros;
}

std::string micros_text(std::int64_t micros) {
  std::string fraction = std::to_string(micros % 1'000'000);
  fraction.insert(0, 6 - fraction.size(), '0');
  while (!fraction.empty() && fraction.back() == '0') fraction.pop_back();
  return std::to_string(micros / 1'000'000) + (fraction.empty() ? "" : "." + fraction);
}

}  // namespace tailor
