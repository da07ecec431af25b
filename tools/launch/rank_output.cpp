#include "tools/launch/rank_output.h"

namespace tailor {
namespace {

constexpr std::size_t kLineBytesMax = 64UL << 10U;
constexpr std::size_t kTailBytes = 64UL << 10U;

}  // namespace

std::string RankLines::add(std::string_view bytes) {
  std::string out;
  while (!bytes.empty()) {
    const std::size_t end = bytes.find('\n');
    const std::size_t room = kLineBytesMax - rest_.size();
    if (end == std::string_view::npos && bytes.size() < room) {
      rest_ += bytes;
      break;
    }
    const bool whole = end != std::string_view::npos && end <= room;
    const std::size_t take = whole ? end : room;
    out += prefix_ + rest_;
    out += bytes.substr(0, take);
    out += '\n';
    rest_.clear();
    bytes.remove_prefix(take + (whole ? 1 : 0));
  }
  return out;
}

std::string RankLines::finish() {
  if (rest_.empty()) return "";
  std::string out = prefix_ + rest_ + "\n";
  rest_.clear();
  return out;
}

void TailText::add(std::string_view bytes) {
  kept_ += bytes;
  if (kept_.size() > 2 * kTailBytes) {
    kept_.erase(0, kept_.size() - kTailBytes);
    cut_ = true;
  }
}

std::string TailText::text() const {
  std::string out = kept_;
  bool cut = cut_;
  if (out.size() > kTailBytes) {
    out.erase(0, out.size() - kTailBytes);
    cut = true;
  }
  if (cut) {
    const std::size_t line = out.find('\n');
    if (line != std::string::npos) out.erase(0, line + 1);
  }
  return out;
}

}  // namespace tailor
