#pragma once

#include <cstdint>
#include <ctime>
#include <string>

namespace tailor {

/// Where time comes from. Tests use a ManualClock; everything else RealClock.
class Clock {
 public:
  virtual ~Clock() = default;
  /// Milliseconds since 1970-01-01 UTC, for records people read. May jump.
  virtual std::int64_t unix_ms() const = 0;
  /// Milliseconds that never jump and count suspended time too (CLOCK_BOOTTIME): for cost.
  virtual std::int64_t steady_ms() const = 0;
};

class RealClock final : public Clock {
 public:
  std::int64_t unix_ms() const override { return read(CLOCK_REALTIME); }
  std::int64_t steady_ms() const override { return read(CLOCK_BOOTTIME); }

 private:
  static std::int64_t read(clockid_t id) {
    timespec now{};
    clock_gettime(id, &now);
    return std::int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
  }
};

/// Seconds since an arbitrary start, for timing code.
inline double seconds_now() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

/// "2026-11-23T22:37:39Z".
inline std::string utc_text(std::int64_t unix_ms) {
  const auto seconds = static_cast<time_t>(unix_ms / 1000);
  tm parts{};
  gmtime_r(&seconds, &parts);
  char buffer[32];
  const std::size_t n = std::strftime(buffer, sizeof buffer, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return {buffer, n};
}

}  // namespace tailor
