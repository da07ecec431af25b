// Job files against the golden ones, which the oracle suite gives to the clusters' own validators.
// TAILOR_WRITE_GOLDEN=1 writes them anew.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "base/error.h"
#include "base/file.h"
#include "tests/tools/launch/temporary_folder.h"
#include "tools/launch/client.h"
#include "tools/launch/kubernetes.h"
#include "tools/launch/skypilot.h"
#include "tools/launch/slurm.h"

namespace tailor {
namespace {

using testing::HasSubstr;

LaunchJob two_nodes() {
  LaunchJob job;
  job.name = "r1-long";
  job.program = "tailor";
  job.recipe = "/home/me/my recipes/it's r1.yaml";
  job.overrides = {"training.max_steps=20", "data.train=[\"a $b.jsonl\", '$(c)']"};
  job.ranks = 8;
  job.nodes = 2;
  job.gpus_per_node = 4;
  job.gpu_type = "H100";
  job.cpus_per_rank = 16;
  job.memory_bytes = 400LL << 30;
  job.seconds_max = 2 * 86'400;
  return job;
}

LaunchJob one_rank() {
  LaunchJob job;
  job.name = "demo";
  job.recipe = "/recipes/demo.yaml";
  return job;
}

constexpr const char* kRecipe =
    "# A recipe with what YAML finds hard.\n"
    "name: \"it's: #1\"\n"
    "base_model: m\n"
    "output_dir: runs/x\n"
    "data: {train: [a.jsonl]}   # comment\n"
    "machine:\n"
    "  ranks: 8\n";

void expect_golden(const std::string& name, const std::string& text) {
  const fs::path path = fs::path(TAILOR_SOURCE_DIR) / "tests/golden/launch" / name;
  if (std::getenv("TAILOR_WRITE_GOLDEN") != nullptr) write_atomically(path, text);
  EXPECT_EQ(text, read_text(path)) << path;
}

TEST(JobFiles, slurm) {
  SlurmJob slurm{two_nodes(), "gpu", "team-a", "/home/me/my work's"};
  expect_golden("slurm_two_nodes.sh", slurm_script(slurm));
  SlurmJob small{one_rank(), "", "", "/work"};
  expect_golden("slurm_one_rank.sh", slurm_script(small));
}

TEST(JobFiles, kubernetes) {
  KubernetesJob big{two_nodes(), kRecipe,  "registry.example/tailor:0.1",
                    "tailor",    "team-a", "gpus"};
  expect_golden("kubernetes_two_nodes.yaml", kubernetes_job(big));
  expect_golden("kubernetes_train_job.yaml", kubernetes_train_job(big));
  KubernetesJob small{one_rank(), kRecipe, "registry.example/tailor:0.1", "tailor", "", ""};
  expect_golden("kubernetes_one_rank.yaml", kubernetes_job(small));
}

TEST(JobFiles, skypilot) {
  SkyPilotJob big{two_nodes(), "/home/me/my recipes/it's r1.yaml", "registry.example/tailor:0.1",
                  "s3://bucket/tailor", true};
  expect_golden("skypilot_two_nodes.yaml", skypilot_task(big));
  SkyPilotJob small{one_rank(), "/recipes/demo.yaml", "", "gs://bucket", false};
  expect_golden("skypilot_one_rank.yaml", skypilot_task(small));
}

TEST(JobFiles, what_a_cluster_needs_is_asked_for) {
  const auto what = [](const auto& make) -> std::string {
    try {
      make();
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::usage);
      return error.parts().what;
    }
    return "";
  };
  EXPECT_EQ(what([] { kubernetes_job({one_rank(), "", "", "v", "", ""}); }), "no --image given");
  EXPECT_EQ(what([] { kubernetes_job({one_rank(), "", "i", "", "", ""}); }), "no --volume given");
  EXPECT_EQ(what([] { skypilot_task({one_rank(), "/r", "", "", false}); }), "no --bucket given");
  LaunchJob unknown = two_nodes();
  unknown.gpu_type = "";
  EXPECT_EQ(what([&] {
              skypilot_task({unknown, "/r", "", "s3://b", false});
            }),
            "which GPU is not known");
  EXPECT_EQ(what([] {
              slurm_script({one_rank(), "gpu;rm", "", "/w"});
            }),
            "'gpu;rm' is no value of --partition");
}

TEST(SkyPilot, accelerators_by_sku) {
  EXPECT_EQ(skypilot_accelerator("h100-80gb-sxm"), "H100");
  EXPECT_EQ(skypilot_accelerator("a100-40gb-pcie"), "A100");
  EXPECT_EQ(skypilot_accelerator("a100-80gb-sxm"), "A100-80GB");
  EXPECT_EQ(skypilot_accelerator("h200-141gb"), "H200");
  EXPECT_EQ(skypilot_accelerator("cpu"), "");
}

TEST(SkyPilot, state_of_the_newest_job_of_a_name) {
  const Json queue = parse_json(
      R"([{"job_id": 3, "job_name": "r1", "status": "FAILED", "failure_reason": "x"},
          {"job_id": 5, "job_name": "r1", "status": "RECOVERING", "recovery_count": 2,
           "job_duration": 12.5, "failure_reason": null},
          {"job_id": 9, "job_name": "other", "status": "RUNNING"}])",
      "queue");
  const auto state = read_skypilot_state(queue, "r1");
  ASSERT_TRUE(state);
  EXPECT_EQ(state->number, 5);
  EXPECT_EQ(state->state, "recovering");
  EXPECT_EQ(state->recoveries, 2);
  EXPECT_FALSE(read_skypilot_state(queue, "nobody"));
}

TEST(Kubernetes, state_by_conditions) {
  const auto state = [](const char* text) {
    return read_kubernetes_state(parse_json(text, "job"));
  };
  EXPECT_EQ(state(R"({"status": {}})").state, "pending");
  EXPECT_EQ(state(R"({})").state, "pending");
  EXPECT_EQ(state(R"({"status": {"active": 2}})").state, "running");
  const auto failed = state(
      R"({"status": {"failed": 1, "conditions": [{"type": "FailureTarget", "status": "True"},
          {"type": "Failed", "status": "True", "message": "exit code 65"}]}})");
  EXPECT_EQ(failed.state, "failed");
  EXPECT_EQ(failed.reason, "exit code 65");
  EXPECT_EQ(state(R"({"status": {"conditions": [{"type": "Complete", "status": "True"}]}})").state,
            "succeeded");
}

// What sacct -D and scontrol of Slurm 22.05 printed for a job that was preempted once.
constexpr const char* kSacct =
    "3|r1|REQUEUED|2026-11-24T01:00:00|2026-11-24T01:00:18|18|billing=8,cpu=4,gres/gpu=8,node=2|"
    "0:0\n"
    "3.batch|batch|CANCELLED|2026-11-24T01:00:00|2026-11-24T01:00:19|19|cpu=2,gres/gpu=4|0:15\n"
    "3.0|bash|CANCELLED|2026-11-24T01:00:01|2026-11-24T01:00:22|22|cpu=4,gres/gpu=8|0:9\n"
    "3|r1|COMPLETED|2026-11-24T01:02:30|2026-11-24T01:02:33|3|billing=8,cpu=4,gres/gpu=8,node=2|"
    "0:0\n"
    "3.0|bash|COMPLETED|2026-11-24T01:02:30|2026-11-24T01:02:33|3|cpu=4,gres/gpu=8|0:0\n";

TEST(Slurm, accounting_counts_every_attempt_and_the_time_to_leave) {
  const auto state = read_sacct(kSacct);
  ASSERT_TRUE(state);
  EXPECT_EQ(state->job, "3");
  EXPECT_EQ(state->state, "COMPLETED");
  EXPECT_EQ(state->restarts, 1);
  ASSERT_EQ(state->attempts.size(), 2U);
  EXPECT_EQ(state->attempts[0].seconds, 22);
  EXPECT_EQ(state->attempts[1].seconds, 3);
  EXPECT_DOUBLE_EQ(state->attempts[0].gpu_hours() + state->attempts[1].gpu_hours(),
                   8 * 25 / 3600.0);
  EXPECT_FALSE(read_sacct(""));
  EXPECT_FALSE(read_sacct("Slurm accounting storage is disabled\n"));
}

TEST(Slurm, scontrol_is_read_with_spaces_in_values) {
  const SlurmState state = read_scontrol(
      "JobId=6 JobName=a b UserId=root(0) JobState=RUNNING Reason=None Requeue=1 Restarts=2 "
      "ExitCode=0:0 RunTime=1-00:00:10 StartTime=2026-11-24T20:18:46 EndTime=Unknown NumNodes=2 "
      "NumCPUs=4 TRES=cpu=4,mem=8000M,node=2,billing=4 Command=/w/my job.sh WorkDir=/w/a b "
      "StdOut=/w/a b/r1.6.log Power= TresPerNode=gres:gpu:4 \n");
  EXPECT_EQ(state.job, "6");
  EXPECT_EQ(state.name, "a b");
  EXPECT_EQ(state.log, "/w/a b/r1.6.log");
  EXPECT_EQ(state.restarts, 2);
  EXPECT_EQ(state.reason, "");
  EXPECT_FALSE(state.ended());
  EXPECT_EQ(state.attempts.front().seconds, 86'410);
  EXPECT_EQ(state.attempts.front().gpus, 8);
  EXPECT_EQ(submitted_job("12\n"), "12");
  EXPECT_EQ(submitted_job("12;east\n"), "12");
  EXPECT_FALSE(submitted_job("error"));
}

TEST(Slurm, the_result_of_a_job_is_never_success_unless_it_completed) {
  const auto result = [](const std::string& state, const std::string& code) {
    const SlurmState read = read_scontrol("JobId=6 JobState=" + state + " ExitCode=" + code);
    EXPECT_TRUE(read.ended()) << state;
    return read.result();
  };
  EXPECT_EQ(result("COMPLETED", "0:0"), 0);
  EXPECT_EQ(result("FAILED", "65:0"), 65);
  EXPECT_EQ(result("FAILED", "0:9"), 137);
  EXPECT_EQ(result("CANCELLED", "75:0"), 75);
  EXPECT_EQ(result("CANCELLED", "0:0"), 75) << "before it had begun";
  EXPECT_EQ(result("TIMEOUT", "0:0"), 75);
  EXPECT_EQ(result("PREEMPTED", "0:15"), 143);
  EXPECT_EQ(result("OUT_OF_MEMORY", "0:125"), 66);
  EXPECT_EQ(result("NODE_FAIL", "0:0"), 69);
  EXPECT_EQ(result("BOOT_FAIL", "0:0"), 69);
}

/// The batch script run by bash alone, with scontrol and srun of ours: what becomes of each code.
class SlurmScript : public testing::Test {
 protected:
  void SetUp() override {
    write("srun",
          "#!/bin/bash\n"
          "shift\n"  // --kill-on-bad-exit=1
          "for r in 0 1; do SLURM_PROCID=$r SLURM_LOCALID=$r \"$@\" & pids[$r]=$!; done\n"
          "worst=0\n"
          "for r in 0 1; do wait ${pids[$r]}; c=$?; [ $c -gt $worst ] && worst=$c; done\n"
          "exit $worst\n");
    write("scontrol",
          "#!/bin/bash\n"
          "case \"$1 $2\" in\n"
          "  'show hostnames') echo n1; echo n2 ;;\n"
          "  'show node') echo ' NodeAddr=10.0.0.1 NodeHostName=n1' ;;\n"
          "  'show job') echo \"   JobState=${STATE:-RUNNING} Reason=None\" ;;\n"
          "  requeue*) echo \"$2\" >requeued ;;\n"
          "esac\n");
    write("tailor",
          "#!/bin/bash\n"
          "{ printf '%s\\n' \"$@\"; echo \"$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE "
          "$MASTER_ADDR:$MASTER_PORT $TAILOR_LAUNCHER $TAILOR_LAUNCHER_JOB\"; } >saw.$RANK\n"
          "code=CODE$RANK; exit ${!code}\n");
  }
  void write(const std::string& name, const std::string& text) const {
    write_atomically(folder_.path() / name, text);
    fs::permissions(folder_.path() / name, fs::perms::owner_all);
  }
  int run(const std::string& environment) const {
    LaunchJob job;
    job.name = "r1";
    job.program = (folder_.path() / "tailor").string();
    job.recipe = "my recipe's.yaml";
    job.overrides = {"name=$(x) \"y\""};
    job.ranks = 2;
    make_folders(folder_.path() / "it's work");
    write("job.sh", slurm_script({job, "", "", folder_.path() / "it's work"}));
    fs::remove(folder_.path() / "it's work/requeued");
    return run_client({"/bin/bash", "-c",
                       "cd " + folder_.path().string() + " && PATH=$PWD:$PATH SLURM_JOB_ID=7 " +
                           environment + " bash job.sh"})
        .code;
  }
  bool requeued() const { return fs::exists(folder_.path() / "it's work/requeued"); }
  testing_support::TemporaryFolder folder_;
};

TEST_F(SlurmScript, ranks_get_torchruns_words_and_the_command_as_it_was) {
  EXPECT_EQ(run("SLURM_JOB_NODELIST='n[1-2]'"), 0);
  EXPECT_EQ(read_text(folder_.path() / "it's work/saw.1"),
            "train\nmy recipe's.yaml\nname=$(x) \"y\"\n--resume\n"
            "1 1 2 2 10.0.0.1:20056 slurm 7\n");
  EXPECT_FALSE(requeued());
}

TEST_F(SlurmScript, the_ranks_own_reason_is_the_jobs_code) {
  EXPECT_EQ(run("CODE0=69 CODE1=65"), 65);
  EXPECT_FALSE(requeued());
  EXPECT_EQ(run("CODE0=66 CODE1=75"), 66);
  EXPECT_EQ(run("CODE0=76 CODE1=76"), 76);
  EXPECT_FALSE(requeued());
}

TEST_F(SlurmScript, an_interrupted_job_requeues_itself_unless_it_was_cancelled) {
  EXPECT_EQ(run("CODE0=75 CODE1=75 SLURM_RESTART_COUNT=40"), 75);
  EXPECT_TRUE(requeued());
  EXPECT_EQ(run("CODE0=75 CODE1=75 STATE=COMPLETING"), 75);
  EXPECT_FALSE(requeued());
}

TEST_F(SlurmScript, a_failed_device_requeues_a_few_times) {
  EXPECT_EQ(run("CODE0=69 CODE1=69 SLURM_RESTART_COUNT=2"), 69);
  EXPECT_TRUE(requeued());
  EXPECT_EQ(run("CODE0=69 CODE1=137 SLURM_RESTART_COUNT=3"), 69);
  EXPECT_FALSE(requeued());
}

TEST_F(SlurmScript, a_program_that_is_not_there_is_not_tried_again) {
  EXPECT_EQ(run("CODE0=127 CODE1=127"), 127);
  EXPECT_FALSE(requeued());
}

}  // namespace
}  // namespace tailor
