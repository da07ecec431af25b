#pragma once

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>

namespace tailor::testing_support {

/// Bytes that the mapping at `address` has in this process's memory, from /proc/self/smaps; -1
/// when nothing is mapped there.
inline std::int64_t resident_bytes_at(const void* address) {
  const auto want = reinterpret_cast<std::uintptr_t>(address);
  std::ifstream maps("/proc/self/smaps");
  bool here = false;
  for (std::string line; std::getline(maps, line);) {
    char* end = nullptr;
    const std::uintptr_t from = std::strtoull(line.c_str(), &end, 16);
    if (*end == '-' && end != line.c_str()) {
      const std::uintptr_t to = std::strtoull(end + 1, nullptr, 16);
      here = from <= want && want < to;
    } else if (here && line.starts_with("Rss:")) {
      return std::strtoll(line.c_str() + 4, nullptr, 10) * 1024;
    }
  }
  return -1;
}

/// The most memory this process has had so far, in bytes (VmHWM).
inline std::int64_t resident_bytes_peak() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::strtoll(line.c_str() + 6, nullptr, 10) * 1024;
  }
  return -1;
}

}  // namespace tailor::testing_support
