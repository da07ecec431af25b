#pragma once

#include <string>

namespace tailor {

/// The few functions of NVML that are needed, by their C names (nvml.h of the CUDA toolkit), from
/// the driver's library where that is at hand.
struct Nvml {
  using Device = void*;
  struct Sample {
    unsigned long long microseconds = 0;  ///< of the system's clock
    union {
      double real;
      unsigned int whole;
      unsigned long long longest;  ///< of nvmlValue_t
    } value{};
  };
  static constexpr int kNotFound = 6;            ///< no sample since
  static constexpr int kUtilizationSamples = 1;  ///< percent of the time a kernel ran
  static constexpr int kDouble = 0;              ///< type of a sample's value

  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*device)(unsigned, Device*) = nullptr;
  int (*energy)(Device, unsigned long long* millijoules) = nullptr;
  int (*samples)(Device, int kind, unsigned long long since, int* type, unsigned* count,
                 Sample*) = nullptr;
  bool ready = false;  ///< init() was called and succeeded

  explicit Nvml(const std::string& library);
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;
  ~Nvml();

 private:
  void* library_ = nullptr;
};

}  // namespace tailor
