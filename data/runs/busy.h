#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tailor {

/// How long the devices that a run holds were at work: of GPUs the time in which a kernel ran, as
/// NVML samples it; of the CPU the processor time of this process over its threads.
class BusyMeter {
 public:
  /// One device's time.
  class Device {
   public:
    virtual ~Device() = default;
    /// At work since the last call, or since it was made; null: no longer known.
    virtual std::optional<double> busy_ms() = 0;
  };

  /// This process as one device of `threads` cores.
  static BusyMeter process(int threads);
  /// The GPUs `devices` (NVML's numbers), by the driver's library; none where one of them cannot
  /// tell. What is counted is all that ran on them, ours or not.
  static BusyMeter nvml(const std::vector<unsigned>& devices,
                        const std::string& library = "libnvidia-ml.so.1");

  BusyMeter() = default;
  bool measures() const { return !devices_.empty(); }
  /// Of all devices together, since the last call, or since it was made. Null: not measured, or no
  /// longer.
  std::optional<double> take_busy_ms();

 private:
  explicit BusyMeter(std::vector<std::unique_ptr<Device>> devices);

  std::vector<std::unique_ptr<Device>> devices_;
};

}  // namespace tailor
