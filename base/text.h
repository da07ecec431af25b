#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tailor {

/// "0 B", "512 B", "1.5 KB", "9.06 GB": decimal units, three significant digits.
std::string bytes_text(std::int64_t bytes);

/// "0.8 s", "12 s", "3 min 05 s", "2 h 07 min", "3 d 04 h".
std::string seconds_text(double seconds);

/// Micro-dollars as "$0.00012", "$0.012", "$1.19", "$1,234.50": at least two significant digits.
std::string usd_text(std::int64_t usd_micros);

/// Thousands separated: "1,234,567".
std::string count_text(std::int64_t count);

/// `value` with `digits` significant digits, no exponent between 1e-4 and 1e9: "0.3217", "1540".
std::string number_text(double value, int digits = 4);

/// Shortest decimal text that reads back as the same double ("0.1", "1e-08").
std::string exact_text(double value);

/// The candidate with the smallest edit distance to `name`, or empty when none is near
/// (distance above max(2, length / 3)). Case does not count.
std::string nearest_name(std::string_view name, std::span<const std::string> candidates);

/// Line `line` (1-based) of `source` with a caret under `column` (1-based):
///         21 |   device_memory: 27GiB
///            |                  ^
std::string source_excerpt(std::string_view source, int line, int column);

std::vector<std::string> split(std::string_view text, char separator);
std::string join(std::span<const std::string> parts, std::string_view separator);
std::string lower(std::string_view text);
std::string_view trim(std::string_view text);
/// True when `text` is well-formed UTF-8 (no overlong forms, no surrogates).
bool is_utf8(std::string_view text);

}  // namespace tailor
