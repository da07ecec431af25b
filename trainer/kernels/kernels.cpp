#include "trainer/kernels/kernels.h"

#include <sys/syscall.h>
#include <unistd.h>

#include "trainer/kernels/levels.h"

namespace tailor {
namespace {

/// Linux gives a process the 8 KiB of tile registers of its threads only on demand (since 5.16).
bool may_use_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of asm/prctl.h, which may be older
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const NamedLevel& chosen_level() {
  static const NamedLevel level = runnable_levels().levels[0];
  return level;
}

}  // namespace

LevelList runnable_levels() {
  LevelList list{};
  const bool v4 = __builtin_cpu_supports("x86-64-v4");
  if (v4 && __builtin_cpu_supports("avx512bf16")) {
    if (may_use_amx()) list.levels[list.count++] = {"x86-64-v4+amx", &kLevelV4Amx};
    list.levels[list.count++] = {"x86-64-v4+bf16", &kLevelV4Bf16};
  }
  if (v4) list.levels[list.count++] = {"x86-64-v4", &kLevelV4};
  if (__builtin_cpu_supports("x86-64-v3")) list.levels[list.count++] = {"x86-64-v3", &kLevelV3};
  list.levels[list.count++] = {"x86-64", &kLevelBase};
  return list;
}

template <>
const Kernels<double>& kernels<double>() {
  return *chosen_level().tables->f64;
}
template <>
const Kernels<float>& kernels<float>() {
  return *chosen_level().tables->f32;
}
template <>
const Kernels<Bf16>& kernels<Bf16>() {
  return *chosen_level().tables->bf16;
}

const char* kernel_level() { return chosen_level().name; }

}  // namespace tailor
