#pragma once

#include <cstdint>
#include <string>

#include "tools/live_block.h"
#include "trainer/trainer.h"

namespace tailor {

/// A run's progress on stderr: a live block on a terminal, elsewhere a plain line every ten seconds
/// and at the end.
class RunProgress {
 public:
  RunProgress(std::int64_t steps_total, std::int64_t steps_before);

  void step(const StepRecord& record, const LiveMoney& money);
  /// After a step, what takes time besides training: "evaluating", "saving".
  void doing(const std::string& what);
  void evaluation(std::int64_t step, const Evaluation& result);
  /// A line of its own, the block kept below.
  void say(const std::string& text);

 private:
  void show(bool now);
  LiveFigures figures_;
  LiveBlock block_;
  std::int64_t steps_before_;
  double began_, last_shown_ = 0;
  double seconds_ = 0, stall_seconds_ = 0;
  std::int64_t tokens_ = 0;
};

}  // namespace tailor
