#include "data/runs/busy.h"

#include <algorithm>
#include <utility>

#include "base/processor_time.h"
#include "data/runs/nvml.h"

namespace tailor {
namespace {

class Process final : public BusyMeter::Device {
 public:
  explicit Process(int threads)
      : threads_(std::max(1, threads)), last_seconds_(processor_seconds()) {}
  std::optional<double> busy_ms() override {
    const double now = processor_seconds();
    return 1e3 * (now - std::exchange(last_seconds_, now)) / threads_;
  }

 private:
  int threads_;
  double last_seconds_;
};

class Gpu final : public BusyMeter::Device {
 public:
  Gpu(std::shared_ptr<Nvml> nvml, Nvml::Device device) : nvml_(std::move(nvml)), device_(device) {
    readable_ = read(last_).has_value();  // what was before is not ours
  }
  bool readable() const { return readable_; }
  std::optional<double> busy_ms() override { return read(last_); }

 private:
  /// A sample stands for the time since the one before it. The driver keeps some 20 seconds of
  /// them.
  std::optional<double> read(unsigned long long& last) const {
    unsigned count = 0;
    int type = 0;
    int code = nvml_->samples(device_, Nvml::kUtilizationSamples, last, &type, &count, nullptr);
    if (code == Nvml::kNotFound || (code == 0 && count == 0)) return 0.0;
    if (code != 0) return std::nullopt;
    std::vector<Nvml::Sample> samples(count);
    code = nvml_->samples(device_, Nvml::kUtilizationSamples, last, &type, &count, samples.data());
    if (code == Nvml::kNotFound) return 0.0;
    if (code != 0 || count > samples.size()) return std::nullopt;
    samples.resize(count);
    double busy_us = 0;
    for (const Nvml::Sample& sample : samples) {
      if (sample.microseconds <= last) continue;
      const double percent = type == Nvml::kDouble ? sample.value.real : sample.value.whole;
      if (last > 0) {
        busy_us +=
            static_cast<double>(sample.microseconds - last) * std::clamp(percent, 0.0, 100.0) / 100;
      }
      last = sample.microseconds;
    }
    return busy_us / 1e3;
  }
  std::shared_ptr<Nvml> nvml_;
  Nvml::Device device_;
  unsigned long long last_ = 0;
  bool readable_ = false;
};

}  // namespace

BusyMeter::BusyMeter(std::vector<std::unique_ptr<Device>> devices) : devices_(std::move(devices)) {}

BusyMeter BusyMeter::process(int threads) {
  std::vector<std::unique_ptr<Device>> one;
  one.push_back(std::make_unique<Process>(threads));
  return BusyMeter(std::move(one));
}

BusyMeter BusyMeter::nvml(const std::vector<unsigned>& devices, const std::string& library) {
  const auto nvml = std::make_shared<Nvml>(library);
  if (!nvml->ready || nvml->samples == nullptr) return {};
  std::vector<std::unique_ptr<Device>> gpus;
  for (const unsigned number : devices) {
    Nvml::Device device = nullptr;
    if (nvml->device(number, &device) != 0) return {};
    auto gpu = std::make_unique<Gpu>(nvml, device);
    if (!gpu->readable()) return {};
    gpus.push_back(std::move(gpu));
  }
  return BusyMeter(std::move(gpus));
}

std::optional<double> BusyMeter::take_busy_ms() {
  if (devices_.empty()) return std::nullopt;
  double sum = 0;
  for (const auto& device : devices_) {
    const auto busy = device->busy_ms();
    if (!busy) {  // half of a sum is no sum
      devices_.clear();
      return std::nullopt;
    }
    sum += *busy;
  }
  return sum;
}

}  // namespace tailor
