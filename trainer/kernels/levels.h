#pragma once

#include "trainer/kernels/kernels.h"

namespace tailor {

/// The kernels of one instruction-set level, one table a storage type.
struct LevelTables {
  const Kernels<double>* f64;
  const Kernels<float>* f32;
  const Kernels<Bf16>* bf16;
};

extern const LevelTables kLevelV4Bf16, kLevelV4, kLevelV3, kLevelBase;

/// For tests: every level this machine can run, best first.
struct NamedLevel {
  const char* name;
  const LevelTables* tables;
};
struct LevelList {
  NamedLevel levels[4];
  int count;
};
LevelList runnable_levels();

}  // namespace tailor
