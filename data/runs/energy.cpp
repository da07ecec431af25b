#include "data/runs/energy.h"

#include <algorithm>
#include <fstream>
#include <utility>

#include "base/text.h"
#include "data/runs/nvml.h"

namespace tailor {
namespace {

std::optional<std::int64_t> read_number(const fs::path& path) {
  std::ifstream file(path);
  std::int64_t value = 0;
  if (!(file >> value) || value < 0) return std::nullopt;
  return value;
}

std::string read_word(const fs::path& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

class RaplCounter final : public EnergyMeter::Counter {
 public:
  explicit RaplCounter(fs::path folder)
      : folder_(std::move(folder)),
        range_(read_number(folder_ / "max_energy_range_uj").value_or(0) / 1000) {}
  std::optional<std::int64_t> millijoules() override {
    const auto microjoules = read_number(folder_ / "energy_uj");
    if (!microjoules) return std::nullopt;
    return *microjoules / 1000;
  }
  std::int64_t range() const override { return range_; }

 private:
  fs::path folder_;
  std::int64_t range_;
};

class NvmlCounter final : public EnergyMeter::Counter {
 public:
  NvmlCounter(std::shared_ptr<Nvml> nvml, Nvml::Device device)
      : nvml_(std::move(nvml)), device_(device) {}
  std::optional<std::int64_t> millijoules() override {
    unsigned long long value = 0;
    if (nvml_->energy(device_, &value) != 0) return std::nullopt;
    return static_cast<std::int64_t>(value);
  }
  std::int64_t range() const override { return 0; }

 private:
  std::shared_ptr<Nvml> nvml_;
  Nvml::Device device_;
};

}  // namespace

EnergyMeter::EnergyMeter(std::vector<std::unique_ptr<Counter>> counters)
    : counters_(std::move(counters)), last_(counters_.size()) {
  for (std::size_t i = 0; i < counters_.size(); ++i) {
    const auto now = counters_[i]->millijoules();
    if (!now) {
      counters_.clear();
      return;
    }
    last_[i] = *now;
  }
}

EnergyMeter EnergyMeter::rapl(const fs::path& folder) {
  std::vector<std::unique_ptr<Counter>> counters;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    // Packages, and of their parts memory alone, which is the one not inside the package's figure.
    const std::string name = read_word(it->path() / "name");
    if (!it->path().filename().string().starts_with("intel-rapl:")) continue;
    if (name.starts_with("package-") || name == "dram") {
      counters.push_back(std::make_unique<RaplCounter>(it->path()));
    }
  }
  return EnergyMeter(std::move(counters));
}

EnergyMeter EnergyMeter::nvml(const std::vector<unsigned>& devices, const std::string& library) {
  const auto nvml = std::make_shared<Nvml>(library);
  if (!nvml->ready || nvml->energy == nullptr) return {};
  std::vector<std::unique_ptr<Counter>> counters;
  for (const unsigned number : devices) {
    Nvml::Device device = nullptr;
    if (nvml->device(number, &device) != 0) return {};
    counters.push_back(std::make_unique<NvmlCounter>(nvml, device));
  }
  return EnergyMeter(std::move(counters));
}

std::optional<std::int64_t> EnergyMeter::take_millijoules() {
  if (counters_.empty()) return std::nullopt;
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < counters_.size(); ++i) {
    const auto now = counters_[i]->millijoules();
    if (!now) {
      counters_.clear();
      return std::nullopt;
    }
    std::int64_t passed = *now - last_[i];
    if (passed < 0) passed = counters_[i]->range() > 0 ? passed + counters_[i]->range() : *now;
    sum += std::max<std::int64_t>(0, passed);
    last_[i] = *now;
  }
  return sum;
}

}  // namespace tailor
