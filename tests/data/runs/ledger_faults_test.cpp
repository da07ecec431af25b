// Processes that write at once and are killed; disks that are full.

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/wait.h>

#include <array>
#include <cstring>
#include <map>
#include <random>

#include "base/units.h"
#include "data/runs/run_folder.h"
#include "data/runs/segment_timer.h"
#include "data/runs/sqlite.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

using LedgerFaultsTest = RunsTest;

/// What a writer says after a call returned; smaller than PIPE_BUF, so never torn.
struct Acknowledged {
  std::array<char, 27> run;
  std::int64_t segments, ms;
};

[[noreturn]] void write_until_killed(const std::string& place, unsigned seed, int pipe) {
  const RealClock clock;
  std::mt19937 random(seed);
  try {
    const auto ledger = Ledger::open(place, clock);
    RunFacts facts;
    facts.name = "writer";
    AttemptFacts attempt_facts;
    attempt_facts.devices = 3;
    attempt_facts.usd_micros_per_device_hour = 1'190'007;
    Acknowledged done{};
    const std::string run = ledger->begin_run(facts);
    std::memcpy(done.run.data(), run.data(), run.size());
    const AttemptId attempt = ledger->begin_attempt(run, attempt_facts);
    while (true) {
      const SegmentFacts one{.phase = Phase::train,
                             .ms = static_cast<std::int64_t>(random() % 20'000),
                             .step = 1,
                             .steps = 1};
      ledger->segments(attempt, std::span(&one, 1));
      ++done.segments;
      done.ms += one.ms;
      if (::write(pipe, &done, sizeof done) != sizeof done) ::_exit(1);
    }
  } catch (const Error& error) {
    const std::string text = to_text(error);
    [[maybe_unused]] const ssize_t n = ::write(STDERR_FILENO, text.data(), text.size());
  }
  ::_exit(2);
}

TEST_F(LedgerFaultsTest, no_acknowledged_row_is_lost_when_writers_are_killed) {
  constexpr std::size_t kWriters = 8;
  constexpr int kKills = 60;
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC | O_NONBLOCK), 0);
  std::map<std::string, Acknowledged> acknowledged;
  std::int64_t count = 0;
  const auto drain = [&] {
    Acknowledged one{};
    while (::read(ends[0], &one, sizeof one) == sizeof one) {
      acknowledged[one.run.data()] = one;
      ++count;
    }
  };
  unsigned seed = 1;
  const auto start = [&]() -> pid_t {
    const pid_t child = ::fork();
    if (child == 0) write_until_killed(place_, seed, ends[1]);  // all create the file at once
    ++seed;
    return child;
  };
  std::array<pid_t, kWriters> writers{};
  for (pid_t& writer : writers) writer = start();
  std::mt19937 random(11);
  for (int kill_number = 0; kill_number < kKills; ++kill_number) {
    ::usleep(static_cast<useconds_t>(random() % 50'000));
    drain();
    pid_t& writer = writers[random() % kWriters];
    ::kill(writer, SIGKILL);
    int status = 0;
    ::waitpid(writer, &status, 0);
    EXPECT_TRUE(WIFSIGNALED(status)) << "a writer ended by itself: " << WEXITSTATUS(status);
    writer = start();
  }
  for (const pid_t writer : writers) {
    ::kill(writer, SIGKILL);
    ::waitpid(writer, nullptr, 0);
  }
  drain();
  ::close(ends[0]);
  ::close(ends[1]);

  if (kSqlite) {
    SqliteDatabase database(place_, SqliteDatabase::Mode::existing);
    auto check = database.prepare("PRAGMA integrity_check");
    ASSERT_TRUE(check.step());
    EXPECT_EQ(check.text(0), "ok");
  }
  const auto ledger = open();
  EXPECT_FALSE(acknowledged.empty());
  for (const auto& [run, last] : acknowledged) {
    const RunRecord record = ledger->read(run);
    const RunTotals totals = total(record);
    const auto segments = static_cast<std::int64_t>(record.segments.size());
    EXPECT_GE(segments, last.segments);  // the last may be in without having been acknowledged
    EXPECT_LE(segments, last.segments + 1);
    if (segments == last.segments) {
      EXPECT_EQ(totals.device_ms, 3 * last.ms);
    }
    EXPECT_EQ(totals.usd_micros, cost_usd_micros(1'190'007, totals.device_ms));
    EXPECT_EQ(totals.steps, segments);
  }
  RecordProperty("acknowledged", std::to_string(count));
  std::printf("%lld rows acknowledged, %d kills\n", static_cast<long long>(count), kKills);
}

/// A disk of 1 MiB below `folder`, for as long as it lives; needs root.
class SmallDisk {
 public:
  explicit SmallDisk(const fs::path& folder) : path_(folder / "disk") {
    make_folders(path_);
    mounted_ = ::mount("tmpfs", path_.c_str(), "tmpfs", 0, "size=1m") == 0;
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  ~SmallDisk() {
    if (mounted_) ::umount2(path_.c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }
  const fs::path& path() const { return path_; }
  void fill() const {
    try {
      FileWriter file(path_ / "filler");
      while (true) {
        file.write(std::string(4096, 'f'));
        file.flush();
      }
    } catch (const Error&) {
    }
  }
  void empty() const { fs::remove(path_ / "filler"); }

 private:
  fs::path path_;
  bool mounted_ = false;
};

TEST_F(LedgerFaultsTest, full_disk_is_an_io_error_and_nothing_acknowledged_is_lost) {
  if (!kSqlite) GTEST_SKIP() << "about files";
  const SmallDisk disk(folder_);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a small disk needs root";
  place_ = (disk.path() / "ledger.db").string();
  auto ledger = open();
  const std::string run = ledger->begin_run(run_facts());
  const AttemptId attempt = ledger->begin_attempt(run, attempt_facts());
  std::size_t acknowledged = 0;
  const std::string long_text(20'000, 't');
  const Error error = error_of([&] {
    for (;; ++acknowledged) ledger->event(attempt, 1, "warning", long_text);
  });
  EXPECT_EQ(error.fault(), Fault::io);
  EXPECT_EQ(error.exit_code(), 74);
  EXPECT_EQ(error.parts().where, place_);
  EXPECT_EQ(error.parts().what, "cannot write the database: No space left on device");
  EXPECT_GT(acknowledged, 5U);
  EXPECT_EQ(ledger->read(run).events.size(), acknowledged);
  ledger.reset();
  EXPECT_EQ(open()->read(run).events.size(), acknowledged);
}

TEST_F(LedgerFaultsTest, time_spent_while_the_disk_is_full_is_written_down_later) {
  if (!kSqlite) GTEST_SKIP() << "about files";
  const SmallDisk disk(folder_);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a small disk needs root";
  place_ = (disk.path() / "ledger.db").string();
  const auto ledger = open();
  const std::string run = ledger->begin_run(run_facts());
  const AttemptId attempt = ledger->begin_attempt(run, attempt_facts());
  SegmentTimer timer(*ledger, attempt, Phase::train, SegmentTimer::Heartbeats::by_hand);
  clock_.pass(1'000);
  timer.step_done({.step = 1, .tokens = 10, .trained_tokens = 5});
  timer.flush();
  disk.fill();
  clock_.pass(20'000);
  timer.step_done({.step = 2, .tokens = 10, .trained_tokens = 5});  // warns, goes on
  EXPECT_EQ(ledger->totals(run).device_ms, 4 * 1'000);
  EXPECT_EQ(timer.spent().device_ms, 4 * 21'000);
  EXPECT_EQ(error_of([&] { timer.flush(); }).fault(), Fault::io);
  disk.empty();
  clock_.pass(20'000);
  timer.step_done({.step = 3, .tokens = 10, .trained_tokens = 5});
  timer.finish(RunStatus::succeeded, 0, "");
  const RunTotals totals = ledger->totals(run);
  EXPECT_EQ(totals.device_ms, 4 * 41'000);
  EXPECT_EQ(totals.steps, 3);
}

TEST_F(LedgerFaultsTest, full_disk_is_told_before_any_work) {
  if (!kSqlite) GTEST_SKIP() << "about files";
  const SmallDisk disk(folder_);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a small disk needs root";
  disk.fill();
  const fs::path path = disk.path() / "run";
  Error error = error_of([&] { RunFolder::open(path, false, clock_); });
  EXPECT_EQ(error.fault(), Fault::io) << to_text(error);
  EXPECT_NE(error.parts().where.find(path.string()), std::string::npos);
  error = error_of([&] { require_free_bytes(disk.path(), 1'000'000'000, "two checkpoints"); });
  EXPECT_EQ(error.fault(), Fault::does_not_fit);
  EXPECT_EQ(error.parts().what, "1.00 GB of disk are needed for two checkpoints, 0 B are free");
  disk.empty();
  EXPECT_FALSE(RunFolder::open(path, false, clock_).resumed());  // the cut-short start is no hurdle
  disk.fill();
  error = error_of([&] { RunFolder::open(path, true, clock_); });
  EXPECT_EQ(error.fault(), Fault::io) << to_text(error);
  EXPECT_FALSE(RunFolder::run_in(path).empty());
}

}  // namespace
}  // namespace tailor
