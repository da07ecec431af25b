#include "base/memory.h"

#include <malloc.h>

#include <array>
#include <cstdio>

namespace tailor {

void release_free_memory() { ::malloc_trim(0); }

std::optional<std::int64_t> resident_bytes_peak() {
  std::FILE* file = std::fopen("/proc/self/status", "re");
  if (file == nullptr) return std::nullopt;
  std::optional<std::int64_t> out;
  std::array<char, 256> line{};
  long long kib = 0;
  while (!out && std::fgets(line.data(), line.size(), file) != nullptr) {
    if (std::sscanf(line.data(), "VmHWM: %lld kB", &kib) == 1) out = kib * 1024;
  }
  std::fclose(file);
  return out;
}

}  // namespace tailor
