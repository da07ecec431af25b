#include "tools/machine_facts.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <set>

#include "base/clock.h"
#include "base/text.h"

namespace tailor {
namespace {

constexpr std::size_t kBlock = 4U << 20U, kBlocks = 16;

/// The value behind the first "name : value" of a /proc file.
std::string proc_value(const char* path, std::string_view name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(':');
    if (colon != std::string::npos && trim(std::string_view(line).substr(0, colon)) == name) {
      return std::string(trim(std::string_view(line).substr(colon + 1)));
    }
  }
  return {};
}

std::int64_t size_below(const fs::path& path) {
  std::error_code error;
  if (fs::is_symlink(path, error)) return 0;
  if (fs::is_regular_file(path, error)) {
    const auto size = fs::file_size(path, error);
    return error ? 0 : static_cast<std::int64_t>(size);
  }
  std::int64_t total = 0;
  for (fs::recursive_directory_iterator
           at(path, fs::directory_options::skip_permission_denied, error),
       end;
       !error && at != end; at.increment(error)) {
    std::error_code one;
    if (at->is_symlink(one) || !at->is_regular_file(one)) continue;
    const auto size = at->file_size(one);
    if (!one) total += static_cast<std::int64_t>(size);
  }
  return total;
}

/// Closes and removes a scratch file.
struct Scratch {
  fs::path path;
  int descriptor = -1;
  ~Scratch() {
    if (descriptor >= 0) ::close(descriptor);
    ::unlink(path.c_str());
  }
};

}  // namespace

CpuFacts cpu_facts() {
  CpuFacts out;
  out.name = proc_value("/proc/cpuinfo", "model name");
  std::set<std::string> flags;
  for (const std::string& flag : split(proc_value("/proc/cpuinfo", "flags"), ' ')) {
    flags.insert(flag);
  }
  for (const char* name :
       {"avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"}) {
    if (flags.contains(name)) out.features.emplace_back(name);
  }
  const auto all = [&](std::initializer_list<const char*> names) {
    return std::all_of(names.begin(), names.end(),
                       [&](const char* name) { return flags.contains(name); });
  };
  const bool v3 = all({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"});
  const bool v4 = v3 && all({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"});
  const bool bf16 = v4 && flags.contains("avx512_bf16");
  const bool amx = bf16 && all({"amx_tile", "amx_bf16"});
  out.level = amx    ? "x86-64-v4+amx"
              : bf16 ? "x86-64-v4+bf16"
              : v4   ? "x86-64-v4"
              : v3   ? "x86-64-v3"
                     : "x86-64";
  return out;
}

std::int64_t memory_total_bytes() {
  const std::string text = proc_value("/proc/meminfo", "MemTotal");
  return std::strtoll(text.c_str(), nullptr, 10) * 1024;
}

std::vector<std::string> gpu_names() {
  std::vector<std::string> out;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator("/proc/driver/nvidia/gpus", error)) {
    out.push_back(proc_value((entry.path() / "information").c_str(), "Model"));
  }
  std::sort(out.begin(), out.end());
  return out;
}

std::vector<FolderSize> folder_sizes(const fs::path& folder) {
  std::vector<FolderSize> out;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    out.push_back({entry.path().filename().string(), size_below(entry.path())});
  }
  std::sort(out.begin(), out.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  return out;
}

std::optional<DiskSpeed> measure_disk(const fs::path& folder) {
  Scratch file{folder / (".speed." + std::to_string(::getpid())), -1};
  file.descriptor = ::open(file.path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file.descriptor < 0) return std::nullopt;
  const std::unique_ptr<void, void (*)(void*)> block(std::aligned_alloc(4096, kBlock), std::free);
  std::fill_n(static_cast<unsigned char*>(block.get()), kBlock, static_cast<unsigned char>(0x5A));
  double start = seconds_now();
  for (std::size_t i = 0; i < kBlocks; ++i) {
    if (::write(file.descriptor, block.get(), kBlock) != static_cast<ssize_t>(kBlock)) {
      return std::nullopt;
    }
  }
  if (::fsync(file.descriptor) != 0) return std::nullopt;
  const double written = seconds_now() - start;
  const int direct = ::open(file.path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (direct < 0) return std::nullopt;
  start = seconds_now();
  bool whole = true;
  for (std::size_t i = 0; i < kBlocks && whole; ++i) {
    whole = ::read(direct, block.get(), kBlock) == static_cast<ssize_t>(kBlock);
  }
  const double read = seconds_now() - start;
  ::close(direct);
  if (!whole) return std::nullopt;
  const auto bytes = static_cast<double>(kBlock * kBlocks);
  return DiskSpeed{bytes / std::max(1e-6, written), bytes / std::max(1e-6, read)};
}

}  // namespace tailor
