#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tailor {

struct CodePoint {
  char32_t value = 0;
  std::size_t bytes = 0;
};

/// The character that starts at text[at], which must be well-formed UTF-8 there.
inline CodePoint code_point_at(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t k) {
    return static_cast<char32_t>(static_cast<unsigned char>(text[at + k]));
  };
  const char32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xE0) return {((lead & 0x1F) << 6U) | (byte(1) & 0x3F), 2};
  if (lead < 0xF0) {
    return {((lead & 0x0F) << 12U) | ((byte(1) & 0x3F) << 6U) | (byte(2) & 0x3F), 3};
  }
  return {((lead & 0x07) << 18U) | ((byte(1) & 0x3F) << 12U) | ((byte(2) & 0x3F) << 6U) |
              (byte(3) & 0x3F),
          4};
}

/// Appends `value` as UTF-8.
inline void append_utf8(std::string& out, char32_t value) {
  const auto put = [&](char32_t byte) {
    out += static_cast<char>(static_cast<unsigned char>(byte));
  };
  if (value < 0x80) {
    put(value);
  } else if (value < 0x800) {
    put(0xC0 | (value >> 6U));
    put(0x80 | (value & 0x3F));
  } else if (value < 0x10000) {
    put(0xE0 | (value >> 12U));
    put(0x80 | ((value >> 6U) & 0x3F));
    put(0x80 | (value & 0x3F));
  } else {
    put(0xF0 | (value >> 18U));
    put(0x80 | ((value >> 12U) & 0x3F));
    put(0x80 | ((value >> 6U) & 0x3F));
    put(0x80 | (value & 0x3F));
  }
}

/// Length of the longest prefix of `bytes` that does not end inside a UTF-8 character which more
/// bytes could complete. Ill-formed bytes count as complete.
std::size_t complete_utf8_prefix(std::string_view bytes);

/// `bytes` with each maximal ill-formed part replaced by U+FFFD (Unicode 15, section 3.9, "U+FFFD
/// substitution of maximal subparts"; the same as Rust's String::from_utf8_lossy).
std::string replace_ill_formed(std::string_view bytes);

/// "Byte-level" alphabet of GPT-2: every byte written as one printable character. The bytes that
/// `token` stands for; `token` itself where a character is not of that alphabet (as Hugging Face's
/// ByteLevel decoder does).
std::string from_byte_alphabet(std::string_view token);
/// True when every character of `token` is of the byte alphabet.
bool in_byte_alphabet(std::string_view token);

}  // namespace tailor
