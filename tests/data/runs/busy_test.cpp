#include "data/runs/busy.h"

#include <gmock/gmock.h>

#include <thread>

#include "data/runs/segment_timer.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

class BusyTest : public RunsTest {};

TEST_F(BusyTest, nvml_adds_up_samples_of_all_gpus_or_none) {
  const std::string library = TAILOR_FAKE_NVML;
  EXPECT_FALSE(BusyMeter::nvml({0}, "libno-such-thing.so").measures());
  BusyMeter one = BusyMeter::nvml({0}, library);
  ASSERT_TRUE(one.measures());
  // 100 ms at 50 % and 100 ms at 80 %, each time.
  EXPECT_DOUBLE_EQ(*one.take_busy_ms(), 130);
  EXPECT_DOUBLE_EQ(*one.take_busy_ms(), 130);
  EXPECT_FALSE(BusyMeter::nvml({0, 2}, library).measures());  // 2 cannot tell
  EXPECT_FALSE(BusyMeter::nvml({0, 3}, library).measures());  // there is no 3
}

TEST_F(BusyTest, a_process_is_busy_while_it_computes_and_not_while_it_sleeps) {
  BusyMeter meter = BusyMeter::process(2);
  volatile double sum = 0;
  const double began = static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  while (static_cast<double>(std::clock()) / CLOCKS_PER_SEC - began < 0.2) sum = sum + 1;
  const double busy = *meter.take_busy_ms();  // one of its two threads
  EXPECT_GT(busy, 95);
  EXPECT_LT(busy, 130);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_LT(*meter.take_busy_ms(), 20);
}

TEST_F(BusyTest, of_a_run_adds_up_is_never_more_than_was_held_and_may_be_unknown) {
  const auto ledger = open();
  for (const bool metered : {true, false}) {
    AttemptFacts facts = attempt_facts();
    facts.devices = 1;
    const std::string run = ledger->begin_run(run_facts());
    const AttemptId attempt = ledger->begin_attempt(run, facts);
    SegmentTimer::Extras extras;
    if (metered) extras.busy = BusyMeter::nvml({0}, TAILOR_FAKE_NVML);
    SegmentTimer timer(*ledger, attempt, Phase::load, SegmentTimer::Heartbeats::by_hand, {},
                       std::move(extras));
    clock_.pass(100);
    timer.flush();  // 130 ms were counted: 30 wait for the next stretch
    EXPECT_EQ(ledger->totals(run).busy_device_ms,
              metered ? std::optional<std::int64_t>(100) : std::nullopt);
    clock_.pass(1'000);
    timer.switch_to(Phase::train);
    clock_.pass(3'000);
    timer.finish(RunStatus::succeeded, 0, "");
    const RunTotals totals = ledger->totals(run);
    EXPECT_EQ(totals.busy_device_ms, metered ? std::optional<std::int64_t>(260) : std::nullopt);
    EXPECT_LE(totals.busy_device_ms.value_or(0), totals.device_ms);
  }
}

}  // namespace
}  // namespace tailor
