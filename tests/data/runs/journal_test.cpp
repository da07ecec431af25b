// A ledger that cannot be written for a while, and what is made of that.

#include <gmock/gmock.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <random>

#include "base/units.h"
#include "data/runs/journaled_ledger.h"
#include "data/runs/segment_timer.h"
#include "data/runs/sqlite.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

using testing::HasSubstr;

constexpr int kPatienceMs = 300;

class JournalTest : public RunsTest {
 protected:
  void SetUp() override {
    RunsTest::SetUp();
    run_folder_ = folder_ / "run";
    make_folders(run_folder_);
  }
  std::unique_ptr<JournaledLedger> journaled() {
    return std::make_unique<JournaledLedger>(place_, run_folder_, clock_,
                                             JournaledLedger::Start::wait, kPatienceMs);
  }
  RunFacts facts() {
    RunFacts out = run_facts();
    out.run = run_;
    return out;
  }
  AttemptId begin(JournaledLedger& ledger, std::int64_t from_step = 0) {
    ledger.begin_run(facts());
    return ledger.begin_attempt(run_, attempt_facts(from_step));
  }
  /// A second of training, a heartbeat after the one before.
  void train(JournaledLedger& ledger, const AttemptId& attempt, std::int64_t step) {
    clock_.pass(kHeartbeatMs);
    const SegmentFacts one{.phase = Phase::train, .ms = kHeartbeatMs, .step = step, .steps = 1};
    ledger.segments(attempt, std::span(&one, 1));
  }

#ifdef TAILOR_TEST_POSTGRES
  void take_away() { the_postgres->stop(); }
  void bring_back() { the_postgres->start(); }
#else
  /// Another process holds the file, as a backup or a network disk might.
  void take_away() {
    holder_ = std::make_unique<SqliteDatabase>(place_, SqliteDatabase::Mode::existing);
    holder_->execute("BEGIN EXCLUSIVE");
  }
  void bring_back() { holder_.reset(); }
  std::unique_ptr<SqliteDatabase> holder_;
#endif

  fs::path run_folder_;
  std::string run_ = new_ulid(1'795'474'800'000);
};

TEST_F(JournalTest, while_the_ledger_is_away_the_run_goes_on_and_nothing_is_lost_or_doubled) {
  const auto ledger = journaled();
  const AttemptId attempt = begin(*ledger);
  train(*ledger, attempt, 1);
  EXPECT_TRUE(ledger->journal().empty());
  testing::internal::CaptureStderr();
  take_away();
  train(*ledger, attempt, 2);
  train(*ledger, attempt, 3);
  ledger->artifact(attempt, {"adapter", "/tmp/a", 3, 123, "ff"});
  ledger->event(attempt, 3, "warning", "text");
  EXPECT_FALSE(ledger->connected());
  EXPECT_TRUE(fs::exists(ledger->journal()));
  EXPECT_EQ(ledger->totals(run_).device_ms, 4 * 3 * kHeartbeatMs);  // all is known meanwhile
  bring_back();
  train(*ledger, attempt, 4);
  EXPECT_TRUE(ledger->connected());
  EXPECT_TRUE(journals_in(run_folder_).empty());
  train(*ledger, attempt, 5);
  ledger->end_attempt(attempt, RunStatus::succeeded, 0, "");
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_THAT(said, HasSubstr("the ledger cannot be written, the run goes on"));
  EXPECT_EQ(said.find("cannot be written"), said.rfind("cannot be written")) << said;  // once
  EXPECT_THAT(said, HasSubstr("the ledger can be written again"));

  const RunRecord record = open()->read(run_);
  const RunTotals totals = total(record);
  EXPECT_EQ(record.segments.size(), 5U);
  EXPECT_EQ(record.artifacts.size(), 1U);
  EXPECT_EQ(record.events.size(), 1U);
  EXPECT_EQ(totals.device_ms, 4 * 5 * kHeartbeatMs);
  EXPECT_EQ(totals.usd_micros, cost_usd_micros(2'690'000, totals.device_ms));
  EXPECT_EQ(record.attempts[0].status, RunStatus::succeeded);
}

TEST_F(JournalTest, a_run_that_ends_while_the_ledger_is_away_is_taken_in_by_the_next_attempt) {
  open();
  take_away();
  {
    const auto ledger = journaled();
    const AttemptId attempt = begin(*ledger);
    train(*ledger, attempt, 1);
    ledger->end_attempt(attempt, RunStatus::preempted, 75, "TERM");
    EXPECT_EQ(ledger->read(run_).attempts.back().status, RunStatus::preempted);
  }
  ASSERT_EQ(journals_in(run_folder_).size(), 1U);
  {
    const auto ledger = journaled();  // still away: what is known comes from the journals
    const AttemptId attempt = begin(*ledger, 1);
    EXPECT_EQ(attempt.attempt, 2);
    train(*ledger, attempt, 2);
    EXPECT_EQ(ledger->totals(run_).device_ms, 4 * 2 * kHeartbeatMs);
  }
  ASSERT_EQ(journals_in(run_folder_).size(), 2U);
  bring_back();
  const auto ledger = journaled();
  const AttemptId attempt = begin(*ledger, 1);
  EXPECT_EQ(attempt.attempt, 3);
  EXPECT_TRUE(journals_in(run_folder_).empty());
  const RunRecord record = open()->read(run_);
  ASSERT_EQ(record.attempts.size(), 3U);
  EXPECT_EQ(record.attempts[0].status, RunStatus::preempted);
  EXPECT_EQ(record.attempts[0].exit_code, 75);
  EXPECT_EQ(record.attempts[1].status, RunStatus::lost);  // it never said how it ended
  EXPECT_EQ(total(record).device_ms, 4 * 2 * kHeartbeatMs);
}

TEST_F(JournalTest, a_journal_is_replayed_by_hand_and_a_torn_line_is_left_out) {
  open();
  take_away();
  {
    const auto ledger = journaled();
    const AttemptId attempt = begin(*ledger);
    train(*ledger, attempt, 1);
  }
  bring_back();
  const fs::path journal = journals_in(run_folder_).at(0);
  EXPECT_EQ(journal_place(journal), place_);
  const std::string whole = read_text(journal);
  write_atomically(journal, whole + R"({"number": 9, "run": "x", "hea)");
  const auto ledger = open();
  EXPECT_EQ(replay_journals(run_folder_, *ledger).entries, 3);
  EXPECT_TRUE(journals_in(run_folder_).empty());
  write_atomically(journal, whole);  // a copy of the folder, replayed again
  replay_journals(run_folder_, *ledger);
  EXPECT_EQ(ledger->totals(run_).device_ms, 4 * kHeartbeatMs);

  write_atomically(journal, whole.substr(0, 40) + "#" + whole.substr(41));
  const Error error = error_of([&] { replay_journals(run_folder_, *ledger); });
  EXPECT_EQ(error.fault(), Fault::bad_file);
  EXPECT_THAT(error.parts().where, HasSubstr(journal.string()));
  EXPECT_TRUE(fs::exists(journal));
}

TEST_F(JournalTest, a_process_killed_anywhere_between_ledger_and_journal_is_counted_once) {
  open();
  std::mt19937 random(5);
  std::int64_t acknowledged = 0;
  for (int round = 0; round < 8; ++round) {
    int pipe[2];
    ASSERT_EQ(::pipe(pipe), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      const RealClock clock;
      try {
        JournaledLedger ledger(place_, run_folder_, clock, JournaledLedger::Start::wait, 20);
        ledger.begin_run(facts());
        const AttemptId attempt = ledger.begin_attempt(run_, attempt_facts());
        while (true) {
          const SegmentFacts one{.phase = Phase::train, .ms = 10, .step = 1, .steps = 1};
          ledger.segments(attempt, std::span(&one, 1));
          if (::write(pipe[1], "1", 1) != 1) ::_exit(1);
        }
      } catch (const Error& error) {
        std::fprintf(stderr, "%s", to_text(error).c_str());
      }
      ::_exit(2);
    }
    ::close(pipe[1]);
    ::usleep(static_cast<useconds_t>(100'000 + random() % 100'000));
    const bool away = round % 2 == 1;
    if (away) {
      take_away();
      ::usleep(static_cast<useconds_t>(100'000 + random() % 100'000));
    }
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    if (away) bring_back();
    char one = 0;
    while (::read(pipe[0], &one, 1) == 1) ++acknowledged;
    ::close(pipe[0]);
  }
  const auto ledger = open();
  replay_journals(run_folder_, *ledger);
  const RunRecord record = ledger->read(run_);
  std::int64_t train = 0;
  for (const SegmentRecord& segment : record.segments) {
    if (segment.facts.phase == Phase::train) ++train;
  }
  EXPECT_GT(acknowledged, 20);
  EXPECT_GE(train, acknowledged);
  EXPECT_LE(train, acknowledged + 8);  // the one under way when the kill came
}

TEST_F(JournalTest, a_timer_goes_on_over_an_outage) {
  const auto ledger = journaled();
  const AttemptId attempt = begin(*ledger);
  SegmentTimer timer(*ledger, attempt, Phase::train, SegmentTimer::Heartbeats::by_hand);
  for (int step = 1; step <= 40; ++step) {
    if (step == 10) take_away();
    if (step == 30) bring_back();
    clock_.pass(4'000);
    timer.step_done({.step = step, .tokens = 10, .trained_tokens = 5});
  }
  timer.finish(RunStatus::succeeded, 0, "");
  const RunTotals totals = open()->totals(run_);
  EXPECT_EQ(totals.device_ms, 4 * 160'000);
  EXPECT_EQ(totals.steps, 40);
  EXPECT_EQ(timer.spent().usd_micros, totals.usd_micros);
}

TEST_F(JournalTest, an_attempt_that_was_replaced_is_told_so) {
  const auto first = journaled();
  const AttemptId attempt = begin(*first);
  const auto second = journaled();
  begin(*second);
  EXPECT_EQ(error_of([&] { train(*first, attempt, 1); }).fault(), Fault::internal);
}

#ifdef TAILOR_TEST_POSTGRES

TEST_F(JournalTest, a_server_that_crashes_has_all_it_acknowledged_and_learns_the_rest) {
  const auto ledger = journaled();
  const AttemptId attempt = begin(*ledger);
  for (int step = 1; step <= 20; ++step) train(*ledger, attempt, step);
  the_postgres->crash();
  train(*ledger, attempt, 21);
  EXPECT_FALSE(ledger->connected());
  the_postgres->start();
  train(*ledger, attempt, 22);
  EXPECT_TRUE(ledger->connected());
  EXPECT_EQ(open()->totals(run_).device_ms, 4 * 22 * kHeartbeatMs);
}

TEST_F(JournalTest, a_server_that_hangs_does_not_hang_the_run) {
  const auto ledger = journaled();
  const AttemptId attempt = begin(*ledger);
  the_postgres->suspend();
  const double began = seconds_now();
  train(*ledger, attempt, 1);
  train(*ledger, attempt, 2);
  EXPECT_LT(seconds_now() - began, 5);
  EXPECT_FALSE(ledger->connected());
  the_postgres->resume();
  train(*ledger, attempt, 3);
  EXPECT_EQ(open()->totals(run_).device_ms, 4 * 3 * kHeartbeatMs);
}

TEST_F(JournalTest, a_new_run_is_refused_where_the_server_cannot_be_reached) {
  place_ = "postgresql://tailor:hunter2@/nowhere?host=/tmp/no/such/folder";
  const Error error = error_of([&] {
    JournaledLedger(place_, run_folder_, clock_, JournaledLedger::Start::refuse, kPatienceMs);
  });
  EXPECT_EQ(error.fault(), Fault::io);
  EXPECT_THAT(error.parts().what, HasSubstr("cannot reach the database"));
  EXPECT_EQ(to_text(error).find("hunter2"), std::string::npos) << to_text(error);
}

TEST_F(JournalTest, a_password_is_nowhere_to_be_seen) {
  std::string secret = place_;
  secret.replace(secret.find("tailor@"), 7, "tailor:hunter2@");
  testing::internal::CaptureStderr();
  JournaledLedger ledger(secret, run_folder_, clock_, JournaledLedger::Start::wait, kPatienceMs);
  const AttemptId attempt = begin(ledger);
  EXPECT_EQ(ledger.place(), place_);
  take_away();
  train(ledger, attempt, 1);
  EXPECT_EQ(read_text(ledger.journal()).find("hunter2"), std::string::npos);
  bring_back();
  train(ledger, attempt, 2);
  EXPECT_TRUE(ledger.connected());
  EXPECT_EQ(testing::internal::GetCapturedStderr().find("hunter2"), std::string::npos);
  EXPECT_EQ(open()->place().find("hunter2"), std::string::npos);
}

TEST_F(JournalTest, a_user_that_may_not_write_is_an_error_with_the_grant) {
  open();
  the_postgres->execute(database_,
                        "CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA tailor TO "
                        "reader; GRANT SELECT ON ALL TABLES IN SCHEMA tailor TO reader");
  const auto ledger = Ledger::open(the_postgres->address(database_, "reader"), clock_);
  EXPECT_TRUE(ledger->runs().empty());
  const Error error = error_of([&] { ledger->begin_run(run_facts()); });
  EXPECT_EQ(error.fault(), Fault::io);
  EXPECT_THAT(error.parts().what, HasSubstr("permission denied"));
}

#else

TEST_F(JournalTest, read_only_and_damaged_ledgers_are_set_right_later) {
  for (const bool damaged : {false, true}) {
    run_ = new_ulid(damaged ? 2 : 1);
    open();
    const std::string good = read_text(place_);
    if (damaged) {
      write_atomically(place_, std::string(good.size(), 'x'));
    } else {
      // Root may write to any file; a folder in its place no one can.
      fs::rename(place_, place_ + ".away");
      make_folders(place_);
    }
    const auto ledger = journaled();
    const AttemptId attempt = begin(*ledger);
    train(*ledger, attempt, 1);
    EXPECT_FALSE(ledger->connected());
    if (damaged) {
      write_atomically(place_, good);
    } else {
      fs::remove(place_);
      fs::rename(place_ + ".away", place_);
    }
    train(*ledger, attempt, 2);
    EXPECT_TRUE(ledger->connected());
    EXPECT_EQ(open()->totals(run_).device_ms, 4 * 2 * kHeartbeatMs) << damaged;
  }
}

#endif

}  // namespace
}  // namespace tailor
