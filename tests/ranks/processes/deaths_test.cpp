#include "tests/ranks/processes/deaths.h"

namespace tailor {
namespace {

using ::testing::HasSubstr;

class DeathTest : public ::testing::TestWithParam<const char*> {};

TEST_P(DeathTest, in_each_collective_the_others_leave_and_name_the_rank) {
  const std::vector<std::string> calls = {"all-gather", "reduce-scatter", "all-reduce", "gather",
                                          "broadcast",  "barrier",        "channel"};
  std::vector<Death> deaths;
  // Rank 0, which keeps the meeting point, and another by turns; the long suite has them all.
  const bool stop = std::string(GetParam()) == "stop";
  for (std::size_t i = 0; i < calls.size(); ++i) {
    deaths.push_back({calls[i], GetParam(), (i % 2 == 0) == stop ? 0 : 2});
    if (deaths.size() == 4 || i + 1 == calls.size()) {
      survivors_leave_and_name_the_dead(deaths);
      deaths.clear();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, DeathTest, ::testing::Values("kill", "stop", "cut"));

TEST(RankDeaths, who_does_not_come_out_of_its_own_work_is_ended_by_its_watch) {
  survivors_leave_and_name_the_dead({{"all-gather", "busy", 1}});
}

TEST(RankDeaths, the_words_of_a_rank_that_failed_reach_the_others) {
  for (const int victim : {0, 1}) {
    RankProcesses ranks;
    ranks.start_all(
        3, {kRankProgram, "die", "how=throw", "victim=" + std::to_string(victim), "timeout=2"});
    ASSERT_TRUE(ranks.wait(20)) << ranks.outputs();
    for (int r = 0; r < 3; ++r) {
      EXPECT_EQ(ranks.exit_code(r), r == victim ? 74 : 69) << ranks.outputs();
      EXPECT_THAT(ranks.output(r), HasSubstr(r == victim ? "error: the disk is full"
                                                         : "error: rank " + std::to_string(victim) +
                                                               " failed: the disk is full"));
    }
  }
}

TEST(RankDeaths, abort_ends_the_others_too_with_the_words_that_come_after) {
  RankProcesses ranks;
  ranks.start_all(3, {kRankProgram, "die", "how=abort", "victim=1", "timeout=2"});
  ASSERT_TRUE(ranks.wait(20)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(1), 65);
  for (const int r : {0, 2}) {
    EXPECT_EQ(ranks.exit_code(r), 69);
    EXPECT_THAT(ranks.output(r), HasSubstr("error: rank 1 failed: row 7 is no JSON"));
  }
}

TEST(RankDeaths, a_rank_that_is_done_too_early_is_named) {
  RankProcesses ranks;
  ranks.start_all(3, {kRankProgram, "die", "how=leave", "victim=1", "timeout=2"});
  ASSERT_TRUE(ranks.wait(20)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(1), 0) << ranks.output(1);
  for (const int r : {0, 2}) {
    EXPECT_EQ(ranks.exit_code(r), 69);
    EXPECT_THAT(ranks.output(r), HasSubstr("error: rank 1 left, as one that is done"));
  }
}

TEST(RankDeaths, a_rank_that_lives_and_does_not_get_on_is_told_by_its_phase) {
  RankProcesses ranks;
  ranks.start_all(
      3, {kRankProgram, "die", "how=hang", "victim=1", "timeout=2", "collective=3", "leave=1"});
  ASSERT_TRUE(ranks.wait(20)) << ranks.outputs();
  for (int r = 0; r < 3; ++r) {
    EXPECT_EQ(ranks.exit_code(r), 69);
    EXPECT_THAT(ranks.output(r), HasSubstr("error: all-gather 21 took more than 3.0 s"));
  }
  EXPECT_THAT(ranks.output(0), HasSubstr("): looking out of the window"));
}

TEST(RankDeaths, what_is_prepared_by_one_may_take_longer_than_a_call) {
  RankProcesses ranks;
  ranks.start_all(2, {kRankProgram, "patient", "timeout=2", "collective=1"});
  ASSERT_TRUE(ranks.wait(20)) << ranks.outputs();
  for (int r = 0; r < 2; ++r) EXPECT_EQ(ranks.exit_code(r), 0) << ranks.outputs();
}

}  // namespace
}  // namespace tailor
