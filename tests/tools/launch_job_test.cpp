// `tailor launch` for clusters, without one: what it says and writes, and what it refuses. Clients
// of the clusters are scripts that write down what they were given.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/text.h"
#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

using testing::HasSubstr;
using testing::Not;

class LaunchJobTest : public testing::Test {
 protected:
  void SetUp() override {
    path_before_ = std::getenv("PATH");
    make_folders(box_.root() / "bin");
    ::setenv("PATH", (box_.root() / "bin").c_str(), 1);
  }
  void TearDown() override { ::setenv("PATH", path_before_.c_str(), 1); }
  /// A client that writes its arguments to NAME.arguments and prints `text`.
  void client(const std::string& name, const std::string& text, int code = 0) const {
    box_.write_text("bin/" + name, "#!/bin/sh\nfor word; do echo \"$word\"; done >>" +
                                       (box_.root() / (name + ".arguments")).string() +
                                       "\ncat <<'END'\n" + text + "\nEND\nexit " +
                                       std::to_string(code) + "\n");
    fs::permissions(box_.root() / "bin" / name, fs::perms::owner_all);
    fs::create_symlink("/bin/cat", box_.root() / "bin/cat", error_);
  }
  std::string given(const std::string& name) const {
    return read_text(box_.root() / (name + ".arguments"));
  }
  Sandbox box_;
  std::string path_before_;
  mutable std::error_code error_;
};

const std::vector<std::string> kBig = {"r1-4xh100", "training.max_steps=100"};

std::vector<std::string> with(std::vector<std::string> first,
                              const std::vector<std::string>& more) {
  first.insert(first.end(), kBig.begin(), kBig.end());
  first.insert(first.end(), more.begin(), more.end());
  return first;
}

TEST_F(LaunchJobTest, the_plan_comes_first_then_the_job_file) {
  const Outcome outcome = run_tailor(box_, with({"launch", "slurm"}, {"--dry-run"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.err, HasSubstr("r1-4xh100 on slurm: 4 ranks on 1 node with 4 GPUs\n"));
  EXPECT_THAT(outcome.err, testing::ContainsRegex("planned: .* device hours, \\$[0-9.]+"));
  EXPECT_THAT(outcome.out, HasSubstr("#SBATCH --ntasks-per-node=4\n"));
  EXPECT_THAT(outcome.out, HasSubstr("#SBATCH --gres=gpu:4\n"));
  EXPECT_THAT(outcome.out, HasSubstr(" train SRC/recipes/r1-4xh100.yaml"));
}

TEST_F(LaunchJobTest, json_has_the_plan_and_the_file) {
  const Outcome outcome = run_tailor(
      box_,
      with({"launch", "slurm"}, {"machine.ranks=8", "--out", "a/job.sh", "--dry-run", "--json"}));
  EXPECT_EQ(outcome.code, 74) << "the folder is not there";
  const Outcome good = run_tailor(
      box_,
      with({"launch", "slurm"}, {"machine.ranks=8", "--out", "job.sh", "--dry-run", "--json"}));
  ASSERT_EQ(good.code, 0) << good.err;
  const Json json = parse_json(good.out, "json");
  EXPECT_EQ(json["nodes"], 2);
  EXPECT_EQ(json["gpus_per_node"], 4);
  EXPECT_EQ(json["job"], nullptr);
  EXPECT_GT(json["gpu_hours"].get<double>(), 0);
  EXPECT_GT(json["usd"].get<double>(), 0);
  EXPECT_EQ(json["fits"], true);
}

TEST_F(LaunchJobTest, what_does_not_fit_is_refused_without_force) {
  const std::vector<std::string> small = {"base.device_memory=900GB", "--dry-run"};
  const Outcome outcome = run_tailor(box_, with({"launch", "slurm"}, small));
  EXPECT_EQ(outcome.code, 66);
  EXPECT_EQ(outcome.out, "");
  EXPECT_THAT(outcome.err, HasSubstr("--force launches it all the same"));
  std::vector<std::string> forced = small;
  forced.emplace_back("--force");
  EXPECT_EQ(run_tailor(box_, with({"launch", "slurm"}, forced)).code, 0);
}

TEST_F(LaunchJobTest, a_client_that_is_missing_is_69_with_what_to_install) {
  const Outcome slurm = run_tailor(box_, with({"launch", "slurm"}, {}));
  EXPECT_EQ(slurm.code, 69);
  EXPECT_THAT(slurm.err, HasSubstr("error: cannot run sbatch: No such file or directory"));
  EXPECT_THAT(slurm.err, HasSubstr("apt-get install slurm-client"));
  EXPECT_TRUE(fs::exists(box_.root() / "r1-4xh100.sh"));
  const Outcome sky = run_tailor(box_, with({"launch", "skypilot"}, {"--bucket", "s3://b/x"}));
  EXPECT_EQ(sky.code, 69);
  EXPECT_THAT(sky.err, HasSubstr("pip install skypilot"));
  const Outcome kubernetes =
      run_tailor(box_, with({"launch", "kubernetes"}, {"--image", "i", "--volume", "v"}));
  EXPECT_EQ(kubernetes.code, 69);
  EXPECT_THAT(kubernetes.err, HasSubstr("Install kubectl"));
}

TEST_F(LaunchJobTest, kubectl_and_sky_are_given_the_file) {
  client("kubectl", "job.batch/r1-4xh100 created");
  const Outcome kubernetes =
      run_tailor(box_, with({"launch", "kubernetes"},
                            {"--image", "i", "--volume", "v", "--namespace", "team", "--follow"}));
  ASSERT_EQ(kubernetes.code, 0) << kubernetes.err;
  EXPECT_EQ(given("kubectl"),
            "apply\n-f\nr1-4xh100.yaml\nlogs\n--follow\n--prefix\n--pod-running-timeout=24h\n"
            "--selector\napp.kubernetes.io/instance=r1-4xh100\n--namespace=team\n");
  EXPECT_THAT(read_text(box_.root() / "r1-4xh100.yaml"), HasSubstr("kind: Job\n"));
  client("sky", "Job submitted");
  const Outcome sky = run_tailor(
      box_, with({"launch", "skypilot"}, {"--bucket", "s3://b/x", "--out", "task.yaml"}));
  ASSERT_EQ(sky.code, 0) << sky.err;
  EXPECT_EQ(sky.out, "r1-4xh100\n");
  EXPECT_EQ(given("sky"), "jobs\nlaunch\n--yes\n--detach-run\ntask.yaml\n");
}

TEST_F(LaunchJobTest, status_of_jobs_elsewhere) {
  client("kubectl",
         R"({"status": {"failed": 1, "conditions": [{"type": "Failed", "status": "True",
            "message": "exit code 65"}]}})");
  const Outcome kubernetes = run_tailor(box_, {"launch", "status", "r1", "--on", "kubernetes"});
  EXPECT_EQ(kubernetes.code, 0) << kubernetes.err;
  EXPECT_THAT(kubernetes.out, HasSubstr("failed: exit code 65"));
  EXPECT_THAT(kubernetes.out, HasSubstr("no attempt of this job in the ledger"));
  client("sky", R"([{"job_id": 4, "job_name": "r1", "status": "RUNNING", "recovery_count": 2,
                    "job_duration": 90}])");
  const Outcome sky = run_tailor(box_, {"launch", "status", "r1", "--on", "skypilot", "--json"});
  EXPECT_EQ(sky.code, 0) << sky.err;
  EXPECT_EQ(parse_json(sky.out, "sky")["recoveries"], 2);
  const Outcome unknown = run_tailor(box_, {"launch", "status", "r1"});
  EXPECT_EQ(unknown.code, 2);
  EXPECT_THAT(unknown.err, HasSubstr("Add --on kubernetes or --on skypilot"));
}

TEST_F(LaunchJobTest, following_outlives_a_controller_that_is_away_and_ends_as_the_job) {
  const std::string log = (box_.root() / "r1.7.log").string();
  box_.write_text("r1.7.log", "step 1\nstep 2\n");
  client("sbatch", "7");
  box_.write_text(
      "bin/scontrol",
      "#!/bin/sh\n"
      "n=0; [ -e asked ] && read n <asked; n=$((n + 1)); echo $n >asked\n"
      "state() { echo \"JobId=7 JobName=r1 JobState=$1 Reason=None ExitCode=0:0 StdOut=" +
          log +
          "\"; }\n"
          "case $n in\n"
          "1) state RUNNING ;;\n"
          "2 | 3) echo 'Unable to contact slurm controller' >&2; exit 1 ;;\n"
          "*) state CANCELLED ;;\n"
          "esac\n");
  fs::permissions(box_.root() / "bin/scontrol", fs::perms::owner_all);
  const Outcome outcome = run_tailor(box_, with({"launch", "slurm"}, {"--follow"}));
  EXPECT_EQ(outcome.code, 75) << outcome.err;
  EXPECT_EQ(outcome.out, "step 1\nstep 2\n");
  EXPECT_THAT(outcome.err, HasSubstr("Ctrl-C ends that, not the job: scancel 7\n"));
  EXPECT_THAT(outcome.err, HasSubstr("Unable to contact slurm controller; asking again\n"));
  EXPECT_THAT(outcome.err, HasSubstr("job 7: cancelled\n"));
  // A log that only the nodes see is said, not passed over.
  fs::remove(box_.root() / "asked");
  fs::remove(log);
  const Outcome blind = run_tailor(box_, {"launch", "status", "7", "--follow"});
  EXPECT_EQ(blind.code, 75);
  EXPECT_THAT(blind.err, HasSubstr("the log of job 7 is not to be seen from here: BOX/r1.7.log"));
}

TEST_F(LaunchJobTest, impossible_places_and_flags_of_another_cluster_are_refused) {
  const auto message = [&](const std::vector<std::string>& arguments) {
    const Outcome outcome = run_tailor(box_, arguments);
    EXPECT_EQ(outcome.code, 2);
    return outcome.err;
  };
  EXPECT_THAT(message(with({"launch", "slurm"}, {"--nodes", "3", "--dry-run"})),
              HasSubstr("4 ranks do not spread evenly over 3 nodes"));
  EXPECT_THAT(message(with({"launch", "slurm"}, {"--gpus-per-node", "2", "--dry-run"})),
              HasSubstr("4 ranks a node need as many GPUs, given: 2"));
  EXPECT_THAT(message(with({"launch", "slurm"}, {"--image", "x"})),
              HasSubstr("unknown flag --image"));
  EXPECT_THAT(message(with({"launch", "slurm"}, {"--time", "soon", "--dry-run"})),
              HasSubstr("'soon' is no time limit"));
  EXPECT_THAT(message(with({"launch", "slurm"}, {"--memory", "much", "--dry-run"})),
              HasSubstr("--memory is 'much', needed: a size"));
  EXPECT_THAT(message(with({"launch", "kubernetes"}, {"--kind", "Pod"})),
              HasSubstr("'Pod' is no value of --kind"));
}

}  // namespace
}  // namespace tailor::testing_support
