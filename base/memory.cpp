#include "base/memory.h"

#include <malloc.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace tailor {

void release_free_memory() { ::malloc_trim(0); }

namespace {

/// The line of this process's status that begins with `name`, in bytes.
std::optional<std::int64_t> status_bytes(std::string_view name) {
  std::FILE* file = std::fopen("/proc/self/status", "re");
  if (file == nullptr) return std::nullopt;
  std::optional<std::int64_t> out;
  std::array<char, 256> line{};
  while (!out && std::fgets(line.data(), line.size(), file) != nullptr) {
    if (std::string_view(line.data()).starts_with(name)) {
      out = std::strtoll(line.data() + name.size(), nullptr, 10) * 1024;
    }
  }
  std::fclose(file);
  return out;
}

}  // namespace

std::optional<std::int64_t> resident_bytes_peak() { return status_bytes("VmHWM:"); }
std::optional<std::int64_t> resident_bytes() { return status_bytes("VmRSS:"); }

}  // namespace tailor
