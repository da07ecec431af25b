#include <unistd.h>

#include <cmath>
#include <iostream>

#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/runs/ledger.h"
#include "recipes/machine.h"
#include "tools/machine_facts.h"
#include "tools/paths.h"
#include "tools/planning.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"
#include "trainer/cuda/devices.h"

namespace tailor {
namespace {

/// One thing looked at. `mend` is empty where nothing is to be done.
struct Check {
  std::string name;
  bool ok = true;
  std::string found, mend;
};

fs::path existing_parent(fs::path path) {
  std::error_code error;
  while (!fs::exists(path, error) && path.has_relative_path()) path = path.parent_path();
  return path;
}

/// Free bytes of the disk `path` is or will be on; -1 where that is not known.
std::int64_t free_bytes(const fs::path& path) {
  std::error_code error;
  const fs::space_info space = fs::space(existing_parent(path), error);
  return error ? -1 : static_cast<std::int64_t>(space.available);
}

Check check_compute() {
  try {
    return {"tailor-compute", true, sibling_program("tailor-compute").string(), ""};
  } catch (const Error& error) {
    return {"tailor-compute", false, error.parts().what, error.parts().mend};
  }
}

Check check_torch() {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(fs::path(TAILOR_VENV) / "lib", error)) {
    const fs::path library = entry.path() / "site-packages/torch/lib/libtorch_cpu.so";
    std::error_code one;
    if (fs::exists(library, one)) return {"LibTorch", true, library.string(), ""};
  }
  return {"LibTorch", false, "not in " + std::string(TAILOR_VENV), "Run: tools/setup"};
}

Check check_calibration() {
  const auto found = MachineCalibration::read();
  if (!found) {
    return {"calibration", false, "what a training step reaches on this machine was not measured",
            "Run: tailor calibrate"};
  }
  return {"calibration", true,
          "bfloat16 " + number_text(found->gflops_bfloat16, 3) + " GFLOP/s, float32 " +
              number_text(found->gflops_float32, 3) + " GFLOP/s, measured " + found->measured,
          ""};
}

Check check_ledger(std::size_t& runs) {
  const std::string place = Ledger::default_place();
  try {
    const RealClock clock;
    const auto ledger = Ledger::open_existing(place, clock);
    if (!ledger) return {"ledger", true, place + " (made by the first run)", ""};
    runs = ledger->runs().size();
    return {"ledger", true, place + ", " + std::to_string(runs) + (runs == 1 ? " run" : " runs"),
            ""};
  } catch (const Error& error) {
    return {"ledger", false, error.parts().what + ": " + place, error.parts().mend};
  }
}

Check check_recipes() {
  const fs::path folder = recipes_folder();
  std::error_code error;
  if (fs::exists(folder / "prices.yaml", error)) return {"recipes", true, folder.string(), ""};
  return {"recipes", false, "no recipes in " + folder.string(),
          "Set TAILOR_RECIPES to the folder recipes/ of Tailor's sources."};
}

Check check_folder(const std::string& name, const fs::path& folder) {
  const fs::path there = existing_parent(folder);
  const bool writable = ::access(there.c_str(), W_OK) == 0;
  return {name, writable,
          folder.string() + ", " + bytes_text(std::max<std::int64_t>(0, free_bytes(folder))) +
              " free" + (writable ? "" : ", not writable"),
          writable ? ""
                   : "Make it writable, or set " +
                         std::string(name == "cache" ? "TAILOR_CACHE" : "TAILOR_DATA") +
                         " to another folder."};
}

std::string cuda_text(const CudaFacts& cuda) {
  if (!cuda.compiled) return cuda.problem;
  const std::string built = "toolkit " + cuda.toolkit + ", kernels for " + cuda.architectures;
  return cuda.devices.empty() ? built + "; no device: " + cuda.problem : built;
}

std::string device_text(const CudaDevice& device) {
  return device.name + ", compute capability " + device.compute_capability + ", " +
         bytes_text(device.memory_free_bytes) + " free of " + bytes_text(device.memory_bytes) +
         (device.problem.empty() ? "; this build's kernels run on it" : "; " + device.problem);
}

Json cuda_json(const CudaFacts& cuda) {
  Json devices = Json::array();
  for (const CudaDevice& device : cuda.devices) {
    devices.push_back({{"name", device.name},
                       {"compute_capability", device.compute_capability},
                       {"memory_bytes", device.memory_bytes},
                       {"memory_free_bytes", device.memory_free_bytes},
                       {"problem", device.problem.empty() ? Json() : Json(device.problem)}});
  }
  return {{"compiled", cuda.compiled},
          {"toolkit", cuda.compiled ? Json(cuda.toolkit) : Json()},
          {"architectures", cuda.compiled ? Json(cuda.architectures) : Json()},
          {"problem", cuda.problem.empty() ? Json() : Json(cuda.problem)},
          {"devices", devices}};
}

}  // namespace

int run_doctor(const DoctorArguments& arguments) {
  const CpuFacts cpu = cpu_facts();
  const Machine machine = this_machine(".");
  const std::vector<std::string> gpus = gpu_names();
  const CudaFacts cuda = cuda_facts();
  const auto disk = measure_disk(existing_parent(cache_folder()));
  const std::vector<FolderSize> caches = folder_sizes(cache_folder());
  std::size_t runs = 0;
  const std::vector<Check> checks = {check_compute(),
                                     check_torch(),
                                     check_recipes(),
                                     check_folder("cache", cache_folder()),
                                     check_folder("data", data_folder()),
                                     check_ledger(runs),
                                     check_calibration()};
  if (arguments.json) {
    Json out;
    bool ready = true;
    out["version"] = TAILOR_VERSION;
    out["cpu"] = {{"name", cpu.name},
                  {"cores", machine.cores},
                  {"level", cpu.level},
                  {"features", cpu.features}};
    out["memory"] = {{"total_bytes", memory_total_bytes()},
                     {"available_bytes", std::llround(machine.host_bytes)}};
    out["gpus"] = gpus;
    out["cuda"] = cuda_json(cuda);
    out["disk"] = {{"folder", existing_parent(cache_folder()).string()},
                   {"free_bytes", free_bytes(cache_folder())},
                   {"read_bytes_per_second", disk ? Json(disk->read_bytes_per_second) : Json()},
                   {"write_bytes_per_second", disk ? Json(disk->write_bytes_per_second) : Json()}};
    out["ledger"] = {{"place", Ledger::default_place()}, {"runs", runs}};
    out["cache"] = Json::array();
    for (const FolderSize& entry : caches) {
      out["cache"].push_back(
          {{"path", (cache_folder() / entry.name).string()}, {"bytes", entry.bytes}});
    }
    out["checks"] = Json::array();
    for (const Check& check : checks) {
      ready = ready && check.ok;
      out["checks"].push_back(
          {{"name", check.name}, {"ok", check.ok}, {"found", check.found}, {"mend", check.mend}});
    }
    out["ready"] = ready;
    std::cout << out.dump(2) << "\n";
    return 0;
  }
  std::cout << heading("machine") << "\n";
  TextTable table({"", ""});
  table.add({"processor", cpu.name + ", " + std::to_string(machine.cores) +
                              (machine.cores == 1 ? " core" : " cores")});
  table.add({"kernels", cpu.level + " (" + join(cpu.features, " ") + ")"});
  table.add({"memory", bytes_text(std::llround(machine.host_bytes)) + " available of " +
                           bytes_text(memory_total_bytes())});
  table.add(
      {"GPUs", gpus.empty() ? "none" : join(gpus, ", ") + " (this build computes on the CPU)"});
  table.add({"CUDA", cuda_text(cuda)});
  for (const CudaDevice& device : cuda.devices) table.add({"", device_text(device)});
  table.add({"disk", disk ? "reads " + bytes_text(std::llround(disk->read_bytes_per_second)) +
                                "/s, writes " +
                                bytes_text(std::llround(disk->write_bytes_per_second)) + "/s"
                          : "its speed could not be measured"});
  std::cout << rows_text(table, "  ") << "\n" << heading("parts") << "\n";
  TextTable parts({"", "", ""});
  for (const Check& check : checks) {
    parts.add({check.name, check.ok ? "ok" : "missing", check.found});
  }
  std::cout << rows_text(parts, "  ");
  if (!caches.empty()) {
    std::cout << "\n" << heading("cache") << "  " << cache_folder().string() << "\n";
    TextTable sizes({"", ">"});
    for (const FolderSize& entry : caches) sizes.add({entry.name, bytes_text(entry.bytes)});
    std::cout << rows_text(sizes, "  ");
  }
  bool first = true;
  for (const Check& check : checks) {
    if (check.ok) continue;
    if (first) std::cout << "\n" << heading("to mend") << "\n";
    first = false;
    std::cout << "  " << check.name << ": " << check.mend << "\n";
  }
  return 0;
}

}  // namespace tailor
