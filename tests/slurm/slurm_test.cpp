// `tailor launch slurm` on a real Slurm (cluster.sh): submit, follow, fail, cancel, preempt and
// requeue, status. The ranks are payload.py, in one test `tailor train`; where Slurm cannot be had
// the tests say SKIPPED.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <set>

#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"
#include "data/runs/ledger.h"
#include "tests/tools/program.h"
#include "tools/launch/client.h"

namespace tailor::testing_support {
namespace {

using testing::Each;
using testing::HasSubstr;
using testing::Not;

constexpr const char* kFolder = TAILOR_SOURCE_DIR "/tests/slurm";

/// One cluster for all tests of this process.
class Cluster : public testing::Environment {
 public:
  void SetUp() override {
    folder_ = std::make_unique<Sandbox>();
    // The database runs as a user of its own and must be able to pass through.
    fs::permissions(folder_->root(), fs::perms::group_exec | fs::perms::others_exec,
                    fs::perm_options::add);
    const fs::path place = folder_->root() / "slurm";
    const ClientOutcome outcome =
        run_client({std::string(kFolder) + "/cluster.sh", "start", place.string()});
    if (outcome.code != 0) {
      problem_ = outcome.code == 77 ? std::string(trim(outcome.out)) : "";
      ASSERT_EQ(outcome.code, 77) << outcome.out << outcome.err;
      return;
    }
    ::setenv("SLURM_CONF", (place / "slurm.conf").c_str(), 1);
  }
  void TearDown() override {
    run_client(
        {std::string(kFolder) + "/cluster.sh", "stop", (folder_->root() / "slurm").string()});
    folder_.reset();
  }
  static std::string problem_;

 private:
  std::unique_ptr<Sandbox> folder_;
};
std::string Cluster::problem_;
[[maybe_unused]] testing::Environment* const cluster =
    testing::AddGlobalTestEnvironment(new Cluster);

/// What is waited for comes in a second or two, on a busy machine later. Only a failure waits so
/// long.
constexpr double kPatience_s = 120;

bool until(double seconds, const std::function<bool()>& holds) {
  const double end = seconds_now() + seconds;
  while (!holds()) {
    if (seconds_now() > end) return false;
    ::usleep(50'000);
  }
  return true;
}

/// The process of a job's rank, stopped as long as this lives.
class Stopped {
 public:
  Stopped(const std::string& job, int rank) {
    const std::string of_job = std::string(1, '\0') + "SLURM_JOB_ID=" + job + '\0';
    const std::string of_rank = std::string(1, '\0') + "RANK=" + std::to_string(rank) + '\0';
    for (const auto& entry : fs::directory_iterator("/proc")) {
      try {
        if (read_text(entry.path() / "comm") != "tailor-compute\n") continue;
        const std::string environment = '\0' + read_text(entry.path() / "environ");
        if (environment.find(of_job) == std::string::npos) continue;
        if (environment.find(of_rank) != std::string::npos) {
          process_ = std::stoi(entry.path().filename().string());
        }
      } catch (const Error&) {  // no process, or one that has just ended
      }
    }
    EXPECT_GT(process_, 0) << "rank " << rank << " of job " << job << " does not run";
    if (process_ > 0) ::kill(process_, SIGSTOP);
  }
  Stopped(const Stopped&) = delete;
  Stopped& operator=(const Stopped&) = delete;
  ~Stopped() {
    if (process_ > 0) ::kill(process_, SIGCONT);
  }
  bool has_pending(int signal) const {
    for (const std::string& line :
         split(read_text("/proc/" + std::to_string(process_) + "/status"), '\n')) {
      if (!line.starts_with("ShdPnd:")) continue;
      return (std::stoull(line.substr(8), nullptr, 16) >> (signal - 1) & 1) != 0;
    }
    return false;
  }

 private:
  pid_t process_ = 0;
};

class SlurmTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!Cluster::problem_.empty()) GTEST_SKIP() << Cluster::problem_;
    // What shells and YAML have to be careful with is in every path.
    box_.write_text("it's a \"run\".yaml",
                    "name: tiny\n"
                    "base_model: " TAILOR_SOURCE_DIR
                    "/tests/golden/llama4_maverick_tiny/model\n"
                    "output_dir: out\n"
                    "lora: {rank: 4, alpha: 8, targets: [all]}\n"
                    "data: {train: [rows.jsonl], sequence_len: 24}\n"
                    "training: {micro_batch_size: 1, max_steps: 10, eval_every_steps: 0}\n"
                    "compute: {dtype: float32, device: cpu, threads: 1}\n"
                    "machine: {ranks: 4}\n"
                    "checkpoint: {every_steps: 1}\n"
                    "cost: {price: {usd_per_gpu_hour: 2.00}, ledger: ledger.db}\n");
    std::string rows;
    for (std::uint64_t row = 0; row < 200; ++row) {
      Json ids = Json::array();
      for (std::uint64_t i = 0; i < 6 + row % 17; ++i) ids.push_back((row % 4 * 50 + i * 7) % 256);
      rows += Json({{"input_ids", ids}}).dump() + "\n";
    }
    box_.write_text("rows.jsonl", rows);
  }
  void TearDown() override {
    for (const char* name : {"PAYLOAD_FAIL", "PAYLOAD_HOLD"}) ::unsetenv(name);
  }

  std::vector<std::string> launch(const std::vector<std::string>& more) const {
    std::vector<std::string> out = {"launch",  "slurm",     "it's a \"run\".yaml",
                                    "--nodes", "2",         "--gpus-per-node",
                                    "2",       "--program", std::string(kFolder) + "/payload.py"};
    out.insert(out.end(), more.begin(), more.end());
    return out;
  }
  /// The number of the job submitted.
  std::string submit(const std::vector<std::string>& more) const {
    const Outcome outcome = run_tailor(box_, launch(more));
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return std::string(trim(outcome.out));
  }
  static std::map<std::string, std::string> fields(const std::string& job) {
    std::map<std::string, std::string> out;
    for (const std::string& word :
         split(run_client({"scontrol", "show", "job", "-o", job}).out, ' ')) {
      const std::size_t equals = word.find('=');
      if (equals != std::string::npos) out[word.substr(0, equals)] = word.substr(equals + 1);
    }
    return out;
  }
  static std::string state(const std::string& job) { return fields(job)["JobState"]; }
  bool reached(int step) const {
    const fs::path file = box_.root() / "out/checkpoint";
    return fs::exists(file) && !read_text(file).empty() && std::stoi(read_text(file)) >= step;
  }
  /// Whether a node still has a step of the job: slurmstepd names itself "slurmstepd: [7.batch]".
  static bool has_steps(const std::string& job) {
    for (const auto& entry : fs::directory_iterator("/proc")) {
      try {
        if (read_text(entry.path() / "cmdline").starts_with("slurmstepd: [" + job + "."))
          return true;
      } catch (const Error&) {  // no process, or one that has just ended
      }
    }
    return false;
  }
  /// A requeued job waits two minutes by itself. Asked for too often, its time to begin moves on
  /// before the scheduler looks; started within the second in which its last attempt was cleared
  /// away, slurmd takes the new one for killed ("job credential revoked").
  static bool start_now(const std::string& job) {
    const auto cleared = [&] {
      return !has_steps(job) &&
             run_client({"sinfo", "-h", "-N", "-p", "spot", "-t", "idle", "-o", "%N"}).out ==
                 "n1\nn2\n";
    };
    if (!until(kPatience_s, cleared)) return false;
    ::usleep(1'500'000);
    for (double patience_s = 2.5; patience_s < kPatience_s; patience_s *= 2) {
      run_client({"scontrol", "update", "jobid=" + job, "starttime=now"});
      const bool started = until(patience_s, [&] {
        const std::string now = state(job);
        return now == "RUNNING" || now == "COMPLETED";
      });
      if (started) return true;
    }
    return false;
  }
  std::string train_through_a_requeue() const;
  std::string log(const std::string& job) const {
    return read_text(box_.root() / ("tiny." + job + ".log"));
  }
  /// What the ranks of an attempt were told, by rank.
  std::vector<Json> told(const std::string& restart) const {
    std::vector<Json> out;
    for (const std::string& line : split(read_text(box_.root() / "out/attempts"), '\n')) {
      if (line.empty()) continue;
      Json one = parse_json(line, "attempts");
      const Json& count = one["SLURM_RESTART_COUNT"];
      if ((count.is_null() ? "" : count.get<std::string>()) == restart) out.push_back(one);
    }
    std::sort(out.begin(), out.end(), [](const Json& a, const Json& b) {
      return a["RANK"].get<std::string>() < b["RANK"].get<std::string>();
    });
    return out;
  }
  /// The steps that were done, in order.
  std::vector<int> steps() const {
    std::vector<int> out;
    for (const std::string& line : split(read_text(box_.root() / "out/steps"), '\n')) {
      if (!line.empty()) out.push_back(std::stoi(line));
    }
    return out;
  }
  static std::vector<int> up_to(int last) {
    std::vector<int> out(static_cast<std::size_t>(last));
    std::iota(out.begin(), out.end(), 1);
    return out;
  }

  Sandbox box_;
};

TEST_F(SlurmTest, four_ranks_on_two_nodes_followed_to_their_end) {
  const Outcome outcome = run_tailor(box_, launch({"--follow"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err << outcome.out;
  EXPECT_THAT(outcome.err, HasSubstr("tiny on slurm: 4 ranks on 2 nodes with 2 GPUs\n  planned: "));
  EXPECT_THAT(outcome.out, HasSubstr("\nstep 10\n"));
  EXPECT_EQ(steps(), up_to(10));
  const std::vector<Json> ranks = told("");
  ASSERT_EQ(ranks.size(), 4U);
  std::set<std::string> ports;
  for (std::size_t r = 0; r < 4; ++r) {
    EXPECT_EQ(ranks[r]["RANK"], std::to_string(r));
    EXPECT_EQ(ranks[r]["LOCAL_RANK"], std::to_string(r % 2));
    EXPECT_EQ(ranks[r]["WORLD_SIZE"], "4");
    EXPECT_EQ(ranks[r]["LOCAL_WORLD_SIZE"], "2");
    EXPECT_EQ(ranks[r]["SLURMD_NODENAME"], r < 2 ? "n1" : "n2");
    EXPECT_EQ(ranks[r]["OMP_NUM_THREADS"], "1");
    EXPECT_EQ(ranks[r]["CUDA_VISIBLE_DEVICES"], "0,1");
    EXPECT_EQ(ranks[r]["TAILOR_LAUNCHER"], "slurm");
    EXPECT_EQ(ranks[r]["TAILOR_LAUNCHER_JOB"], ranks[r]["SLURM_JOB_ID"]);
    EXPECT_THAT(ranks[r]["arguments"][1].get<std::string>(), HasSubstr("/it's a \"run\".yaml"));
    EXPECT_EQ(ranks[r]["arguments"].back(), "--resume");
    ports.insert(ranks[r]["MASTER_PORT"].get<std::string>());
  }
  EXPECT_EQ(ports.size(), 1U);
}

TEST_F(SlurmTest, a_dry_run_prints_what_sbatch_takes) {
  const Outcome outcome = run_tailor(box_, launch({"--dry-run", "--time", "1:00:00", "--partition",
                                                   "spot", "--cpus-per-rank", "2"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  box_.write_text("job.sh", outcome.out);
  const ClientOutcome checked =
      run_client({"sbatch", "--test-only", (box_.root() / "job.sh").string()});
  EXPECT_EQ(checked.code, 0) << checked.err;
  EXPECT_THAT(checked.err, HasSubstr("using 8 processors on nodes n[1-2]"));
  EXPECT_FALSE(fs::exists(box_.root() / "tiny.sh"));
}

TEST_F(SlurmTest, a_rank_that_fails_gives_the_job_its_code_and_no_requeue) {
  ::setenv("PAYLOAD_FAIL", "2:3:65", 1);
  const Outcome outcome = run_tailor(box_, launch({"--follow"}));
  EXPECT_EQ(outcome.code, 65) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("rank 2 fails with 65"));
  // The others were given the time to say whom they lost.
  EXPECT_THAT(outcome.out, HasSubstr("rank 0: lost another rank"));
  EXPECT_THAT(outcome.out, HasSubstr("tailor: the ranks left with 65; requeue: no"));
}

TEST_F(SlurmTest, what_slurm_refuses_is_said_in_its_words) {
  const Outcome outcome = run_tailor(box_, launch({"--partition", "nowhere"}));
  EXPECT_EQ(outcome.code, 69);
  EXPECT_THAT(outcome.err, HasSubstr("invalid partition specified: nowhere"));
}

TEST_F(SlurmTest, a_cancelled_job_saves_and_does_not_come_back) {
  const std::string job = submit({"training.max_steps=500"});
  ASSERT_TRUE(until(kPatience_s, [&] { return reached(3); }));
  run_client({"scancel", job});
  ASSERT_TRUE(until(kPatience_s, [&] { return state(job) == "CANCELLED"; })) << state(job);
  ASSERT_TRUE(until(kPatience_s, [&] {
    return log(job).find("the ranks left with 75") != std::string::npos;
  })) << log(job);
  EXPECT_TRUE(fs::exists(box_.root() / "out/left")) << log(job);
  EXPECT_EQ(fields(job)["Restarts"], "0");
}

TEST_F(SlurmTest, a_preempted_job_saves_requeues_itself_and_goes_on) {
  ::setenv("PAYLOAD_HOLD", "6", 1);
  const std::string job = submit({"training.max_steps=10"});
  ASSERT_TRUE(until(kPatience_s, [&] { return reached(4); }));
  const std::string urgent(
      trim(client_output({"sbatch", "--parsable", "--partition=urgent", "-N2", "--gres=gpu:4",
                          "--chdir=/", "--output=/dev/null", "--wrap=sleep 0.5"})));
  ASSERT_TRUE(until(kPatience_s, [&] { return fields(job)["Restarts"] == "1"; })) << log(job);
  EXPECT_TRUE(fs::exists(box_.root() / "out/left")) << log(job);
  ASSERT_TRUE(until(kPatience_s, [&] { return state(urgent) == "COMPLETED"; }));
  ASSERT_TRUE(start_now(job));
  // Following finds what was written before, too: the log goes on where it was.
  const Outcome outcome = run_tailor(box_, {"launch", "status", job, "--follow", "--json"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json status = parse_json(outcome.out, "status");
  EXPECT_EQ(status["state"], "COMPLETED");
  EXPECT_EQ(status["restarts"], 1);
  EXPECT_EQ(status["exit_code"], 0);
  EXPECT_EQ(status["accounting"], false);
  EXPECT_THAT(outcome.err, HasSubstr("restart 0"));
  EXPECT_THAT(outcome.err, HasSubstr("restart 1"));
  // Every step once: it went on from where it had saved.
  EXPECT_EQ(steps(), up_to(10));
  ASSERT_EQ(told("1").size(), 4U);
  EXPECT_GE(told("1")[0]["begin"].get<int>(), 4);
  EXPECT_NE(told("1")[0]["MASTER_PORT"], told("")[0]["MASTER_PORT"]);
}

TEST_F(SlurmTest, the_warning_before_the_time_limit_saves_and_requeues) {
  const std::string job = submit({"training.max_steps=500"});
  ASSERT_TRUE(until(kPatience_s, [&] { return reached(2); }));
  run_client({"scancel", "--signal=USR1", job});  // as --signal=USR1@300 sends it
  ASSERT_TRUE(until(kPatience_s, [&] { return fields(job)["Restarts"] == "1"; })) << log(job);
  EXPECT_EQ(read_text(box_.root() / "out/left"), "[10]");
  run_client({"scancel", job});
}

/// Job of a real training on four ranks of two nodes, which was warned in its middle, put back into
/// the queue and has done all steps. Empty when that went wrong.
std::string SlurmTest::train_through_a_requeue() const {
  const Outcome outcome =
      run_tailor(box_, {"launch", "slurm", "it's a \"run\".yaml", "training.num_epochs=1000",
                        "training.max_steps=80", "checkpoint.every_steps=30", "--nodes", "2",
                        "--gpus-per-node", "2"});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  const std::string job(trim(outcome.out));
  const fs::path metrics = box_.root() / "out/metrics.jsonl";
  const auto done = [&] {
    std::vector<std::int64_t> out;
    if (!fs::exists(metrics)) return out;
    for (const std::string& line : split(read_text(metrics), '\n')) {
      const Json one = Json::parse(line, nullptr, false);  // the last line may be half written
      if (one.is_object() && one.contains("loss")) out.push_back(one["step"].get<std::int64_t>());
    }
    return out;
  };
  EXPECT_TRUE(until(kPatience_s, [&] { return done().size() >= 20; })) << log(job);
  if (HasFailure()) return "";
  {
    // Held until the signal is there: it is interrupted in its middle, however slowly scancel
    // starts.
    const Stopped first(job, 0);
    if (HasFailure()) return "";
    run_client({"scancel", "--signal=USR1", job});
    EXPECT_TRUE(until(kPatience_s, [&] { return first.has_pending(SIGUSR1); }));
  }
  EXPECT_TRUE(until(kPatience_s, [&] { return fields(job)["Restarts"] == "1"; })) << log(job);
  const std::size_t before = done().size();
  EXPECT_LT(before, 80U) << "it was to be interrupted, not to end";
  if (HasFailure()) return "";
  EXPECT_TRUE(start_now(job)) << run_client({"scontrol", "show", "job", job}).out << log(job);
  EXPECT_TRUE(until(kPatience_s, [&] { return state(job) == "COMPLETED"; })) << log(job);
  std::vector<std::int64_t> all(80);
  std::iota(all.begin(), all.end(), 1);
  EXPECT_EQ(done(), all);
  return HasFailure() ? "" : job;
}

TEST_F(SlurmTest, training_on_four_ranks_of_two_nodes_goes_on_from_its_checkpoint_after_a_requeue) {
  const std::string job = train_through_a_requeue();
  ASSERT_FALSE(job.empty());
  const Json summary = read_json(box_.root() / "out/summary.json");
  EXPECT_EQ(summary["status"], "succeeded");
  EXPECT_EQ(summary["attempts"], 2);
  // The job is found in the books by its number.
  const Outcome told =
      run_tailor(box_, {"launch", "status", job, "--ledger", "ledger.db", "--json"});
  ASSERT_EQ(told.code, 0) << told.err;
  const Json run = parse_json(told.out, "status")["run"];
  EXPECT_EQ(run["status"], "succeeded");
  EXPECT_DOUBLE_EQ(run["gpu_hours"].get<double>(), summary["gpu_hours"].get<double>());
  EXPECT_GT(run["usd"].get<double>(), 0);
}

TEST_F(SlurmTest, status_has_the_cost_by_the_ledger) {
  const std::string job = submit({"training.max_steps=2"});
  const RealClock clock;
  {
    const auto ledger = Ledger::open((box_.root() / "ledger.db").string(), clock);
    RunFacts facts;
    facts.name = "tiny";
    facts.output_dir = (box_.root() / "out").string();
    const std::string run = ledger->begin_run(facts);
    AttemptFacts attempt;
    attempt.launcher = "slurm";
    attempt.launcher_job = job;
    attempt.world_size = attempt.devices = 4;
    attempt.usd_micros_per_device_hour = 2'000'000;
    const AttemptId id = ledger->begin_attempt(run, attempt);
    const SegmentFacts segment{Phase::train, 900'000, 2, 2, 100, 50, {}, {}};
    ledger->segments(id, std::span(&segment, 1));
    ledger->end_attempt(id, RunStatus::succeeded, 0, "");
  }
  ASSERT_TRUE(until(kPatience_s, [&] { return state(job) == "COMPLETED"; }));
  const Outcome outcome =
      run_tailor(box_, {"launch", "status", job, "--ledger", "ledger.db", "--json"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json run = parse_json(outcome.out, "status")["run"];
  EXPECT_EQ(run["status"], "succeeded");
  EXPECT_DOUBLE_EQ(run["gpu_hours"].get<double>(), 1.0);
  EXPECT_DOUBLE_EQ(run["usd"].get<double>(), 2.0);
  const Outcome text = run_tailor(box_, {"launch", "status", job, "--ledger", "ledger.db"});
  EXPECT_THAT(text.out, HasSubstr("1.000 device hours, $2.00 in 1 attempt\n"));
  EXPECT_THAT(text.out, HasSubstr("keeps no accounting"));
}

TEST_F(SlurmTest, a_job_nobody_knows) {
  const Outcome outcome = run_tailor(box_, {"launch", "status", "987654"});
  EXPECT_EQ(outcome.code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("Slurm does not know job 987654"));
}

/// With slurmdbd: TAILOR_SLURM_ACCOUNTING=1.
class SlurmAccounting : public SlurmTest {};

TEST_F(SlurmAccounting, gpu_hours_are_those_of_every_attempt) {
  if (std::getenv("TAILOR_SLURM_ACCOUNTING") == nullptr) GTEST_SKIP() << "SKIPPED: no slurmdbd";
  const std::string job = train_through_a_requeue();
  ASSERT_FALSE(job.empty());
  Json status;
  // The records come with a delay.
  ASSERT_TRUE(until(kPatience_s, [&] {
    status = parse_json(
        run_tailor(box_, {"launch", "status", job, "--ledger", "ledger.db", "--json"}).out,
        "status");
    return status["accounting"] == true && status["attempts"].size() == 2 &&
           status["attempts"][1]["state"] == "COMPLETED";
  })) << status.dump(2);
  // Slurm's own sum: each attempt's time by the GPUs it held.
  const auto seconds = [&](const std::vector<std::string>& flags) {
    std::vector<std::string> command = {"sacct", "-X", "-n", "-P", "-j", job, "-o", "ElapsedRaw"};
    command.insert(command.end(), flags.begin(), flags.end());
    double sum = 0;
    for (const std::string& line : split(client_output(command), '\n')) {
      if (!line.empty()) sum += std::stod(line);
    }
    return sum;
  };
  const double all = seconds({"-D"}), last = seconds({});
  EXPECT_GT(all, last) << "without -D the requeued attempt is not shown";
  const double hours = status["slurm_gpu_hours"].get<double>();
  EXPECT_GE(hours, all * 4 / 3600 - 1e-9);
  // Steps may end some seconds after their attempt, no more.
  EXPECT_LE(hours, (all + 10) * 4 / 3600);
  for (const Json& attempt : status["attempts"]) EXPECT_EQ(attempt["gpus"], 4);
  // Our own books: every attempt by its four ranks, from when the job got its GPUs to the end of
  // the program, after which Slurm still clears away.
  const double own = status["run"]["gpu_hours"].get<double>();
  EXPECT_EQ(status["run"]["attempts"], 2);
  std::printf(
      "GPU seconds of two attempts on four GPUs: %.0f by sacct -D, %.0f with the steps' ends, "
      "%.1f by the ledger\n",
      all * 4, hours * 3600, own * 3600);
  EXPECT_LE(own, hours + 2 * 4.0 / 3600) << "Slurm counts whole seconds";
  EXPECT_GE(own, hours - 2 * 4 * 3.0 / 3600);
}

}  // namespace
}  // namespace tailor::testing_support
