#include "tools/terminal.h"

#include <unistd.h>

#include <cstdlib>
#include <iostream>

#include "base/clock.h"

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

}  // namespace tailor
