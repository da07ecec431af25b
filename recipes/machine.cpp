#include "recipes/machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <memory>
#include <vector>

#include "base/error.h"
#include "base/text.h"
#include "recipes/fields.h"
#include "recipes/yaml.h"

namespace tailor {
namespace {

// Assumed until measured: what a step reaches on a core with bf16 matrix instructions, and without.
constexpr double kGflopsPerCoreBfloat16 = 100;
constexpr double kGflopsPerCoreFloat32 = 40;

struct MachineKey {
  std::string name;
  enum class Need { both, cuda, cpu, optional } need;
  std::function<void(Machine&, const YamlNode&, Problems&)> read;
};

MachineKey number(const std::string& name, MachineKey::Need need, double Machine::*field) {
  return {name, need, [=](Machine& machine, const YamlNode& node, Problems& problems) {
            const NumberRange range{0, 1e30, false, false};
            if (const auto value = read_number(node, name, range, problems))
              machine.*field = *value;
          }};
}

MachineKey size(const std::string& name, MachineKey::Need need, double Machine::*field) {
  return {name, need, [=](Machine& machine, const YamlNode& node, Problems& problems) {
            if (const auto value = read_bytes(node, name, problems)) {
              machine.*field = static_cast<double>(*value);
            }
          }};
}

MachineKey word(const std::string& name, MachineKey::Need need, std::string Machine::*field) {
  return {name, need, [=](Machine& machine, const YamlNode& node, Problems& problems) {
            if (auto value = read_string(node, name, problems)) machine.*field = *std::move(value);
          }};
}

MachineKey count(const std::string& name, MachineKey::Need need, int Machine::*field) {
  return {name, need, [=](Machine& machine, const YamlNode& node, Problems& problems) {
            if (const auto value = read_integer(node, name, 1, 65'536, problems)) {
              machine.*field = static_cast<int>(*value);
            }
          }};
}

const std::vector<MachineKey>& machine_keys() {
  using Need = MachineKey::Need;
  static const std::vector<MachineKey> keys = {
      {"kind", Need::both,
       [](Machine& machine, const YamlNode& node, Problems& problems) {
         const auto index = read_word(node, "kind", {"cpu", "cuda"}, problems);
         if (index) machine.kind = *index == 0 ? Machine::Kind::cpu : Machine::Kind::cuda;
       }},
      word("sku", Need::both, &Machine::sku),
      word("tier", Need::optional, &Machine::tier),
      count("devices", Need::cuda, &Machine::devices),
      size("host_memory", Need::both, &Machine::host_bytes),
      number("disk_bytes_per_second", Need::both, &Machine::disk_bytes_per_second),
      number("download_bytes_per_second", Need::optional, &Machine::download_bytes_per_second),
      {"disk_free", Need::optional,
       [](Machine& machine, const YamlNode& node, Problems& problems) {
         if (const auto value = read_bytes(node, "disk_free", problems)) {
           machine.disk_free_bytes = static_cast<double>(*value);
         }
       }},
      number("peak_flops", Need::cuda, &Machine::peak_flops),
      number("efficiency", Need::cuda, &Machine::efficiency),
      size("device_memory", Need::cuda, &Machine::device_bytes),
      number("device_bytes_per_second", Need::cuda, &Machine::device_bytes_per_second),
      number("to_device_bytes_per_second", Need::cuda, &Machine::to_device_bytes_per_second),
      number("from_device_bytes_per_second", Need::cuda, &Machine::from_device_bytes_per_second),
      number("between_devices_bytes_per_second", Need::optional,
             &Machine::between_devices_bytes_per_second),
      count("cores", Need::cpu, &Machine::cores),
      number("gflops_bfloat16", Need::cpu, &Machine::gflops_bfloat16),
      number("gflops_float32", Need::cpu, &Machine::gflops_float32),
      word("gflops_source", Need::cpu, &Machine::gflops_source),
      number("memory_bytes_per_second", Need::optional, &Machine::memory_bytes_per_second),
  };
  return keys;
}

double meminfo_bytes(const std::string& field) {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(field + ":")) continue;
    const std::string number(trim(std::string_view(line).substr(field.size() + 1)));
    return static_cast<double>(parse_integer(number.substr(0, number.find(' '))).value_or(0)) *
           1024;
  }
  return 0;
}

/// What the cgroup of this process still allows, or nothing without a limit.
std::optional<double> cgroup_free_bytes() {
  const auto value = [](const char* path) -> std::optional<double> {
    std::ifstream file(path);
    std::string text;
    if (!(file >> text)) return std::nullopt;
    const auto number = parse_integer(text);
    return number ? std::optional(static_cast<double>(*number)) : std::nullopt;
  };
  const auto limit = value("/sys/fs/cgroup/memory.max");
  const auto used = value("/sys/fs/cgroup/memory.current");
  if (!limit || !used) return std::nullopt;
  return std::max(0.0, *limit - *used);
}

}  // namespace

Machine read_machine_text(std::string_view text, const std::string& name) {
  auto source = std::make_shared<TextSource>(TextSource{name, std::string(text), false});
  Problems problems;
  Machine machine;
  machine.name = fs::path(name).stem().string();
  const std::optional<YamlNode> root = parse_yaml(source, problems);
  if (root && !root->is_map()) {
    problems.add("a machine profile is a map of keys, found " + root->shown(), root->place, "",
                 "Copy one of recipes/machines.");
  } else if (root) {
    std::vector<std::string> names;
    for (const MachineKey& key : machine_keys()) names.push_back(key.name);
    refuse_unknown_keys(*root, "", names, problems);
    for (const MachineKey& key : machine_keys()) {
      if (const YamlNode* node = root->find(key.name)) key.read(machine, *node, problems);
    }
    const bool cuda = machine.kind == Machine::Kind::cuda;
    for (const MachineKey& key : machine_keys()) {
      using Need = MachineKey::Need;
      const bool needed = key.need == Need::both || key.need == (cuda ? Need::cuda : Need::cpu);
      if (needed && root->find(key.name) == nullptr) {
        problems.add(key.name + " is missing", {source, 0, 0}, key.name,
                     "Add it; recipes/machines has profiles to compare with.");
      }
    }
  }
  problems.throw_if_any(Fault::bad_file, "machine profile " + name, "Mend them all.");
  return machine;
}

Machine read_machine(const fs::path& path) {
  return read_machine_text(read_source(path.string(), "machine profile")->text, path.string());
}

Machine find_machine(const std::string& profile, const fs::path& machines_folder) {
  if (profile.ends_with(".yaml")) return read_machine(profile);
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(machines_folder, error)) {
    if (entry.path().extension() != ".yaml") continue;
    if (entry.path().stem() == profile) return read_machine(entry.path());
    names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  // "4xh100" is 4xh100-80gb as long as there is no other.
  std::vector<std::string> longer;
  for (const std::string& name : names) {
    if (name.starts_with(profile + "-")) longer.push_back(name);
  }
  if (longer.size() == 1) return read_machine(machines_folder / (longer.front() + ".yaml"));
  if (longer.size() > 1) {
    throw Error(Fault::usage, {"'" + profile + "' is the beginning of several machine profiles",
                               "machine.profile", "Name one of: " + join(longer, ", ") + "."});
  }
  const std::string near = nearest_name(profile, names);
  throw Error(Fault::usage,
              {"no machine profile '" + profile + "'", "machine.profile",
               (near.empty() ? "Profiles: " + join(names, ", ") + "; or name a .yaml file."
                             : "Did you mean " + near + "? Profiles: " + join(names, ", ") +
                                   "; or name a .yaml file.")});
}

Machine this_machine(const fs::path& work_folder) {
  Machine machine;
  machine.name = "this machine";
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  const bool known = sched_getaffinity(0, sizeof allowed, &allowed) == 0;
  machine.cores = known ? std::max(1, CPU_COUNT(&allowed))
                        : std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
  machine.sku = "cpu-" + std::to_string(machine.cores) + "core";
  machine.host_bytes = meminfo_bytes("MemAvailable");
  if (const auto limit = cgroup_free_bytes())
    machine.host_bytes = std::min(machine.host_bytes, *limit);
  std::error_code error;
  fs::path folder = fs::absolute(work_folder, error);
  while (!fs::exists(folder, error) && folder.has_relative_path()) folder = folder.parent_path();
  const fs::space_info space = fs::space(folder, error);
  if (!error) machine.disk_free_bytes = static_cast<double>(space.available);
  machine.gflops_bfloat16 = kGflopsPerCoreBfloat16 * machine.cores;
  machine.gflops_float32 = kGflopsPerCoreFloat32 * machine.cores;
  machine.gflops_source = "assumed for " + std::to_string(machine.cores) + " cores, not measured";
  return machine;
}

}  // namespace tailor
