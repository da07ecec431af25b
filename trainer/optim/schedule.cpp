#include "trainer/optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tailor {

double Schedule::at(std::int64_t step) const {
  if (step < warmup_steps) {
    // transformers begins at 0 / warm-up, a first step that does nothing; ours is one notch up.
    return learning_rate * static_cast<double>(step + 1) / static_cast<double>(warmup_steps);
  }
  const auto left = static_cast<double>(std::max<std::int64_t>(1, steps - warmup_steps));
  const double progress = std::min(1.0, static_cast<double>(step - warmup_steps) / left);
  switch (kind) {
    case ScheduleKind::constant:
      return learning_rate;
    case ScheduleKind::linear:
      return learning_rate * (1 - progress);
    case ScheduleKind::cosine:
      return learning_rate * 0.5 * (1 + std::cos(std::numbers::pi * progress));
  }
  return learning_rate;
}

}  // namespace tailor
