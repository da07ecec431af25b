#include "data/runs/energy.h"

#include "data/runs/segment_timer.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

class EnergyTest : public RunsTest {
 protected:
  void counter(const std::string& folder, const std::string& name, std::int64_t microjoules) {
    make_folders(folder_ / folder);
    write_atomically(folder_ / folder / "name", name + "\n");
    write_atomically(folder_ / folder / "max_energy_range_uj", "1000000000\n");
    write_atomically(folder_ / folder / "energy_uj", std::to_string(microjoules) + "\n");
  }
};

TEST_F(EnergyTest, rapl_counts_packages_and_memory_and_goes_on_where_a_counter_begins_anew) {
  EXPECT_FALSE(EnergyMeter::rapl(folder_ / "none").measures());
  counter("intel-rapl:0", "package-0", 999'000'000);
  counter("intel-rapl:0:0", "core", 5'000'000);  // inside the package's figure
  counter("intel-rapl:0:1", "dram", 1'000'000);
  EnergyMeter meter = EnergyMeter::rapl(folder_);
  ASSERT_TRUE(meter.measures());
  EXPECT_EQ(meter.take_millijoules(), 0);
  counter("intel-rapl:0", "package-0", 4'000'000);  // over its range of 1 kJ
  counter("intel-rapl:0:0", "core", 9'000'000);
  counter("intel-rapl:0:1", "dram", 3'000'000);
  EXPECT_EQ(meter.take_millijoules(), 5'000 + 2'000);
  fs::remove(folder_ / "intel-rapl:0/energy_uj");
  EXPECT_FALSE(meter.take_millijoules().has_value());
  EXPECT_FALSE(meter.take_millijoules().has_value());
}

TEST_F(EnergyTest, nvml_counts_the_gpus_that_are_held_all_or_none) {
  const std::string library = TAILOR_FAKE_NVML;
  EXPECT_FALSE(EnergyMeter::nvml({0}, "libno-such-thing.so").measures());
  EnergyMeter two = EnergyMeter::nvml({0, 1}, library);
  ASSERT_TRUE(two.measures());
  EXPECT_EQ(two.take_millijoules(), 750);
  EXPECT_EQ(two.take_millijoules(), 750);
  EXPECT_FALSE(EnergyMeter::nvml({0, 2}, library).measures());
  EXPECT_FALSE(EnergyMeter::nvml({0, 3}, library).measures());
}

TEST_F(EnergyTest, a_runs_energy_adds_up_and_without_a_meter_is_not_measured) {
  const auto ledger = open();
  for (const bool metered : {true, false}) {
    counter("intel-rapl:0", "package-0", 0);
    const std::string run = ledger->begin_run(run_facts());
    const AttemptId attempt = ledger->begin_attempt(run, attempt_facts());
    SegmentTimer::Extras extras;
    extras.energy = EnergyMeter::rapl(metered ? folder_ : folder_ / "none");
    SegmentTimer timer(*ledger, attempt, Phase::load, SegmentTimer::Heartbeats::by_hand, {},
                       std::move(extras));
    clock_.pass(1'000);
    timer.switch_to(Phase::train);
    clock_.pass(2'000);
    timer.step_done({.step = 1, .tokens = 10, .trained_tokens = 5, .stall_seconds = 0.5});
    counter("intel-rapl:0", "package-0", 100'001'000);
    timer.flush();
    clock_.pass(1'000);
    counter("intel-rapl:0", "package-0", 100'008'000);
    timer.finish(RunStatus::succeeded, 0, "");
    const RunTotals totals = ledger->totals(run);
    if (metered) {
      EXPECT_EQ(totals.energy_mj, 100'008);
    } else {
      EXPECT_FALSE(totals.energy_mj.has_value());
    }
  }
}

}  // namespace
}  // namespace tailor
