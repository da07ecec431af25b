#include "tools/terminal.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>

#include "base/clock.h"
#include "base/text.h"

namespace tailor {

bool moves_cursor(int descriptor) {
  const char* term = std::getenv("TERM");
  if (term != nullptr && std::string_view(term) == "dumb") return false;
  return isatty(descriptor) == 1;
}

bool takes_colour(int descriptor) {
  const char* no_colour = std::getenv("NO_COLOR");
  if (no_colour != nullptr && *no_colour != '\0') return false;
  return moves_cursor(descriptor);
}

std::string heading(std::string_view text) {
  if (!takes_colour(STDOUT_FILENO)) return std::string(text);
  return "\033[1m" + std::string(text) + "\033[0m";
}

ProgressLine::ProgressLine(bool say_elsewhere)
    : terminal_(isatty(STDERR_FILENO) == 1),
      say_elsewhere_(say_elsewhere),
      last_(terminal_ ? 0 : seconds_now()) {}

ProgressLine::~ProgressLine() {
  if (shown_) std::cerr << "\r\033[K" << std::flush;
}

void ProgressLine::show(const std::string& text) {
  const double now = seconds_now();
  if (!terminal_) {
    if (!say_elsewhere_ || now - last_ < 10) return;
    last_ = now;
    say(text);
    return;
  }
  if (shown_ && now - last_ < 0.1) return;
  last_ = now;
  shown_ = true;
  std::cerr << "\r\033[K" << text << std::flush;
}

void ProgressLine::say(const std::string& text) {
  if (shown_) std::cerr << "\r\033[K";
  shown_ = false;
  std::cerr << text << std::endl;
}

std::string progress_text(std::string_view doing, std::int64_t done, std::int64_t before,
                          std::int64_t bytes, double seconds) {
  const double share = bytes > 0 ? static_cast<double>(done) / static_cast<double>(bytes) : 1;
  std::string text =
      std::string(doing) + " " + number_text(100 * share, 3) + " % of " + bytes_text(bytes);
  const auto mine = static_cast<double>(done - before);
  if (seconds > 1 && mine > 0) {
    const double rate = mine / seconds;
    text += ", " + bytes_text(static_cast<std::int64_t>(rate)) + "/s, " +
            seconds_text(static_cast<double>(bytes - done) / rate) + " to go";
  }
  return text;
}

std::string problems_text(const std::vector<std::string>& problems) {
  constexpr std::size_t kShown = 20;
  std::string text;
  for (std::size_t i = 0; i < std::min(kShown, problems.size()); ++i) text += problems[i] + "\n";
  if (problems.size() > kShown) {
    text += "and " + count_text(static_cast<std::int64_t>(problems.size() - kShown)) +
            " more; --json lists them all\n";
  }
  return text;
}

}  // namespace tailor
