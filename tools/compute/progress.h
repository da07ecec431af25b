#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "trainer/trainer.h"

namespace tailor {

/// A run's progress on stderr: one line that overwrites itself on a terminal, elsewhere a plain
/// line every ten seconds and at the end.
class RunProgress {
 public:
  RunProgress(std::int64_t steps_total, std::int64_t steps_before);
  ~RunProgress();
  RunProgress(const RunProgress&) = delete;
  RunProgress& operator=(const RunProgress&) = delete;

  /// usd: the run so far, all attempts; null where no price is known.
  void step(const StepRecord& record, std::optional<double> usd);
  /// A line of its own, the progress line kept below.
  void say(const std::string& text);
  double tokens_per_second() const;

 private:
  void clear();
  std::int64_t steps_total_, steps_before_;
  bool terminal_, shown_ = false;
  double last_said_ = 0;
  double seconds_ = 0;
  std::int64_t steps_ = 0, tokens_ = 0;
};

}  // namespace tailor
