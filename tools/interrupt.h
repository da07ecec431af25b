#pragma once

namespace tailor {

/// Ctrl-C and SIGTERM ask the run to stop after the step it is in, saving first; a second one ends
/// it at once. SIGUSR1 asks the same, as often as it comes: Slurm's --signal before a time limit,
/// whose SIGTERM then may still be the first. Construct once; asked() may be polled from the loop.
class Interrupt {
 public:
  Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;
  ~Interrupt();  ///< restores what was there; from then on SIGUSR1 is ignored
  bool asked() const;
};

}  // namespace tailor
