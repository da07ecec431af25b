#include "data/runs/nvml.h"

#include <dlfcn.h>

#include <type_traits>

namespace tailor {

Nvml::Nvml(const std::string& library)
    : library_(::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (library_ == nullptr) return;
  const auto find = [this](auto& function, const char* name) {
    function =
        reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library_, name));
  };
  find(init, "nvmlInit_v2");
  find(shutdown, "nvmlShutdown");
  find(device, "nvmlDeviceGetHandleByIndex_v2");
  find(energy, "nvmlDeviceGetTotalEnergyConsumption");
  find(samples, "nvmlDeviceGetSamples");
  ready = init != nullptr && shutdown != nullptr && device != nullptr && init() == 0;
}

Nvml::~Nvml() {
  if (ready) shutdown();
  if (library_ != nullptr) ::dlclose(library_);
}

}  // namespace tailor
