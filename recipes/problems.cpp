#include "recipes/problems.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "base/text.h"

namespace tailor {
namespace {

constexpr std::size_t kShownWidth = 100;    // characters of a source line that are printed
constexpr std::size_t kShownProblems = 50;  // more help nobody, and a hostile file could have 1e5

/// Byte offset of character `index` (0-based) of UTF-8 `text`, at most its size.
std::size_t byte_of_character(std::string_view text, std::size_t index) {
  std::size_t at = 0;
  while (at < text.size() && index > 0) {
    ++at;
    while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0U) == 0x80U) ++at;
    --index;
  }
  return at;
}

struct ShownLine {
  std::string text;
  std::size_t caret;  ///< characters before the caret
};

/// `line` cut to a window around its 1-based `column`, so that a long line stays readable.
ShownLine window(std::string_view line, int column) {
  const auto caret = static_cast<std::size_t>(std::max(1, column)) - 1;
  const std::size_t from = caret > kShownWidth * 3 / 4 ? caret - kShownWidth / 2 : 0;
  const std::size_t begin = byte_of_character(line, from);
  const std::size_t length = byte_of_character(line.substr(begin), kShownWidth);
  ShownLine shown{from > 0 ? "..." : "", caret - from + (from > 0 ? 3 : 0)};
  shown.text += line.substr(begin, length);
  if (begin + length < line.size()) shown.text += "...";
  for (char& c : shown.text) {
    if (static_cast<unsigned char>(c) < 0x20) c = ' ';
  }
  if (!is_utf8(shown.text)) {
    for (char& c : shown.text) {
      if (static_cast<unsigned char>(c) >= 0x80) c = '?';
    }
  }
  return shown;
}

std::string_view line_of(std::string_view text, int line) {
  std::size_t begin = 0;
  for (int i = 1; i < line; ++i) {
    const std::size_t end = text.find('\n', begin);
    if (end == std::string_view::npos) return {};
    begin = end + 1;
  }
  std::string_view found = text.substr(begin, text.find('\n', begin) - begin);
  if (found.ends_with('\r')) found.remove_suffix(1);
  return found;
}

}  // namespace

std::string place_text(const Place& place) {
  if (!place.source) return {};
  if (place.source->is_override) return "override " + place.source->name;
  if (place.line == 0) return place.source->name;
  return place.source->name + ":" + std::to_string(place.line);
}

void Problems::add(std::string what, const Place& place, std::string key, std::string mend) {
  problems_.push_back({std::move(what), place, std::move(key), std::move(mend)});
}

std::string Problems::where_text(const Problem& problem) {
  const Place& place = problem.place;
  if (!place.source) return problem.key;
  if (place.source->is_override) {
    const ShownLine shown = window(line_of(place.source->text, 1), place.column);
    return "override " + shown.text + "\n" + std::string(9 + shown.caret, ' ') + "^";
  }
  std::string out = place_text(place);
  if (place.line > 0) out += ":" + std::to_string(place.column);
  if (!problem.key.empty()) out += " (" + problem.key + ")";
  if (place.line == 0) return out;
  const ShownLine shown = window(line_of(place.source->text, place.line), place.column);
  const std::string number = std::to_string(place.line);
  return out + "\n" + number + " | " + shown.text + "\n" + std::string(number.size(), ' ') + " | " +
         std::string(shown.caret, ' ') + "^";
}

void Problems::throw_if_any(Fault fault, const std::string& subject,
                            const std::string& mend) const {
  if (problems_.empty()) return;
  if (problems_.size() == 1) {
    const Problem& only = problems_.front();
    throw Error(fault, {only.what, where_text(only), only.mend});
  }
  // The file's problems in its order, then what belongs to no line, then the overrides' as given.
  std::vector<const Problem*> sorted;
  for (const Problem& problem : problems_) sorted.push_back(&problem);
  const auto rank = [](const Problem* p) {
    const bool is_override = p->place.source && p->place.source->is_override;
    return is_override ? 2 : p->place.line == 0 ? 1 : 0;
  };
  std::stable_sort(sorted.begin(), sorted.end(), [&](const Problem* a, const Problem* b) {
    if (rank(a) != rank(b)) return rank(a) < rank(b);
    if (rank(a) != 0) return false;
    return std::pair(a->place.line, a->place.column) < std::pair(b->place.line, b->place.column);
  });
  std::string where;
  for (std::size_t i = 0; i < std::min(sorted.size(), kShownProblems); ++i) {
    const std::string label = std::to_string(i + 1) + ". ";
    std::string entry = sorted[i]->what;
    if (const std::string place = where_text(*sorted[i]); !place.empty()) entry += "\n" + place;
    if (!sorted[i]->mend.empty()) entry += "\n" + sorted[i]->mend;
    if (i > 0) where += "\n";
    where += label;
    for (const char c : entry) {
      where += c;
      if (c == '\n') where += std::string(label.size(), ' ');
    }
  }
  if (sorted.size() > kShownProblems) {
    where += "\nand " + std::to_string(sorted.size() - kShownProblems) + " more";
  }
  throw Error(fault, {std::to_string(problems_.size()) + " problems in " + subject,
                      std::move(where), mend});
}

}  // namespace tailor
