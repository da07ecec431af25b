#include <cstdint>
#include <string>
#include <string_view>

#include "base/text.h"
#include "data/runs/chart.h"
#include "data/runs/table.h"

namespace tailor {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

/// Bytes of the UTF-8 sequence that `text` begins with; 0 where it begins with none.
std::size_t sequence_length(std::string_view text) {
  for (std::size_t length = 1; length <= 4 && length <= text.size(); ++length) {
    if (is_utf8(text.substr(0, length))) return length;
  }
  return 0;
}

/// Control characters have no place in a page, and characters that turn the direction of writing
/// could make a name look like another one. Sequences U+0080 to U+009F begin with C2.
bool is_unseen(std::string_view sequence) {
  const auto first = static_cast<unsigned char>(sequence.front());
  if (sequence.size() == 1) {
    return (first < 0x20 && first != '\n' && first != '\t') || first == 0x7F;
  }
  const auto second = static_cast<unsigned char>(sequence[1]);
  if (sequence.size() == 2) return first == 0xC2 && second < 0xA0;
  if (sequence.size() != 3) return false;
  const auto third = static_cast<unsigned char>(sequence[2]);
  const bool turns = first == 0xE2 && ((second == 0x80 && third >= 0xAA && third <= 0xAE) ||
                                       (second == 0x81 && third >= 0xA6 && third <= 0xA9));
  return turns || (first == 0xEF && second == 0xBF && third >= 0xBE);  // U+FFFE, U+FFFF
}

/// `text` by UTF-8 sequences; those unfit to be shown come as U+FFFD.
template <class Use>
void for_each_sequence(std::string_view text, const Use& use) {
  while (!text.empty()) {
    const std::size_t length = sequence_length(text);
    const std::string_view sequence = text.substr(0, length == 0 ? 1 : length);
    text.remove_prefix(sequence.size());
    use(length == 0 || is_unseen(sequence) ? kReplacement : sequence);
  }
}

}  // namespace

std::string escape_html(const std::string& text) {
  std::string out;
  for_each_sequence(text, [&](std::string_view sequence) {
    switch (sequence.front()) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += sequence;
    }
  });
  return out;
}

std::string visible_text(std::string_view text) {
  std::string out;
  for_each_sequence(text, [&](std::string_view sequence) {
    out += sequence == "\n" || sequence == "\t" ? " " : sequence;
  });
  return out;
}

}  // namespace tailor
