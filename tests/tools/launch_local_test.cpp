// `tailor train` with several ranks starts itself once for each. The program that would compute is
// a script here that tells what it was given.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/text.h"
#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

using testing::HasSubstr;

/// A copy of `tailor` with a `tailor-compute` of ours beside it.
class LaunchLocal : public testing::Test {
 protected:
  void SetUp() override {
    make_folders(box_.root() / "bin");
    fs::copy(fs::path(TAILOR_BIN_DIR) / "tailor", program());
    box_.write_text("bin/tailor-compute",
                    "#!/bin/sh\n"
                    "{ for word; do echo \"$word\"; done; echo \"rank $RANK of $WORLD_SIZE\"\n"
                    "  echo \"at $MASTER_ADDR $MASTER_PORT local $LOCAL_RANK of "
                    "$LOCAL_WORLD_SIZE threads $OMP_NUM_THREADS\"\n"
                    "} > seen.$RANK.$$\n"
                    "echo \"result $RANK\"; exit ${CODE:-0}\n");
    fs::permissions(box_.root() / "bin/tailor-compute", fs::perms::owner_all);
    box_.write_text("mine.yaml",
                    "base_model: model\noutput_dir: out\ndata: {train: [rows.jsonl]}\n"
                    "machine: {ranks: 2}\n");
  }
  fs::path program() const { return box_.root() / "bin/tailor"; }
  Outcome run(const std::string& arguments) const {
    const std::string line =
        "cd " + box_.root().string() + " && " + arguments + " >.stdout 2>.stderr </dev/null";
    Outcome outcome;
    const int status = std::system(line.c_str());
    outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    outcome.out = read_text(box_.root() / ".stdout");
    outcome.err = read_text(box_.root() / ".stderr");
    return outcome;
  }
  std::vector<std::string> seen() const {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(box_.root())) {
      if (entry.path().filename().string().starts_with("seen.")) {
        out.push_back(read_text(entry.path()));
      }
    }
    std::sort(out.begin(), out.end());
    return out;
  }
  Sandbox box_;
};

TEST_F(LaunchLocal, train_starts_the_recipes_ranks) {
  const Outcome outcome = run("bin/tailor train mine.yaml 'name=two words' --resume --json");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.out, "result 0\n");
  ASSERT_EQ(seen().size(), 2U);
  EXPECT_THAT(seen()[0],
              HasSubstr("train\nmine.yaml\nname=two words\n--resume\n--json\nrank 0 of 2"));
  EXPECT_THAT(seen()[1], HasSubstr("rank 1 of 2\nat 127.0.0.1 "));
}

TEST_F(LaunchLocal, launch_local_is_train_and_the_overrides_count) {
  const Outcome outcome =
      run("bin/tailor launch local mine.yaml machine.ranks=3 compute.threads=5 --resume");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  ASSERT_EQ(seen().size(), 3U);
  EXPECT_THAT(seen()[2],
              HasSubstr("train\nmine.yaml\nmachine.ranks=3\ncompute.threads=5\n--resume\nrank 2"));
  EXPECT_THAT(seen()[2], HasSubstr("local 2 of 3 threads 5"));
}

TEST_F(LaunchLocal, its_exit_code_is_the_ranks) {
  EXPECT_EQ(run("CODE=65 bin/tailor train mine.yaml").code, 65);
}

TEST_F(LaunchLocal, one_rank_or_ranks_of_another_launcher_stay_one_process) {
  EXPECT_EQ(run("bin/tailor train mine.yaml machine.ranks=1").code, 0);
  EXPECT_EQ(run("RANK=1 WORLD_SIZE=4 MASTER_ADDR=n1 bin/tailor train mine.yaml").code, 0);
  ASSERT_EQ(seen().size(), 2U);
  EXPECT_THAT(seen()[0], HasSubstr("rank  of \n"));
  EXPECT_THAT(seen()[1], HasSubstr("rank 1 of 4\n"));
}

/// It reads srun's own variables, whatever machine.ranks says.
TEST_F(LaunchLocal, a_task_of_a_bare_srun_stays_one_process) {
  const std::string step =
      "env SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=2 SLURM_LOCALID=0 SLURM_NODEID=1 "
      "SLURM_JOB_ID=12 SLURM_RESTART_COUNT=1 'SLURM_STEP_NODELIST=n[3-4]' ";
  EXPECT_EQ(run(step + "bin/tailor train mine.yaml").code, 0);
  ASSERT_EQ(seen().size(), 1U);
  EXPECT_THAT(seen()[0], HasSubstr("rank  of \n"));
  const Outcome wrong = run("env WORLD_SIZE=4 bin/tailor train mine.yaml");
  EXPECT_EQ(wrong.code, 2);
  EXPECT_THAT(wrong.err, HasSubstr("WORLD_SIZE=4 is set and RANK is not"));
  EXPECT_EQ(seen().size(), 1U);
}

TEST_F(LaunchLocal, several_machines_share_the_ranks) {
  EXPECT_EQ(run("bin/tailor launch local mine.yaml machine.ranks=4 --nodes 2 --node-rank 1 "
                "--master-addr 10.0.0.7 --master-port 29500")
                .code,
            0);
  ASSERT_EQ(seen().size(), 2U);
  EXPECT_THAT(seen()[0], HasSubstr("rank 2 of 4\nat 10.0.0.7 29500 local 0 of 2"));
  EXPECT_THAT(seen()[1], HasSubstr("rank 3 of 4\nat 10.0.0.7 29500 local 1 of 2"));
}

TEST_F(LaunchLocal, kubeflows_variables_say_the_same) {
  EXPECT_EQ(run("env PET_NNODES=2 PET_NODE_RANK=1 PET_MASTER_ADDR=node-0 PET_MASTER_PORT=29400 "
                "bin/tailor launch local mine.yaml")
                .code,
            0);
  ASSERT_EQ(seen().size(), 1U);
  EXPECT_THAT(seen()[0], HasSubstr("rank 1 of 2\nat node-0 29400 local 0 of 1"));
}

TEST_F(LaunchLocal, impossible_machines_are_refused) {
  const auto message = [&](const std::string& flags) {
    const Outcome outcome = run("bin/tailor launch local mine.yaml " + flags);
    EXPECT_EQ(outcome.code, 2) << flags;
    return outcome.err;
  };
  EXPECT_THAT(message("--nodes 3"), HasSubstr("2 ranks do not spread evenly over 3 nodes"));
  EXPECT_THAT(message("--nodes 2"),
              HasSubstr("several nodes need --master-addr and --master-port"));
  EXPECT_THAT(message("--nodes 2 --node-rank 2 --master-addr x --master-port 1"),
              HasSubstr("--node-rank is 2 of 2 nodes"));
  EXPECT_TRUE(seen().empty());
}

TEST_F(LaunchLocal, a_wrong_recipe_starts_nothing) {
  const Outcome outcome = run("bin/tailor train mine.yaml nmae=3");
  EXPECT_EQ(outcome.code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("unknown key 'nmae'"));
  EXPECT_TRUE(seen().empty());
}

}  // namespace
}  // namespace tailor::testing_support
