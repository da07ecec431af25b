#pragma once

#include <cstdint>

namespace tailor {

enum class ScheduleKind { constant, linear, cosine };

/// Learning rate by step: rises linearly over
/// `warmup_steps` (step s: (s + 1) / warm-up), then constant, linearly to 0, or half a cosine to
/// 0, over the steps that are left. A function of the step alone, so resuming is exact.
struct Schedule {
  ScheduleKind kind = ScheduleKind::cosine;
  double learning_rate = 1e-4;
  std::int64_t warmup_steps = 0;
  std::int64_t steps = 1;

  double at(std::int64_t step) const;
};

}  // namespace tailor
