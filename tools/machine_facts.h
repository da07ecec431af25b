#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"

namespace tailor {

/// What `tailor doctor` looks up about the processor: its name, and the widest of the
/// instruction-set levels Tailor's kernels are built for.
struct CpuFacts {
  std::string name;
  std::string level;  ///< x86-64-v4+amx, x86-64-v4+bf16, x86-64-v4, x86-64-v3, x86-64
  std::vector<std::string> features;  ///< those that matter for speed: avx2, avx512f, amx_bf16, ...
};
CpuFacts cpu_facts();

std::int64_t memory_total_bytes();

/// NVIDIA cards by name, as the driver lists them.
std::vector<std::string> gpu_names();

struct FolderSize {
  std::string name;
  std::int64_t bytes = 0;
};
/// Sizes of what lies directly in `folder`, by name.
std::vector<FolderSize> folder_sizes(const fs::path& folder);

struct DiskSpeed {
  double write_bytes_per_second = 0, read_bytes_per_second = 0;
};
/// Writes 64 MiB below `folder`, reads them past the page cache, and removes them again. Nothing
/// where that is not possible.
std::optional<DiskSpeed> measure_disk(const fs::path& folder);

}  // namespace tailor
