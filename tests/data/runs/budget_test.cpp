#include "data/runs/budget.h"

#include <gmock/gmock.h>
#include <sys/wait.h>

#include "base/units.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

using testing::HasSubstr;

class BudgetTest : public RunsTest {
 protected:
  void SetUp() override {
    RunsTest::SetUp();
    ledger_ = open();
    facts_.project = "team";
  }
  /// A run of the project that has held its four devices for `hours`.
  AttemptId spend(double hours, AttemptFacts attempt_facts) {
    const AttemptId attempt = ledger_->begin_attempt(ledger_->begin_run(facts_), attempt_facts);
    const SegmentFacts one{.phase = Phase::train, .ms = static_cast<std::int64_t>(hours * 3.6e6)};
    ledger_->segments(attempt, std::span(&one, 1));
    return attempt;
  }
  SegmentTimer::Spent spent(double seconds) const {
    const auto device_ms = static_cast<std::int64_t>(4 * seconds * 1000);
    return {device_ms, cost_usd_micros(2'690'000, device_ms)};
  }

  std::unique_ptr<Ledger> ledger_;
  RunFacts facts_ = run_facts();
};

TEST_F(BudgetTest, a_plan_over_the_runs_own_budget_is_refused) {
  const auto refused = [&](const std::string& run, const BudgetLimits& own, const PlannedUse& use) {
    return error_of([&] { refuse_over_budget(*ledger_, run, "", own, use); });
  };
  Error error = refused("", {10'000'000, {}}, {12'500'000, {}});
  EXPECT_EQ(error.exit_code(), 76);
  EXPECT_EQ(error.parts().what,
            "the plan exceeds the run's budget: $0.00 used and $12.50 planned of $10.00");
  EXPECT_EQ(error.parts().where, "budget.usd");
  EXPECT_THAT(error.parts().mend, HasSubstr("--over-budget"));
  refuse_over_budget(*ledger_, "", "", {12'500'000, {}}, {12'500'000, {}});
  refuse_over_budget(*ledger_, "", "", {1, {}}, {});  // no plan, nothing to refuse
  // A run that goes on: with what it has used already.
  const AttemptId attempt = spend(0.5, attempt_facts());
  error = refused(attempt.run, {{}, 3 * 3'600'000}, {{}, 3'600'001});
  EXPECT_EQ(error.parts().where, "budget.gpu_hours");
  EXPECT_THAT(error.parts().what, HasSubstr("2.000 GPU-hours used"));
  refuse_over_budget(*ledger_, attempt.run, "", {{}, 3 * 3'600'000}, {{}, 3'600'000});
}

TEST_F(BudgetTest, a_run_that_goes_on_is_judged_by_what_is_left_to_do_at_its_own_pace) {
  const AttemptId first = ledger_->begin_attempt(ledger_->begin_run(facts_), attempt_facts());
  EXPECT_FALSE(left_at_pace(*ledger_, first.run, 0, 100, std::nullopt).has_value());
  const auto book = [&](const AttemptId& attempt, Phase phase, std::int64_t seconds,
                        std::int64_t steps, std::int64_t step) {
    const SegmentFacts one{.phase = phase, .ms = seconds * 1000, .step = step, .steps = steps};
    ledger_->segments(attempt, std::span(&one, 1));
  };
  // Twenty steps in 200 s of each device, evaluation, saving and waiting included.
  book(first, Phase::load, 60, 0, 0);
  book(first, Phase::train, 170, 20, 20);
  book(first, Phase::stall, 10, 0, 20);
  book(first, Phase::evaluate, 15, 0, 20);
  book(first, Phase::checkpoint, 5, 0, 20);
  book(first, Phase::idle, 500, 0, 20);
  ledger_->end_attempt(first, RunStatus::stopped_user, 75, "preempted");
  const auto left = left_at_pace(*ledger_, first.run, 20, 100, 2'690'000);
  ASSERT_TRUE(left.has_value());
  EXPECT_EQ(left->device_ms, 4 * (80 * 10 + 60) * 1000);  // and loading once more
  EXPECT_EQ(left->usd_micros, cost_usd_micros(2'690'000, *left->device_ms));
  EXPECT_EQ(left->left, "the 80 steps left, at the pace of the 20 so far,");

  // 760 s of four devices are spent, 860 s to come.
  const std::int64_t needed = 4 * (760 + 860) * 1000;
  refuse_over_budget(*ledger_, first.run, "", {{}, needed}, *left);
  const Error error = error_of([&] {
    refuse_over_budget(*ledger_, first.run, "", {{}, needed - 4 * 360'000}, *left);
  });
  EXPECT_EQ(error.exit_code(), 76);
  EXPECT_EQ(error.parts().what,
            "0.9556 GPU-hours for the 80 steps left, at the pace of the 20 so far, are more than "
            "is left of the run's budget: 0.5556 GPU-hours of 1.400 GPU-hours");
  EXPECT_EQ(error.parts().where, "budget.gpu_hours");
  EXPECT_EQ(error.parts().mend,
            "Raise budget.gpu_hours. It must be 1.800 GPU-hours or more. With --resume "
            "--over-budget it goes on all the same, and is saved and stopped before the budget is "
            "spent.");
  // Spent beyond it: nothing is left, not less.
  EXPECT_THAT(error_of([&] {
                refuse_over_budget(*ledger_, first.run, "", {{}, 1}, *left);
              })
                  .parts()
                  .what,
              HasSubstr("0 GPU-hours of"));
  // A second attempt loads faster, since the first packed; steps done twice still tell the pace.
  const AttemptId second = ledger_->begin_attempt(first.run, attempt_facts());
  book(second, Phase::load, 20, 0, 0);
  book(second, Phase::train, 100, 10, 30);
  EXPECT_EQ(left_at_pace(*ledger_, first.run, 30, 100, std::nullopt)->device_ms,
            4 * (70 * 10 + 20) * 1000);
  EXPECT_FALSE(left_at_pace(*ledger_, first.run, 30, 100, std::nullopt)->usd_micros.has_value());
}

TEST_F(BudgetTest, a_projects_budget_counts_what_is_spent_and_what_others_have_planned) {
  ledger_->set_budget("team", {40'000'000, std::nullopt, "ada", 0});
  const AttemptId done = spend(1, attempt_facts());  // $10.76
  ledger_->end_attempt(done, RunStatus::succeeded, 0, "");
  AttemptFacts going = attempt_facts();
  going.planned_usd_micros = 20'000'000;
  spend(0.5, going);  // $5.38 of $20
  refuse_over_budget(*ledger_, "", "team", {}, {9'240'000, {}});
  const Error error = error_of([&] {
    refuse_over_budget(*ledger_, "", "team", {}, {9'240'001, {}});
  });
  EXPECT_EQ(error.fault(), Fault::budget);
  EXPECT_THAT(error.parts().what, HasSubstr("the budget of project team: $30.76 used"));
  EXPECT_THAT(error.parts().mend, HasSubstr("tailor runs budget team"));
  refuse_over_budget(*ledger_, "", "another", {}, {9'240'001, {}});
  clock_.pass(120'000);  // the other run has vanished: what it had planned is free again
  refuse_over_budget(*ledger_, "", "team", {}, {20'000'000, {}});
}

TEST_F(BudgetTest, a_run_is_warned_told_early_what_it_will_need_and_stopped_in_time) {
  const AttemptId attempt = spend(0, attempt_facts());
  BudgetWatch::Options options;
  options.own = {cost_usd_micros(2'690'000, 4 * 100'000), std::nullopt};  // 100 s
  options.devices = 4;
  options.usd_micros_per_device_hour = 2'690'000;
  options.steps = 500;
  BudgetWatch watch(*ledger_, attempt, options);
  std::vector<std::pair<std::int64_t, std::string>> events;
  std::int64_t stopped = 0;
  for (std::int64_t step = 1; step <= 500 && stopped == 0; ++step) {
    const auto verdict = watch.after_step(spent(static_cast<double>(step)), step, 5);
    if (!verdict.event.empty()) events.emplace_back(step, verdict.event);
    if (verdict.event == "budget_forecast") {
      EXPECT_THAT(verdict.say, HasSubstr("stopped about step 94 of 500"));
    }
    if (verdict.stop) stopped = step;
  }
  EXPECT_EQ(events, (std::vector<std::pair<std::int64_t, std::string>>{{6, "budget_forecast"},
                                                                       {74, "budget_warning"}}));
  EXPECT_EQ(stopped, 94);  // 94 s, a step and 5 s of saving
}

TEST_F(BudgetTest, without_a_limit_or_without_a_price_nothing_is_stopped) {
  const AttemptId attempt = spend(0, attempt_facts());
  BudgetWatch none(*ledger_, attempt, {});
  EXPECT_FALSE(none.after_step(spent(1e6), 1, 5).stop);
  BudgetWatch::Options options;
  options.own.usd_micros = 1;
  BudgetWatch unpriced(*ledger_, attempt, options);
  EXPECT_FALSE(unpriced.after_step({1'000'000, std::nullopt}, 1, 5).stop);
  options.own = {std::nullopt, 1};
  EXPECT_TRUE(BudgetWatch(*ledger_, attempt, options).after_step({2, std::nullopt}, 1, 0).stop);
}

TEST_F(BudgetTest, of_a_shared_budget_a_run_knows_what_the_others_use_and_that_they_go_on) {
  const AttemptId other = spend(1, attempt_facts());  // $10.76, four device-hours
  const AttemptId own = spend(0.5, attempt_facts());
  BudgetWatch::Options options;
  options.project = "team";
  EXPECT_FALSE(BudgetWatch(*ledger_, own, options).shared());
  ledger_->set_budget("team", {40'000'000, std::nullopt, "ada", 0});
  clock_.pass(10'000);
  ledger_->heartbeat(own);
  const BudgetWatch watch(*ledger_, own, options);
  const auto known = watch.shared();
  ASSERT_TRUE(known);
  EXPECT_EQ(known->limits.usd_micros, 40'000'000);
  EXPECT_FALSE(known->limits.device_ms);
  EXPECT_EQ(known->others_device_ms, 4 * (3'600'000 + 10'000));
  clock_.pass(5'000);
  EXPECT_EQ(watch.shared()->others_device_ms, 4 * (3'600'000 + 15'000));
  EXPECT_NEAR(watch.shared()->others_usd_micros,
              static_cast<double>(cost_usd_micros(2'690'000, 4 * (3'600'000 + 15'000))), 1);
  ledger_->end_attempt(other, RunStatus::succeeded, 0, "");
  EXPECT_EQ(BudgetWatch(*ledger_, own, options).shared()->others_device_ms, 4 * 3'600'000);
}

/// The machine's clock, `kSpeed` times as fast: a heartbeat passes in 750 ms, which a
/// process that waits for a core does not miss by much.
class FastClock final : public Clock {
 public:
  static constexpr std::int64_t kSpeed = 20;
  std::int64_t unix_ms() const override { return 1'795'474'800'000 + steady_ms(); }
  std::int64_t steady_ms() const override { return (real_.steady_ms() - began_) * kSpeed; }

 private:
  RealClock real_;
  std::int64_t began_ = real_.steady_ms();
};

TEST_F(BudgetTest, eight_runs_that_share_a_budget_overspend_it_by_a_heartbeat_each_at_most) {
  constexpr int kRuns = 8;
  constexpr std::int64_t kMicrosPerSecond = 1'000;  // of a device: $3.60 an hour
  constexpr std::int64_t kLimit = kRuns * kMicrosPerSecond * 60;
  ledger_->set_budget("team", {kLimit, std::nullopt, "ada", 0});
  const FastClock clock;
  std::vector<pid_t> children;
  for (int i = 0; i < kRuns; ++i) {
    const pid_t child = ::fork();
    if (child != 0) {
      children.push_back(child);
      continue;
    }
    try {
      const auto ledger = Ledger::open(place_, clock);
      AttemptFacts attempt_in = attempt_facts();
      attempt_in.devices = 1;
      attempt_in.usd_micros_per_device_hour = 3600 * kMicrosPerSecond;
      const AttemptId attempt = ledger->begin_attempt(ledger->begin_run(facts_), attempt_in);
      SegmentTimer timer(*ledger, attempt, Phase::train, SegmentTimer::Heartbeats::by_hand);
      BudgetWatch::Options options;
      options.project = "team";
      options.usd_micros_per_device_hour = attempt_in.usd_micros_per_device_hour;
      options.steps = 100'000;
      BudgetWatch watch(*ledger, attempt, options);
      std::int64_t refreshed = clock.steady_ms();
      for (std::int64_t step = 1;; ++step) {
        ::usleep(50'000);  // a second
        timer.step_done({.step = step, .tokens = 1, .trained_tokens = 1});
        if (clock.steady_ms() - refreshed >= kHeartbeatMs) {
          timer.flush();
          watch.refresh();
          refreshed = clock.steady_ms();
        }
        if (watch.after_step(timer.spent(), step, 2).stop) break;
      }
      timer.switch_to(Phase::checkpoint);
      ::usleep(100'000);  // saving
      timer.finish(RunStatus::stopped_budget, 76, "");
      ::_exit(0);
    } catch (const Error& error) {
      std::fprintf(stderr, "%s", to_text(error).c_str());
      ::_exit(1);
    }
  }
  for (const pid_t child : children) {
    int status = 0;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  const ProjectSpending all = open()->spending("team");
  std::printf("%lld of %lld micro-dollars, a heartbeat each is %lld\n",
              static_cast<long long>(all.usd_micros), static_cast<long long>(kLimit),
              static_cast<long long>(kRuns * kMicrosPerSecond * kHeartbeatMs / 1000));
  EXPECT_LE(all.usd_micros, kLimit + kRuns * kMicrosPerSecond * kHeartbeatMs / 1000);
  EXPECT_GE(all.usd_micros, kLimit * 7 / 10);  // nor is it left unused
  EXPECT_TRUE(all.running.empty());
}

}  // namespace
}  // namespace tailor
