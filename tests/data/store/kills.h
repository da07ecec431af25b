#pragma once

#include <fstream>
#include <random>

#include "base/clock.h"
#include "tests/data/store/pack_process.h"
#include "tests/data/store/store_fixture.h"

namespace tailor::testing_support {

/// A model of some hundred units, so that an instant may fall anywhere in packing it.
inline TinyModel many_units() {
  TinyModel tiny;
  tiny.layers = 8;
  tiny.experts = 16;
  return tiny;
}

struct KillReport {
  int kills = 0;    ///< that met a process at work
  int resumed = 0;  ///< kills that left some units in the journal, and not all
};

/// How many units the journal of a begun store holds.
inline std::int64_t units_in_journal(const fs::path& store) {
  std::ifstream file(store / kJournalName);
  std::int64_t out = 0;
  for (std::string line; std::getline(file, line);) out += line.find("\"hash\"") != line.npos;
  return out;
}

/// Packs, killing the process at random instants until `kills` of them met it at work; each time a
/// store is whole it is compared with `wanted`, and begun anew.
inline KillReport pack_under_fire(const fs::path& model, const fs::path& store,
                                  const fs::path& wanted, PackOptions options, int kills,
                                  std::uint32_t seed) {
  options.poll_seconds = 1e-4;  // syncs after nearly every unit
  KillReport report;
  std::mt19937 random(seed);
  const double began = seconds_now();
  EXPECT_EQ(PackProcess(model, store, options).wait(), 0);
  std::uniform_real_distribution<double> when(0, seconds_now() - began);
  const auto units = static_cast<std::int64_t>(Store::open(store).layout().units.size());
  fs::remove_all(store);
  while (report.kills < kills) {
    PackProcess process(model, store, options);
    pause_seconds(when(random));
    if (process.running()) {
      process.kill();
      ++report.kills;
      const std::int64_t kept = units_in_journal(store);
      if (kept > 0 && kept < units) ++report.resumed;
      continue;
    }
    EXPECT_EQ(process.code(), 0);
    EXPECT_THAT(differing_files(store, wanted), testing::IsEmpty());
    fs::remove_all(store);
    if (process.code() != 0) break;
  }
  // And to the end.
  EXPECT_EQ(PackProcess(model, store, options).wait(), 0);
  EXPECT_THAT(differing_files(store, wanted), testing::IsEmpty());
  return report;
}

}  // namespace tailor::testing_support
