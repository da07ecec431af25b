#include "data/runs/segment_timer.h"

#include "base/units.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

constexpr auto kByHand = SegmentTimer::Heartbeats::by_hand;

class SegmentTimerTest : public RunsTest {
 protected:
  void SetUp() override {
    RunsTest::SetUp();
    ledger_ = open();
    run_ = ledger_->begin_run(run_facts());
    attempt_ = ledger_->begin_attempt(run_, attempt_facts());
  }
  std::int64_t ms_of(Phase phase) { return ledger_->totals(run_).of(phase).device_ms / 4; }

  std::unique_ptr<Ledger> ledger_;
  std::string run_;
  AttemptId attempt_;
};

TEST_F(SegmentTimerTest, every_millisecond_belongs_to_one_phase) {
  clock_.pass(40);  // between the program's start and the timer
  SegmentTimer timer(*ledger_, attempt_, Phase::load, kByHand, clock_.steady_ms() - 40);
  clock_.pass(5'000);
  EXPECT_EQ(timer.switch_to(Phase::train), Phase::load);
  for (int step = 1; step <= 30; ++step) {
    clock_.pass(1'000);
    timer.step_done({.step = step, .tokens = 100, .trained_tokens = 30, .stall_seconds = 0.25});
  }
  timer.switch_to(Phase::evaluate);
  clock_.pass(700);
  timer.switch_to(Phase::checkpoint);
  clock_.pass(300);
  timer.switch_to(Phase::train);
  clock_.pass(2'000);
  timer.finish(RunStatus::succeeded, 0, "");
  timer.finish(RunStatus::failed, 70, "ignored");

  const RunTotals totals = ledger_->totals(run_);
  EXPECT_EQ(totals.device_ms, 4 * 38'040);
  EXPECT_EQ(ms_of(Phase::load), 5'040);
  EXPECT_EQ(ms_of(Phase::stall), 7'500);
  EXPECT_EQ(ms_of(Phase::train), 24'500);
  EXPECT_EQ(ms_of(Phase::evaluate), 700);
  EXPECT_EQ(ms_of(Phase::checkpoint), 300);
  EXPECT_EQ(totals.steps, 30);
  EXPECT_EQ(totals.tokens, 3'000);
  EXPECT_EQ(totals.trained_tokens, 900);
  EXPECT_EQ(totals.usd_micros, cost_usd_micros(2'690'000, 4 * 38'040));
  EXPECT_EQ(timer.spent().device_ms, totals.device_ms);
  EXPECT_EQ(timer.spent().usd_micros, totals.usd_micros);
  EXPECT_EQ(ledger_->read(run_).attempts[0].status, RunStatus::succeeded);
}

TEST_F(SegmentTimerTest, at_most_a_heartbeat_is_not_written_down) {
  SegmentTimer timer(*ledger_, attempt_, Phase::train, kByHand);
  std::int64_t passed = 0;
  for (int step = 1; step <= 200; ++step) {
    clock_.pass(700);
    passed += 700;
    timer.step_done({.step = step, .tokens = 1, .trained_tokens = 1});
    EXPECT_GE(ledger_->totals(run_).device_ms, 4 * (passed - kHeartbeatMs));
    EXPECT_EQ(timer.spent().device_ms, 4 * passed);
  }
}

TEST_F(SegmentTimerTest, a_checkpoint_begins_with_everything_written_down) {
  SegmentTimer timer(*ledger_, attempt_, Phase::train, kByHand);
  clock_.pass(900);
  timer.step_done({.step = 1, .tokens = 1, .trained_tokens = 1});
  EXPECT_EQ(ledger_->totals(run_).device_ms, 0);
  timer.switch_to(Phase::checkpoint);
  EXPECT_EQ(ledger_->totals(run_).device_ms, 4 * 900);
  clock_.pass(100);
  timer.switch_to(Phase::train);
  EXPECT_EQ(ledger_->totals(run_).device_ms, 4 * 1'000);
}

TEST_F(SegmentTimerTest, waiting_longer_than_what_is_unwritten_is_booked_later) {
  SegmentTimer timer(*ledger_, attempt_, Phase::train, kByHand);
  clock_.pass(16'000);
  timer.tick();  // in the middle of a step of 17 s, 10 s of them waiting
  clock_.pass(1'000);
  timer.step_done({.step = 1, .tokens = 1, .trained_tokens = 1, .stall_seconds = 10});
  clock_.pass(12'000);
  timer.step_done({.step = 2, .tokens = 1, .trained_tokens = 1});
  timer.flush();
  EXPECT_EQ(ms_of(Phase::stall), 10'000);
  EXPECT_EQ(ms_of(Phase::train), 19'000);
}

TEST_F(SegmentTimerTest, figures_go_on_over_attempts) {
  {
    SegmentTimer timer(*ledger_, attempt_, Phase::train, kByHand);
    clock_.pass(3'333);
    timer.step_done({.step = 1, .tokens = 1, .trained_tokens = 1});
    timer.finish(RunStatus::preempted, 75, "SIGTERM");
  }
  AttemptFacts facts = attempt_facts(1);
  facts.devices = 2;
  facts.usd_micros_per_device_hour = 1'190'000;
  facts.held_ms_before = 77;
  const AttemptId second = ledger_->begin_attempt(run_, facts);
  SegmentTimer timer(*ledger_, second, Phase::load, kByHand);
  clock_.pass(1'111);
  EXPECT_EQ(timer.spent().device_ms, 4 * 3'333 + 2 * 1'188);
  timer.finish(RunStatus::succeeded, 0, "");
  EXPECT_EQ(timer.spent().device_ms, ledger_->totals(run_).device_ms);
  EXPECT_EQ(timer.spent().usd_micros, ledger_->totals(run_).usd_micros);
}

TEST_F(SegmentTimerTest, a_clock_that_jumps_changes_nothing) {
  SegmentTimer timer(*ledger_, attempt_, Phase::train, kByHand);
  for (const std::int64_t jump : {3'600'000, -7'200'000, 3'600'000}) {
    clock_.pass(16'000);
    clock_.jump(jump);
    timer.tick();
  }
  timer.finish(RunStatus::succeeded, 0, "");
  EXPECT_EQ(ledger_->totals(run_).device_ms, 4 * 48'000);
}

TEST_F(SegmentTimerTest, a_replaced_attempt_stops) {
  SegmentTimer timer(*ledger_, attempt_, Phase::train, kByHand);
  ledger_->begin_attempt(run_, attempt_facts());
  clock_.pass(20'000);
  EXPECT_EQ(error_of([&] { timer.tick(); }).fault(), Fault::internal);
}

TEST_F(SegmentTimerTest, what_is_unwritten_is_written_when_the_timer_goes) {
  {
    SegmentTimer timer(*ledger_, attempt_, Phase::load);  // with its thread
    clock_.pass(5'000);
  }
  EXPECT_EQ(ledger_->totals(run_).device_ms, 4 * 5'000);
  EXPECT_EQ(ledger_->read(run_).attempts[0].status, RunStatus::running);
}

}  // namespace
}  // namespace tailor
