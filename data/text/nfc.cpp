#include "data/text/nfc.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "data/text/unicode.h"

namespace tailor {
namespace {

struct Range {
  char32_t first, last;
};
struct ClassRange {
  char32_t first, last;
  unsigned char combining_class;
};
struct Decomposition {
  char32_t from, first, second;  ///< second 0: a singleton
};
struct Composition {
  char32_t first, second, to;
};

#include "data/text/nfc_tables.inc"

/// Hangul syllables are composed by arithmetic (The Unicode Standard, section 3.12).
constexpr char32_t kSyllable = 0xAC00, kLead = 0x1100, kVowel = 0x1161, kTail = 0x11A7;
constexpr char32_t kLeads = 19, kVowels = 21, kTails = 28;

template <class Table>
const auto* find_range(const Table& table, char32_t point) {
  const auto* found =
      std::upper_bound(std::begin(table), std::end(table), point,
                       [](char32_t value, const auto& r) { return value < r.first; });
  if (found == std::begin(table)) return static_cast<decltype(found)>(nullptr);
  --found;
  return point <= found->last ? found : nullptr;
}

/// A stable character neither changes, nor joins what stands before it: texts can be cut there.
bool is_stable(char32_t point) { return point < 0x300 || find_range(kUnstable, point) == nullptr; }

unsigned char combining_class(char32_t point) {
  const auto* found = find_range(kCombiningClass, point);
  return found == nullptr ? 0 : found->combining_class;
}

void decompose(char32_t point, std::vector<char32_t>& out) {
  if (point >= kSyllable && point < kSyllable + kLeads * kVowels * kTails) {
    const char32_t index = point - kSyllable;
    out.push_back(kLead + index / (kVowels * kTails));
    out.push_back(kVowel + index % (kVowels * kTails) / kTails);
    if (index % kTails != 0) out.push_back(kTail + index % kTails);
    return;
  }
  const auto* found =
      std::lower_bound(std::begin(kDecompositions), std::end(kDecompositions), point,
                       [](const Decomposition& d, char32_t value) { return d.from < value; });
  if (found == std::end(kDecompositions) || found->from != point) {
    out.push_back(point);
    return;
  }
  decompose(found->first, out);
  if (found->second != 0) decompose(found->second, out);
}

/// The character that `first` and `second` make together, 0 for none.
char32_t compose(char32_t first, char32_t second) {
  if (first >= kLead && first < kLead + kLeads && second >= kVowel && second < kVowel + kVowels) {
    return kSyllable + ((first - kLead) * kVowels + (second - kVowel)) * kTails;
  }
  if (first >= kSyllable && first < kSyllable + kLeads * kVowels * kTails &&
      (first - kSyllable) % kTails == 0 && second > kTail && second < kTail + kTails) {
    return first + (second - kTail);
  }
  const auto* found =
      std::lower_bound(std::begin(kCompositions), std::end(kCompositions), std::pair{first, second},
                       [](const Composition& c, const auto& pair) {
                         return std::pair{c.first, c.second} < pair;
                       });
  const bool match =
      found != std::end(kCompositions) && found->first == first && found->second == second;
  return match ? found->to : 0;
}

void normalize_segment(std::string_view segment, std::string& out) {
  std::vector<char32_t> points;
  for (std::size_t at = 0; at < segment.size();) {
    const CodePoint point = code_point_at(segment, at);
    decompose(point.value, points);
    at += point.bytes;
  }
  // Canonical order: runs of combining marks are sorted by their class, stably.
  for (std::size_t i = 0; i < points.size();) {
    if (combining_class(points[i]) == 0) {
      ++i;
      continue;
    }
    std::size_t end = i;
    while (end < points.size() && combining_class(points[end]) != 0) ++end;
    std::stable_sort(points.begin() + static_cast<std::ptrdiff_t>(i),
                     points.begin() + static_cast<std::ptrdiff_t>(end), [](char32_t a, char32_t b) {
                       return combining_class(a) < combining_class(b);
                     });
    i = end;
  }
  // A mark joins the last starter unless one of its class, or another starter, stands between.
  constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  std::vector<char32_t> composed;
  std::size_t starter = kNone;
  int last_class = -1;
  for (const char32_t point : points) {
    const int here = combining_class(point);
    if (starter != kNone && last_class < here) {
      if (const char32_t joined = compose(composed[starter], point); joined != 0) {
        composed[starter] = joined;
        continue;
      }
    }
    composed.push_back(point);
    if (here == 0) {
      starter = composed.size() - 1;
      last_class = -1;
    } else {
      last_class = here;
    }
  }
  for (const char32_t point : composed) append_utf8(out, point);
}

}  // namespace

std::string to_nfc(std::string_view text) {
  std::vector<ByteRange> none;
  return to_nfc(text, none);
}

std::string to_nfc(std::string_view text, std::vector<ByteRange>& ranges) {
  std::string out;
  out.reserve(text.size());
  std::vector<ByteRange> moved;
  const auto put_range = [&](std::size_t begin, std::size_t end) {
    if (begin == end) return;
    if (!moved.empty() && moved.back().end == begin) {
      moved.back().end = end;
    } else {
      moved.push_back({begin, end});
    }
  };
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = at + code_point_at(text, at).bytes;
    const bool begins_stable = is_stable(code_point_at(text, at).value);
    while (end < text.size()) {
      const CodePoint point = code_point_at(text, end);
      if (is_stable(point.value)) break;
      end += point.bytes;
    }
    const std::size_t begin = out.size();
    if (begins_stable && end == at + code_point_at(text, at).bytes) {
      out += text.substr(at, end - at);
    } else {
      normalize_segment(text.substr(at, end - at), out);
    }
    if (overlaps(ranges, {at, end})) put_range(begin, out.size());
    at = end;
  }
  // Ranges that touch were one or stood side by side: for protection the same thing.
  ranges = std::move(moved);
  return out;
}

}  // namespace tailor
