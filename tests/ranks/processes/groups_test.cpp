#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/ranks/processes/deaths.h"

namespace tailor {
namespace {

using ::testing::HasSubstr;

class RankProcessesTest : public ::testing::TestWithParam<int> {};

TEST_P(RankProcessesTest, collectives_channels_and_nodes) {
  RankProcesses ranks;
  ranks.start_all(GetParam(), {kRankProgram, "cases"});
  ASSERT_TRUE(ranks.wait(60)) << ranks.outputs();
  for (int r = 0; r < GetParam(); ++r) {
    EXPECT_EQ(ranks.exit_code(r), 0) << ranks.output(r);
    EXPECT_THAT(ranks.output(r),
                HasSubstr("node " + std::to_string(r) + " of " + std::to_string(GetParam())));
  }
}

TEST_P(RankProcessesTest, two_runs_give_the_same_bits) {
  std::vector<std::string> bits;
  for (int run = 0; run < 2; ++run) {
    RankProcesses ranks;
    ranks.start_all(GetParam(), {kRankProgram, "bits"});
    ASSERT_TRUE(ranks.wait(60)) << ranks.outputs();
    for (int r = 0; r < GetParam(); ++r) {
      ASSERT_EQ(ranks.exit_code(r), 0) << ranks.output(r);
      bits.push_back(ranks.output(r));
    }
  }
  EXPECT_THAT(bits[0], HasSubstr("bits "));
  // Every rank has gathered all parts.
  for (const std::string& each : bits) EXPECT_EQ(each, bits[0]);
}

TEST_P(RankProcessesTest, ranks_that_disagree_end_with_2_and_say_so) {
  const int N = GetParam();
  RankProcesses ranks;
  ranks.start_all(N, {kRankProgram, "disagree"});
  ASSERT_TRUE(ranks.wait(60)) << ranks.outputs();
  for (int r = 0; r < N; ++r) {
    EXPECT_EQ(ranks.exit_code(r), N == 1 ? 0 : 2) << ranks.output(r);
    if (N > 1) {
      EXPECT_THAT(ranks.output(r), HasSubstr("ranks 0 and " + std::to_string(N - 1) +
                                             " do not agree on training data"));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, RankProcessesTest, ::testing::Values(1, 2, 3, 4));

TEST(RankProcesses, two_nodes_of_one_host_are_told_apart_by_local_world_size) {
  for (const int N : {3, 4}) {
    RankProcesses ranks;
    ranks.start_all(N, {kRankProgram, "cases"}, {{"LOCAL_WORLD_SIZE", "2"}, {"LOCAL_RANK", ""}});
    ASSERT_TRUE(ranks.wait(60)) << ranks.outputs();
    for (int r = 0; r < N; ++r) {
      EXPECT_EQ(ranks.exit_code(r), 0) << ranks.output(r);
      EXPECT_THAT(ranks.output(r), HasSubstr("node " + std::to_string(r % 2) + " of " +
                                             (r == 2 && N == 3 ? "1" : "2")));
    }
  }
}

}  // namespace
}  // namespace tailor
