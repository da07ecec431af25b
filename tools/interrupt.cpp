#include "tools/interrupt.h"

#include <csignal>

namespace tailor {
namespace {

volatile std::sig_atomic_t asked_to_stop = 0;

extern "C" void on_stop_signal(int number) {
  asked_to_stop = 1;
  std::signal(number, SIG_DFL);  // the second one ends the process
}

// The scheduler's warning that time runs out: it may come again, and SIGTERM may follow.
extern "C" void on_warning_signal(int) { asked_to_stop = 1; }

}  // namespace

Interrupt::Interrupt() {
  asked_to_stop = 0;
  std::signal(SIGINT, on_stop_signal);
  std::signal(SIGTERM, on_stop_signal);
  std::signal(SIGUSR1, on_warning_signal);
}

Interrupt::~Interrupt() {
  std::signal(SIGINT, SIG_DFL);
  std::signal(SIGTERM, SIG_DFL);
  std::signal(SIGUSR1, SIG_IGN);  // a late warning must not end a process that has saved
}

bool Interrupt::asked() const { return asked_to_stop != 0; }

}  // namespace tailor
