#pragma once

namespace tailor {

/// How much of this machine's cores others use from its making on.
class OthersBusy {
 public:
  OthersBusy();
  /// Share of all cores' time, 0 to 1, that neither lay idle nor was this process's.
  double share() const;

 private:
  struct Times {
    double busy = 0, all = 0;  ///< of all cores together, seconds
    double own = 0;            ///< of this process
  };
  static Times now();
  Times began_;
};

}  // namespace tailor
