#include "data/runs/ledger.h"

#include <sqlite3.h>

#include <random>
#include <set>
#include <thread>

#include "base/units.h"
#include "data/runs/ledger_entry.h"
#include "data/runs/postgres.h"
#include "data/runs/sqlite.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

class LedgerTest : public RunsTest {
 protected:
  /// The database itself, to look at or to change behind the ledger's back.
  std::unique_ptr<SqlDatabase> database() const {
    if (kSqlite) return std::make_unique<SqliteDatabase>(place_, SqliteDatabase::Mode::existing);
    return std::make_unique<PostgresDatabase>(place_);
  }
};

TEST_F(LedgerTest, first_use_makes_folders_and_schema) {
  EXPECT_EQ(Ledger::open_existing(place_, clock_), nullptr);
  EXPECT_FALSE(fs::exists(folder_ / "deep"));
  EXPECT_TRUE(open()->runs().empty());
  EXPECT_EQ(fs::exists(place_), kSqlite);
  EXPECT_NE(Ledger::open_existing(place_, clock_), nullptr);
}

TEST_F(LedgerTest, gives_back_what_was_recorded) {
  const auto ledger = open();
  RunFacts facts = run_facts();
  facts.usd_micros_limit = 60'000'000;
  const std::string run = ledger->begin_run(facts);
  EXPECT_EQ(run.size(), 26U);
  AttemptFacts attempt_in = attempt_facts();
  attempt_in.launcher = "slurm";
  attempt_in.launcher_job = "1234.1";
  attempt_in.held_ms_before = 700;
  const AttemptId attempt = ledger->begin_attempt(run, attempt_in);
  EXPECT_EQ(attempt, (AttemptId{run, 1}));
  clock_.pass(1000);
  const SegmentFacts train{.phase = Phase::train,
                           .ms = 1000,
                           .step = 5,
                           .steps = 5,
                           .tokens = 5000,
                           .trained_tokens = 1200,
                           .busy_device_ms = 3500,
                           .energy_mj = 99};
  ledger->segments(attempt, std::span(&train, 1));
  ledger->artifact(attempt, {"adapter", "/tmp/a", 5, 123, "ff"});
  ledger->artifact(attempt, {"adapter", "/tmp/a", 6, 124, "fe"});
  ledger->event(attempt, 5, "warning", "text with 'quotes' and \n lines");
  ledger->end_attempt(attempt, RunStatus::failed, 69, "rank 3 died");

  const RunRecord record = ledger->read(run);
  EXPECT_EQ(record.facts.name, "demo");
  EXPECT_EQ(record.facts.seed, 42);
  EXPECT_EQ(record.facts.usd_micros_limit, 60'000'000);
  EXPECT_FALSE(record.facts.device_ms_limit.has_value());
  ASSERT_EQ(record.attempts.size(), 1U);
  const AttemptRecord& back = record.attempts[0];
  EXPECT_EQ(back.facts.launcher, "slurm");
  EXPECT_EQ(back.facts.launcher_job, "1234.1");
  EXPECT_EQ(back.facts.price_id, attempt_in.price_id);
  EXPECT_EQ(back.facts.price_source, attempt_in.price_source);
  EXPECT_EQ(back.status, RunStatus::failed);
  EXPECT_EQ(back.exit_code, 69);
  EXPECT_EQ(back.reason, "rank 3 died");
  EXPECT_FALSE(back.estimated);
  ASSERT_EQ(record.segments.size(), 2U);
  EXPECT_EQ(record.segments[0].facts.phase, Phase::start);
  EXPECT_EQ(record.segments[0].device_ms, 4 * 700);
  EXPECT_EQ(record.segments[1].from_ms, 700);
  EXPECT_EQ(record.segments[1].facts.energy_mj, 99);
  ASSERT_EQ(record.artifacts.size(), 2U);
  EXPECT_TRUE(record.artifacts[0].deleted);
  EXPECT_FALSE(record.artifacts[1].deleted);
  ASSERT_EQ(record.events.size(), 1U);
  EXPECT_EQ(record.events[0].text, "text with 'quotes' and \n lines");
  EXPECT_EQ(record.status(clock_.unix_ms()), RunStatus::failed);

  const RunTotals totals = ledger->totals(run);
  EXPECT_EQ(totals.device_ms, 4 * 1700);
  EXPECT_EQ(totals.usd_micros, cost_usd_micros(2'690'000, 4 * 1700));
  EXPECT_EQ(totals.busy_device_ms, 3500);
}

TEST_F(LedgerTest, segments_add_up_to_the_attempts_cost_to_the_micro_dollar) {
  const auto ledger = open();
  const std::string run = ledger->begin_run(run_facts());
  AttemptFacts facts = attempt_facts();
  facts.devices = 3;
  facts.usd_micros_per_device_hour = 2'690'001;
  const AttemptId attempt = ledger->begin_attempt(run, facts);
  std::mt19937 random(7);
  std::vector<SegmentFacts> segments;
  std::int64_t ms = 0;
  for (int i = 0; i < 5000; ++i) {
    segments.push_back({.phase = kPhases[random() % kPhases.size()],
                        .ms = static_cast<std::int64_t>(random() % 400)});
    ms += segments.back().ms;
  }
  ledger->segments(attempt, segments);
  const RunTotals totals = ledger->totals(run);
  EXPECT_EQ(totals.device_ms, 3 * ms);
  EXPECT_EQ(totals.usd_micros, cost_usd_micros(2'690'001, 3 * ms));
  std::int64_t phase_ms = 0;
  std::int64_t phase_usd = 0;
  for (const Phase phase : kPhases) {
    phase_ms += totals.of(phase).device_ms;
    phase_usd += totals.of(phase).usd_micros.value();
  }
  EXPECT_EQ(phase_ms, totals.device_ms);
  EXPECT_EQ(phase_usd, totals.usd_micros);
}

TEST_F(LedgerTest, without_a_price_cost_is_null_with_the_reason_never_zero) {
  const auto ledger = open();
  const std::string run = ledger->begin_run(run_facts());
  EXPECT_FALSE(ledger->totals(run).usd_micros.has_value());
  const AttemptId first = ledger->begin_attempt(run, attempt_facts());
  const SegmentFacts second_long{.phase = Phase::train, .ms = 1000};
  ledger->segments(first, std::span(&second_long, 1));
  ledger->end_attempt(first, RunStatus::preempted, 75, "SIGTERM");
  EXPECT_TRUE(ledger->totals(run).usd_micros.has_value());

  AttemptFacts unpriced = attempt_facts();
  unpriced.usd_micros_per_device_hour.reset();
  unpriced.no_price_reason = "no price for sku 'cpu'";
  const AttemptId second = ledger->begin_attempt(run, unpriced);
  ledger->segments(second, std::span(&second_long, 1));
  const RunTotals totals = ledger->totals(run);
  EXPECT_FALSE(totals.usd_micros.has_value());
  EXPECT_EQ(totals.usd_null_reason, "no price for sku 'cpu'");
  EXPECT_FALSE(totals.of(Phase::train).usd_micros.has_value());
  EXPECT_EQ(totals.device_ms, 8000);
  EXPECT_TRUE(total(ledger->read(run), 1).usd_micros.has_value());
}

TEST_F(LedgerTest, a_killed_attempt_is_closed_at_its_last_heartbeat_by_the_next_one) {
  const auto ledger = open();
  const std::string run = ledger->begin_run(run_facts());
  const AttemptId first = ledger->begin_attempt(run, attempt_facts());
  clock_.pass(10'000);
  const SegmentFacts load{.phase = Phase::load, .ms = 10'000};
  ledger->segments(first, std::span(&load, 1));
  clock_.pass(4'000);
  ledger->heartbeat(first);
  clock_.pass(61'000);  // killed in here
  EXPECT_EQ(ledger->read(run).status(clock_.unix_ms()), RunStatus::lost);

  const auto other = open();
  const AttemptId second = other->begin_attempt(run, attempt_facts());
  EXPECT_EQ(second.attempt, 2);
  const RunRecord record = other->read(run);
  const AttemptRecord& closed = record.attempts[0];
  EXPECT_EQ(closed.status, RunStatus::lost);
  EXPECT_TRUE(closed.estimated);
  EXPECT_EQ(closed.ended_unix_ms.value() - closed.began_unix_ms, 14'000);
  const RunTotals totals = total(record);
  EXPECT_TRUE(totals.estimated);
  EXPECT_EQ(totals.device_ms, 4 * 14'000);
  EXPECT_EQ(totals.of(Phase::lost).device_ms, 4 * 4'000);
  EXPECT_EQ(record.events.size(), 1U);
  EXPECT_EQ(record.status(clock_.unix_ms()), RunStatus::running);

  // Should the first process still be alive after all, it learns that it was replaced.
  const Error error = error_of([&] { ledger->segments(first, std::span(&load, 1)); });
  EXPECT_EQ(error.fault(), Fault::internal);
  EXPECT_EQ(error.parts().what, "the attempt is closed already (lost)");
  EXPECT_EQ(ledger->totals(run).device_ms, 4 * 14'000);
}

TEST_F(LedgerTest, steps_done_again_are_lost) {
  const auto ledger = open();
  const std::string run = ledger->begin_run(run_facts());
  AttemptId attempt = ledger->begin_attempt(run, attempt_facts());
  const auto train = [](std::int64_t ms, std::int64_t step, std::int64_t steps) {
    return SegmentFacts{.phase = Phase::train,
                        .ms = ms,
                        .step = step,
                        .steps = steps,
                        .tokens = 100 * steps,
                        .trained_tokens = 10 * steps};
  };
  ledger->segments(attempt, std::vector<SegmentFacts>{
                                {.phase = Phase::load, .ms = 300},
                                train(1000, 10, 10),
                                {.phase = Phase::checkpoint, .ms = 50, .step = 10},
                                train(400, 14, 4),
                                {.phase = Phase::evaluate, .ms = 20, .step = 14},
                                {.phase = Phase::checkpoint, .ms = 30, .step = 14},  // not whole
                                train(70, 14, 0)});
  attempt = ledger->begin_attempt(run, attempt_facts(10));
  ledger->segments(attempt, std::vector<SegmentFacts>{train(1000, 20, 10)});
  RunTotals totals = ledger->totals(run);
  EXPECT_EQ(totals.of(Phase::lost).device_ms, 4 * (400 + 20 + 30 + 70));
  EXPECT_EQ(totals.of(Phase::load).device_ms, 4 * 300);
  EXPECT_EQ(totals.of(Phase::checkpoint).device_ms, 4 * 50);
  EXPECT_EQ(totals.of(Phase::evaluate).device_ms, 0);
  EXPECT_EQ(totals.steps, 24);
  EXPECT_EQ(totals.useful_steps, 20);
  EXPECT_EQ(totals.useful_tokens, 2000);
  EXPECT_EQ(totals.useful_trained_tokens, 200);

  // A third attempt falls back behind both, into the middle of a stretch: it is cut by steps.
  attempt = ledger->begin_attempt(run, attempt_facts(5));
  totals = ledger->totals(run);
  EXPECT_EQ(totals.useful_steps, 5);
  EXPECT_EQ(totals.of(Phase::train).device_ms, 4 * 500);
  std::int64_t sum = 0;
  for (const Phase phase : kPhases) sum += totals.of(phase).device_ms;
  EXPECT_EQ(sum, totals.device_ms);
}

TEST_F(LedgerTest, cost_follows_the_steady_clock_whatever_the_wall_clock_does) {
  const auto ledger = open();
  const std::string run = ledger->begin_run(run_facts());
  const AttemptId first = ledger->begin_attempt(run, attempt_facts());
  for (const std::int64_t jump : {3'600'000, -3'600'000, -86'400'000}) {
    clock_.pass(1'000);
    clock_.jump(jump);
    ledger->heartbeat(first);
  }
  ledger->begin_attempt(run, attempt_facts());
  const RunTotals totals = ledger->totals(run);
  EXPECT_EQ(totals.device_ms, 4 * 3'000);
  for (const SegmentRecord& segment : ledger->read(run).segments) EXPECT_GE(segment.device_ms, 0);
}

TEST_F(LedgerTest, runs_are_found_by_identifier_beginning_name_and_folder) {
  const auto ledger = open();
  const std::string a = ledger->begin_run(run_facts("first"));
  clock_.pass(50'000);
  const std::string b = ledger->begin_run(run_facts("second"));
  EXPECT_EQ(ledger->runs(), (std::vector{b, a}));
  EXPECT_EQ(ledger->find_run(a), a);
  EXPECT_EQ(ledger->find_run(a.substr(0, 12)), a);
  EXPECT_EQ(ledger->find_run("second"), b);
  EXPECT_EQ(ledger->find_run("third"), std::nullopt);
  EXPECT_EQ(ledger->find_run("%%%%"), std::nullopt);
  EXPECT_EQ(error_of([&] { ledger->find_run(a.substr(0, 4)); }).fault(), Fault::usage);
  EXPECT_EQ(ledger->run_in_folder("/tmp/runs/first"), a);
  EXPECT_EQ(ledger->run_in_folder("/tmp/runs"), std::nullopt);
  EXPECT_EQ(error_of([&] { ledger->read("nothing"); }).fault(), Fault::usage);
}

TEST_F(LedgerTest, a_resumed_run_keeps_its_identifier_and_learns_its_new_folder) {
  const auto ledger = open();
  RunFacts facts = run_facts();
  facts.run = new_ulid(clock_.unix_ms());
  EXPECT_EQ(ledger->begin_run(facts), facts.run);
  facts.output_dir = "/elsewhere";
  EXPECT_EQ(ledger->begin_run(facts), facts.run);
  EXPECT_EQ(ledger->runs().size(), 1U);
  EXPECT_EQ(ledger->run_in_folder("/elsewhere"), facts.run);
}

TEST_F(LedgerTest, segments_cannot_be_changed) {
  {
    const auto ledger = open();
    const AttemptId attempt =
        ledger->begin_attempt(ledger->begin_run(run_facts()), attempt_facts());
    const SegmentFacts one{.ms = 1};
    ledger->segments(attempt, std::span(&one, 1));
  }
  EXPECT_THROW(database()->execute("UPDATE segment SET device_ms = 0"), Error);
  EXPECT_THROW(database()->execute("DELETE FROM segment"), Error);
}

TEST_F(LedgerTest, newer_schema_is_refused) {
  open();
  database()->execute("UPDATE meta SET value = '3' WHERE key = 'schema_version'");
  const Error error = error_of([&] { open(); });
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_EQ(error.parts().what, "the ledger has schema version 3, this Tailor knows version 2");
  EXPECT_EQ(error.parts().where, place_);
}

TEST_F(LedgerTest, other_files_are_refused_by_name) {
  if (!kSqlite) GTEST_SKIP() << "about files";
  make_folders(fs::path(place_).parent_path());
  write_atomically(place_, std::string(10'000, 'x'));
  Error error = error_of([&] { open(); });
  EXPECT_EQ(error.fault(), Fault::bad_file);
  EXPECT_EQ(error.parts().where, place_);
  EXPECT_EQ(read_text(place_), std::string(10'000, 'x'));

  fs::remove(place_);
  SqliteDatabase(place_, SqliteDatabase::Mode::create).execute("CREATE TABLE songs (name TEXT)");
  error = error_of([&] { open(); });
  EXPECT_EQ(error.fault(), Fault::bad_file);
  EXPECT_EQ(error.parts().where, place_);

  error = error_of([&] { Ledger::open("mysql://db/team", clock_); });
  EXPECT_EQ(error.fault(), Fault::usage);
  error = error_of([&] { Ledger::open(folder_.string(), clock_); });
  EXPECT_EQ(error.fault(), Fault::io);
  EXPECT_EQ(error.parts().where, folder_.string());
}

TEST_F(LedgerTest, damage_inside_the_file_is_an_error_that_names_it) {
  if (!kSqlite) GTEST_SKIP() << "about files";
  {
    const auto ledger = open();
    RunFacts facts = run_facts();
    facts.recipe_text.assign(100'000, 'r');
    ledger->begin_attempt(ledger->begin_run(facts), attempt_facts());
  }
  std::string bytes = read_text(place_);
  int refused = 0;
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    std::string damaged = bytes;
    for (int i = 0; i < 40; ++i) {
      damaged[random() % damaged.size()] = static_cast<char>(random());
    }
    write_atomically(place_, damaged);
    try {
      const auto ledger = open();
      for (const std::string& run : ledger->runs()) ledger->read(run);
    } catch (const Error& error) {  // anything else fails the test
      ++refused;
      EXPECT_NE(error.parts().where.find(place_), std::string::npos) << to_text(error);
    }
  }
  EXPECT_GT(refused, 0);
}

TEST_F(LedgerTest, threads_share_one_ledger) {
  const auto ledger = open();
  const std::string run = ledger->begin_run(run_facts());
  const AttemptId attempt = ledger->begin_attempt(run, attempt_facts());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 25; ++i) {
        const SegmentFacts one{.phase = Phase::train, .ms = 7};
        ledger->segments(attempt, std::span(&one, 1));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(ledger->totals(run).device_ms, 4 * 7 * 100);
}

TEST_F(LedgerTest, a_ledger_of_version_1_is_brought_up_to_date) {
  {
    const auto ledger = open();
    const AttemptId attempt =
        ledger->begin_attempt(ledger->begin_run(run_facts()), attempt_facts());
    const SegmentFacts one{.ms = 1000};
    ledger->segments(attempt, std::span(&one, 1));
  }
  const auto at = database();
  at->execute(
      "DROP TABLE budget; DROP TABLE journal; DROP INDEX run_by_project; "
      "ALTER TABLE run DROP COLUMN owner; ALTER TABLE attempt DROP COLUMN planned_device_ms; "
      "ALTER TABLE attempt DROP COLUMN planned_usd_micros; "
      "UPDATE meta SET value = '1' WHERE key = 'schema_version'");
  const auto ledger = open();
  ASSERT_EQ(ledger->runs().size(), 1U);
  EXPECT_EQ(ledger->totals(ledger->runs()[0]).device_ms, 4'000);
  ledger->set_budget("p", {});
  auto row = at->prepare("SELECT value FROM meta WHERE key = 'schema_version'");
  ASSERT_TRUE(row.step());
  EXPECT_EQ(row.text(0), "2");
}

TEST_F(LedgerTest, a_numbered_entry_is_taken_once) {
  const auto ledger = open();
  LedgerEntry entry;
  entry.journal = new_ulid(1);
  entry.attempt.run = new_ulid(2);
  entry.unix_ms = clock_.unix_ms();
  const auto offer = [&](std::int64_t number, LedgerEntry::What what) {
    entry.number = number;
    entry.what = std::move(what);
    return ledger->apply(entry);
  };
  for (int twice = 0; twice < 2; ++twice) {
    offer(1, run_facts());
    EXPECT_EQ(offer(2, attempt_facts()), (AttemptId{entry.attempt.run, 1}));
    EXPECT_EQ(offer(3, std::vector<SegmentFacts>{{.ms = 500}, {.ms = 7}}).attempt, 1);
    offer(4, EventFacts{3, "warning", "once"});
  }
  offer(4, EventFacts{3, "warning", "an older number"});
  offer(7, EndFacts{RunStatus::succeeded, 0, ""});
  const RunRecord record = ledger->read(entry.attempt.run);
  EXPECT_EQ(record.attempts.size(), 1U);
  EXPECT_EQ(record.segments.size(), 2U);
  EXPECT_EQ(record.events.size(), 1U);
  EXPECT_EQ(total(record).device_ms, 4 * 507);
  EXPECT_EQ(record.attempts[0].status, RunStatus::succeeded);
}

TEST_F(LedgerTest, entries_survive_the_way_through_json) {
  RunFacts run = run_facts();
  run.owner = "ada";
  run.usd_micros_limit = 5;
  AttemptFacts attempt = attempt_facts(12);
  attempt.planned_device_ms = 77;
  const std::vector<LedgerEntry::What> all = {
      run,
      attempt,
      std::vector<SegmentFacts>{{.phase = Phase::stall, .ms = 3, .energy_mj = 9}},
      HeartbeatFacts{},
      EndFacts{RunStatus::preempted, 75, "TERM"},
      ArtifactFacts{"adapter", "/a", 3, 4, "ff"},
      DeletedFacts{"/a"},
      EventFacts{{}, "k", "t\n\"x\""}};
  for (const LedgerEntry::What& what : all) {
    LedgerEntry in;
    in.number = 5;
    in.attempt.run = "R";
    in.unix_ms = 11;
    in.ms = 22;
    in.what = what;
    const LedgerEntry out = entry_from_json(entry_json(in), "here");
    EXPECT_EQ(out.what.index(), what.index());
    EXPECT_EQ(entry_json(out).dump(), entry_json(in).dump());
    EXPECT_EQ(out.number, 5);
    EXPECT_EQ(out.ms, 22);
    if (const auto* back = std::get_if<AttemptFacts>(&out.what)) {
      EXPECT_EQ(back->planned_device_ms, 77);
      EXPECT_EQ(back->resumed_from_step, 12);
    }
  }
}

TEST_F(LedgerTest, a_projects_spending_and_its_newest_budget) {
  const auto ledger = open();
  EXPECT_FALSE(ledger->budget("p").has_value());
  ledger->set_budget("p", {5'000'000, std::nullopt, "ada", 0});
  ledger->set_budget("q", {1, 2, "eve", 0});
  ledger->set_budget("p", {9'000'000, 3'600'000, "ada", 0});
  const auto budget = ledger->budget("p");
  ASSERT_TRUE(budget.has_value());
  EXPECT_EQ(budget->usd_micros_limit, 9'000'000);
  EXPECT_EQ(budget->device_ms_limit, 3'600'000);
  EXPECT_EQ(budget->set_by, "ada");
  RunFacts facts = run_facts("a");
  facts.project = "p";
  const SegmentFacts second_long{.phase = Phase::train, .ms = 1000};
  const AttemptId done = ledger->begin_attempt(ledger->begin_run(facts), attempt_facts());
  ledger->segments(done, std::span(&second_long, 1));
  ledger->end_attempt(done, RunStatus::succeeded, 0, "");
  AttemptFacts planned = attempt_facts();
  planned.planned_device_ms = 40'000;
  const AttemptId going = ledger->begin_attempt(ledger->begin_run(facts), planned);
  ledger->segments(going, std::span(&second_long, 1));
  facts.project = "other";
  ledger->segments(ledger->begin_attempt(ledger->begin_run(facts), attempt_facts()),
                   std::span(&second_long, 1));
  const ProjectSpending spending = ledger->spending("p");
  EXPECT_EQ(spending.device_ms, 8'000);
  EXPECT_EQ(spending.usd_micros, 2 * cost_usd_micros(2'690'000, 4'000));
  EXPECT_FALSE(spending.unpriced);
  ASSERT_EQ(spending.running.size(), 1U);
  EXPECT_EQ(spending.running[0].attempt, going);
  EXPECT_EQ(spending.running[0].device_ms, 4'000);
  EXPECT_EQ(spending.running[0].planned_device_ms, 40'000);
  EXPECT_EQ(ledger->spending("nothing").device_ms, 0);
}

TEST(Ulid, sorts_by_time_and_differs) {
  EXPECT_LT(new_ulid(1'000), new_ulid(1'001));
  EXPECT_EQ(new_ulid(1'469'922'850'259).substr(0, 10), "01ARZ3NDEK");  // the specification's
  std::set<std::string> seen;
  for (int i = 0; i < 1000; ++i) seen.insert(new_ulid(5));
  EXPECT_EQ(seen.size(), 1000U);
}

}  // namespace
}  // namespace tailor
