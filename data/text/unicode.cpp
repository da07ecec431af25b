#include "data/text/unicode.h"

#include <array>

namespace tailor {
namespace {

/// How many bytes a character that starts with `lead` has, 0 for a byte that starts none; and the
/// range its second byte must lie in.
struct Form {
  std::size_t length;
  unsigned char second_min, second_max;
};

Form form_of(unsigned char lead) {
  if (lead < 0x80) return {1, 0, 0};
  if (lead < 0xC2 || lead > 0xF4) return {0, 0, 0};
  if (lead < 0xE0) return {2, 0x80, 0xBF};
  if (lead < 0xF0) {
    const unsigned char low = lead == 0xE0 ? 0xA0 : 0x80;
    const unsigned char high = lead == 0xED ? 0x9F : 0xBF;
    return {3, low, high};
  }
  const unsigned char low = lead == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xF4 ? 0x8F : 0xBF;
  return {4, low, high};
}

/// Bytes at `at` that belong together: a whole character (`whole`) or a maximal ill-formed part.
struct Part {
  std::size_t bytes;
  bool whole;
  bool cut_off;  ///< ill-formed only because the text ends here
};

Part part_at(std::string_view text, std::size_t at) {
  const Form form = form_of(static_cast<unsigned char>(text[at]));
  if (form.length == 0) return {1, false, false};
  for (std::size_t k = 1; k < form.length; ++k) {
    if (at + k == text.size()) return {k, false, true};
    const auto byte = static_cast<unsigned char>(text[at + k]);
    const unsigned char low = k == 1 ? form.second_min : 0x80;
    const unsigned char high = k == 1 ? form.second_max : 0xBF;
    if (byte < low || byte > high) return {k, false, false};
  }
  return {form.length, true, false};
}

/// Byte of each character of the alphabet, -1 for others; characters reach up to U+0143.
std::array<int, 0x144> make_alphabet() {
  std::array<int, 0x144> byte_of{};
  byte_of.fill(-1);
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    byte_of[static_cast<std::size_t>(printable ? byte : next++)] = byte;
  }
  return byte_of;
}

int byte_of(char32_t character) {
  static const std::array<int, 0x144> alphabet = make_alphabet();
  return character < alphabet.size() ? alphabet[character] : -1;
}

}  // namespace

std::size_t complete_utf8_prefix(std::string_view bytes) {
  std::size_t at = bytes.size() > 3 ? bytes.size() - 3 : 0;
  while (at > 0 && (static_cast<unsigned char>(bytes[at]) & 0xC0) == 0x80) --at;
  while (at < bytes.size()) {
    const Part part = part_at(bytes, at);
    if (part.cut_off) return at;
    at += part.bytes;
  }
  return bytes.size();
}

std::string replace_ill_formed(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (std::size_t at = 0; at < bytes.size();) {
    const Part part = part_at(bytes, at);
    if (part.whole) {
      out += bytes.substr(at, part.bytes);
    } else {
      out += "\xEF\xBF\xBD";
    }
    at += part.bytes;
  }
  return out;
}

bool in_byte_alphabet(std::string_view token) {
  for (std::size_t at = 0; at < token.size();) {
    const CodePoint point = code_point_at(token, at);
    if (byte_of(point.value) < 0) return false;
    at += point.bytes;
  }
  return true;
}

std::string from_byte_alphabet(std::string_view token) {
  std::string out;
  for (std::size_t at = 0; at < token.size();) {
    const CodePoint point = code_point_at(token, at);
    const int byte = byte_of(point.value);
    if (byte < 0) return std::string(token);
    out += static_cast<char>(static_cast<unsigned char>(byte));
    at += point.bytes;
  }
  return out;
}

}  // namespace tailor
