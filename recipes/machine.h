#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/file.h"

namespace tailor {

/// What the plan knows of a machine: devices, links, memory, and the SKU it is paid as. Read from a
/// profile, or taken from what the running system says of its cores, memory and disk. No device is
/// touched here.
struct Machine {
  enum class Kind { cpu, cuda };
  std::string name;  ///< "a100-40gb", "this machine"
  Kind kind = Kind::cpu;
  std::string sku;                     ///< of one device, for the price book
  std::string tier;                    ///< the price tier taken first: spot, on-demand, ...
  int devices = 1;                     ///< GPUs; on the CPU 1
  double host_bytes = 0;               ///< RAM
  double disk_bytes_per_second = 1e9;  ///< sequential reads, all devices together
  std::optional<double> disk_free_bytes;
  double download_bytes_per_second = 125e6;  ///< from the outside; assumed: 1 Gbit/s

  // cuda: one device
  double peak_flops = 0;    ///< dense bf16
  double efficiency = 0.5;  ///< share of the peak that a step reaches
  double device_bytes = 0;
  double device_bytes_per_second = 0;                                       ///< of its memory
  double to_device_bytes_per_second = 0, from_device_bytes_per_second = 0;  ///< link of one device
  double between_devices_bytes_per_second = 0;  ///< each device, all-gather; 0: none

  int cores = 1;  ///< that pack; on the CPU those that train

  // cpu
  double gflops_bfloat16 = 0, gflops_float32 = 0;  ///< what a step reaches with all cores
  std::string gflops_source;                       ///< measured or assumed, and where
  /// What dequantising moves with all cores, packed bytes and values together; assumed.
  double memory_bytes_per_second = 10e9;
};

/// Reads a profile strictly; Error{bad_file} with every problem.
Machine read_machine(const fs::path& path);
Machine read_machine_text(std::string_view text, const std::string& name);

/// The profile a recipe names: a .yaml file, or one of `machines_folder` by name or by the only
/// beginning, up to a hyphen, that means it. Throws Error{usage} with the nearest name.
Machine find_machine(const std::string& profile, const fs::path& machines_folder);

/// This machine without its GPUs: cores this process may use, MemAvailable (and the cgroup's
/// limit), free disk at `work_folder`.
Machine this_machine(const fs::path& work_folder);

}  // namespace tailor
