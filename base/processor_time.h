#pragma once

#include <ctime>

namespace tailor {

/// Seconds that this process's threads have computed, all of them together, system calls included.
inline double processor_seconds() {
  timespec used{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
  return static_cast<double>(used.tv_sec) + static_cast<double>(used.tv_nsec) * 1e-9;
}

}  // namespace tailor
