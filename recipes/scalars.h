#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace tailor {

/// How an unquoted YAML scalar is taken. `ambiguous` are the words on which YAML 1.1 and 1.2
/// readers disagree: yes, no, on, off, y, n; 010, 0x10, 1_000, 12:30:45. We refuse those rather
/// than guess.
enum class ScalarMeaning { text, null, boolean, integer, number, not_finite, ambiguous };
ScalarMeaning scalar_meaning(std::string_view text);

/// A number in full: digits, point, exponent. Nothing when `text` is not one or overflows.
std::optional<double> parse_number(std::string_view text);

/// A whole number in digits, or with an exponent when it is whole (`1e3`).
std::optional<std::int64_t> parse_integer(std::string_view text);

/// "24GiB", "24 GB", "1.5TiB", "24000000": bytes, rounded down. Units: B, KB, MB, GB, TB, and KiB,
/// MiB, GiB, TiB. Nothing when it is none of these; a bare G or M is not, as it says not which of
/// the two.
std::optional<std::int64_t> parse_bytes(std::string_view text);

/// A non-negative decimal as millionths, exactly: "1.19" is 1'190'000. Nothing when it is not a
/// decimal without exponent, has more than six digits behind the point, or exceeds a billion.
std::optional<std::int64_t> parse_micros(std::string_view text);

/// Millionths as the shortest decimal that parse_micros() reads back: "1.19".
std::string micros_text(std::int64_t micros);

}  // namespace tailor
