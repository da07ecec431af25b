#pragma once

#include "trainer/kernels/kernels.h"

namespace tailor {

/// The kernels of one instruction-set level, one table a storage type.
struct LevelTables {
  const Kernels<double>* f64;
  const Kernels<float>* f32;
  const Kernels<Bf16>* bf16;
};

/// kLevelV4Amx is of the file of kLevelV4Bf16.
extern const LevelTables kLevelV4Amx, kLevelV4Bf16, kLevelV4, kLevelV3, kLevelBase;

struct NamedLevel {
  const char* name;
  const LevelTables* tables;
};
struct LevelList {
  NamedLevel levels[5];
  int count;
};
/// Every level this machine can run, best first. Asks Linux for the AMX registers.
LevelList runnable_levels();

}  // namespace tailor
