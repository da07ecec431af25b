#include "tools/compute/progress.h"

#include <unistd.h>

#include <cmath>
#include <cstdio>

#include "base/clock.h"
#include "base/text.h"

namespace tailor {

RunProgress::RunProgress(std::int64_t steps_total, std::int64_t steps_before)
    : steps_total_(steps_total),
      steps_before_(steps_before),
      terminal_(::isatty(STDERR_FILENO) == 1) {}

RunProgress::~RunProgress() {
  if (shown_) std::fputc('\n', stderr);
}

void RunProgress::clear() {
  if (shown_) std::fputs("\r\033[K", stderr);
  shown_ = false;
}

double RunProgress::tokens_per_second() const {
  return seconds_ > 0 ? static_cast<double>(tokens_) / seconds_ : 0;
}

void RunProgress::step(const StepRecord& record, std::optional<double> usd) {
  seconds_ += record.seconds;
  tokens_ += record.tokens;
  ++steps_;
  const bool last = record.step == steps_total_;
  const double now = seconds_now();
  if (!terminal_ && !last && steps_ != 1 && now - last_said_ < 10) return;
  last_said_ = now;
  const double left =
      static_cast<double>(steps_total_ - record.step) * seconds_ / static_cast<double>(steps_);
  std::string line = "step " + std::to_string(record.step) + "/" + std::to_string(steps_total_) +
                     "  loss " + number_text(record.loss) + "  grad norm " +
                     number_text(record.grad_norm, 3) + "  " + number_text(tokens_per_second(), 3) +
                     " tokens/s  ETA " + seconds_text(left);
  if (record.exchange_bytes() > 0) {
    line += "  exchange " + bytes_text(record.exchange_bytes()) + ", " +
            number_text(record.exchange_exposed_seconds, 2) + " s exposed";
  }
  if (usd) line += "  " + usd_text(static_cast<std::int64_t>(std::llround(*usd * 1e6)));
  if (terminal_) {
    std::fprintf(stderr, "\r\033[K%s", line.c_str());
    shown_ = true;
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  std::fflush(stderr);
}

void RunProgress::say(const std::string& text) {
  clear();
  std::fprintf(stderr, "%s\n", text.c_str());
}

}  // namespace tailor
