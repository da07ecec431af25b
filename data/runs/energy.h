#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"

namespace tailor {

/// Counters of the energy that this machine's devices have taken up, where it has any that may be
/// read: NVML's of each GPU, RAPL's of the processor packages and their memory. What they count is
/// all that ran on those devices, ours or not.
class EnergyMeter {
 public:
  /// One counter in millijoules since some moment; may begin anew at `range`.
  class Counter {
   public:
    virtual ~Counter() = default;
    virtual std::optional<std::int64_t> millijoules() = 0;
    virtual std::int64_t range() const = 0;  ///< 0: does not wrap
  };

  /// RAPL's below `folder`; none where the kernel has none or only root may read them.
  static EnergyMeter rapl(const fs::path& folder = "/sys/class/powercap");
  /// NVML's of the GPUs `devices` (its numbers), by the driver's library; none where one of them
  /// cannot tell: half of a sum is no sum.
  static EnergyMeter nvml(const std::vector<unsigned>& devices,
                          const std::string& library = "libnvidia-ml.so.1");

  EnergyMeter() = default;
  bool measures() const { return !counters_.empty(); }
  /// Since the last call, or since it was made. Null: not measured, or no longer.
  std::optional<std::int64_t> take_millijoules();

 private:
  explicit EnergyMeter(std::vector<std::unique_ptr<Counter>> counters);

  std::vector<std::unique_ptr<Counter>> counters_;
  std::vector<std::int64_t> last_;
};

}  // namespace tailor
