#include "tools/interrupt.h"

#include <csignal>

namespace tailor {
namespace {

volatile std::sig_atomic_t asked_to_stop = 0;

extern "C" void on_stop_signal(int number) {
  asked_to_stop = 1;
  std::signal(number, SIG_DFL);  // the second one ends the process
}

}  // namespace

Interrupt::Interrupt() {
  asked_to_stop = 0;
  std::signal(SIGINT, on_stop_signal);
  std::signal(SIGTERM, on_stop_signal);
}

Interrupt::~Interrupt() {
  std::signal(SIGINT, SIG_DFL);
  std::signal(SIGTERM, SIG_DFL);
}

bool Interrupt::asked() const { return asked_to_stop != 0; }

}  // namespace tailor
