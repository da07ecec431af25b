// What takes longer: every phase in which a rank may die, the limits as they are, torchrun.

#include "tests/e2e/rank_deaths.h"

namespace tailor {
namespace {

using namespace testing_support;
using ::testing::HasSubstr;

class EveryRankDeath : public RankDeaths, public testing::WithParamInterface<const char*> {};

TEST_P(EveryRankDeath, in_load_step_collective_and_save_of_either_rank) {
  for (const char* how : {"KILL", "STOP"}) {
    survived({death_in(GetParam(), how, 0), death_in(GetParam(), how, 1)});
  }
}

INSTANTIATE_TEST_SUITE_P(Phases, EveryRankDeath,
                         testing::Values("load", "step", "collective", "save"));

TEST_F(RanksProgram, an_unreachable_master_is_told_within_thirty_seconds) {
  Group nobody, silent;
  start_rank(nobody, 1, 2, train("run", 2));
  // TEST-NET-1: nothing answers there, and mostly nothing says so.
  start_rank(silent, 1, 2, train("run", 2), {{"MASTER_ADDR", "192.0.2.1"}});
  ASSERT_TRUE(nobody.wait(45)) << nobody.processes.outputs();
  ASSERT_TRUE(silent.wait(45)) << silent.processes.outputs();
  for (Group* group : {&nobody, &silent}) {
    EXPECT_EQ(group->processes.exit_code(0), 69);
    EXPECT_THAT(group->processes.output(0), HasSubstr("waiting for rank 0 at "));
    EXPECT_THAT(group->processes.output(0), HasSubstr("error: rank 1 cannot reach rank 0 at "));
    EXPECT_THAT(group->processes.output(0), HasSubstr(" within 30"));
  }
}

TEST_F(RanksProgram, torchrun_starts_the_ranks_and_starts_them_again) {
  ASSERT_EQ(run(train("whole", 2)).code, 0);
  RankProcesses ranks;
  std::vector<std::string> command = {(fs::path(TAILOR_PYTHON).parent_path() / "torchrun").string(),
                                      "--standalone",
                                      "--no-python",
                                      "--nproc-per-node=2",
                                      "--max-restarts=1",
                                      TAILOR_BIN_DIR "/tailor"};
  std::vector<std::string> words = train("run", 2);
  words.emplace_back("--resume");
  command.insert(command.end(), words.begin(), words.end());
  // One rank of the first start dies while it saves.
  ranks.start(command, {{"TAILOR_CACHE", (work_ / "cache").string()},
                        {"TAILOR_DATA", (work_ / "data").string()},
                        {"LD_PRELOAD", TAILOR_BIN_DIR "/libdie_at.so"},
                        {"DIE_AT", "fsync step-00000006 1"},
                        {"DIE_ONCE", (work_ / "died").string()}});
  ASSERT_TRUE(ranks.wait(120)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(0), 0) << ranks.outputs();
  EXPECT_TRUE(fs::exists(work_ / "died")) << ranks.outputs();
  EXPECT_EQ(read_text(work_ / "run/adapter/adapter_model.safetensors"),
            read_text(work_ / "whole/adapter/adapter_model.safetensors"));
  EXPECT_EQ(losses(work_ / "run"), losses(work_ / "whole"));
}

TEST_F(RanksProgram, four_then_two_then_one_then_four_ranks) {
  const std::vector<std::string> constant = {"training.lr_scheduler=constant",
                                             "training.warmup_ratio=0", "training.max_steps=60"};
  ASSERT_EQ(run(train("whole", 1, constant)).code, 0);
  const auto want = metrics("whole");
  int seen = 0;
  for (const int N : {4, 2, 1}) {
    std::vector<std::string> words = train("run", N, constant);
    if (seen > 0) words.emplace_back("--resume");
    const pid_t launcher = TrainProgram::start(words);
    wait_for_step("run", seen + 2);
    ::kill(launcher, SIGTERM);
    const Finished ended = TrainProgram::wait(launcher);
    ASSERT_EQ(ended.code, 75) << ended.err;
    const int now = static_cast<int>(metrics("run").size());
    ASSERT_GT(now, seen);
    seen = now;
  }
  std::vector<std::string> last = train("run", 4, constant);
  last.emplace_back("--resume");
  const Finished done = run(last);
  ASSERT_EQ(done.code, 0) << done.err;
  expect_same_losses(metrics("run"), want);
  EXPECT_LT(distance("whole", "run"), 1e-3);
}

}  // namespace
}  // namespace tailor
