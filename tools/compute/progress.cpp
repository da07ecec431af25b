#include "tools/compute/progress.h"

#include <unistd.h>

#include <cstdio>

#include "base/clock.h"
#include "base/text.h"

namespace tailor {

RunProgress::RunProgress(std::int64_t steps_total, std::int64_t steps_before)
    : block_(STDERR_FILENO), steps_before_(steps_before), began_(seconds_now()) {
  figures_.steps_total = steps_total;
  figures_.step = steps_before;
}

void RunProgress::step(const StepRecord& record, const LiveMoney& money) {
  seconds_ += record.seconds;
  stall_seconds_ += record.stall_seconds;
  tokens_ += record.tokens;
  figures_.step = record.step;
  figures_.doing.clear();
  figures_.loss = record.loss;
  figures_.tokens_per_second = seconds_ > 0 ? static_cast<double>(tokens_) / seconds_ : 0;
  figures_.stall_share = seconds_ > 0 ? stall_seconds_ / seconds_ : 0;
  if (record.exchange_bytes() > 0) {
    figures_.exchange = bytes_text(record.exchange_bytes()) + ", " +
                        number_text(record.exchange_exposed_seconds, 2) + " s exposed";
  }
  // By the clock: evaluations and checkpoints go on taking their share.
  const double elapsed = seconds_now() - began_;
  figures_.seconds_left = elapsed / static_cast<double>(record.step - steps_before_) *
                          static_cast<double>(figures_.steps_total - record.step);
  static_cast<LiveMoney&>(figures_) = money;
  show(record.step == figures_.steps_total || record.step == steps_before_ + 1);
}

void RunProgress::doing(const std::string& what) {
  figures_.doing = what;
  if (block_.possible() && figures_.step > steps_before_) show(true);
}

void RunProgress::evaluation(std::int64_t step, const Evaluation& result) {
  figures_.doing.clear();
  figures_.held_out_loss = result.loss;
  figures_.held_out_step = step;
  say("evaluation after step " + std::to_string(step) + ": loss " + number_text(result.loss) +
      ", token accuracy " + number_text(100 * result.token_accuracy, 3) + " %");
}

void RunProgress::show(bool now) {
  const double time = seconds_now();
  if (!now && time - last_shown_ < (block_.possible() ? 0.1 : 10)) return;
  last_shown_ = time;
  if (block_.possible()) {
    block_.draw(live_lines(figures_, block_.style()));
  } else {
    std::fprintf(stderr, "%s\n", live_line(figures_).c_str());
  }
}

void RunProgress::say(const std::string& text) {
  block_.clear();
  std::fprintf(stderr, "%s\n", text.c_str());
  if (block_.possible() && figures_.step > steps_before_) show(true);
}

}  // namespace tailor
