#include "trainer/ranks/ranks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "base/error.h"
#include "tests/ranks/cases.h"
#include "tests/support/on_ranks.h"

namespace tailor {
namespace {

using ::testing::HasSubstr;

class RanksTest : public ::testing::TestWithParam<int> {};

TEST_P(RanksTest, collectives_move_what_they_say_in_rank_order) {
  on_ranks(GetParam(), collectives_move_what_they_say);
}

TEST_P(RanksTest, sums_are_taken_in_rank_order) {
  on_ranks(GetParam(), sums_are_taken_in_rank_order);
}

TEST_P(RanksTest, texts_of_any_length_reach_everybody) {
  on_ranks(GetParam(), texts_of_any_length_reach_everybody);
}

TEST_P(RanksTest, payload_is_what_the_algorithm_must_send) {
  on_ranks(GetParam(), payload_is_what_the_algorithm_must_send);
}

TEST_P(RanksTest, ranks_that_disagree_name_the_first_difference_and_both_ranks) {
  const int N = GetParam();
  std::string said;
  try {
    on_ranks(N, disagree);
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::usage);
    said = to_text(error);
  }
  if (N == 1) {
    EXPECT_EQ(said, "");
    return;
  }
  const std::string last = std::to_string(N - 1);
  EXPECT_THAT(said, HasSubstr("ranks 0 and " + last + " do not agree on training data"));
  EXPECT_THAT(said, HasSubstr("rank 0: a"));
  EXPECT_THAT(said, HasSubstr("rank " + last + ": b"));
}

INSTANTIATE_TEST_SUITE_P(Ranks, RanksTest, ::testing::Values(1, 2, 3, 4));

TEST(ThreadRanks, channels_talk_side_by_side_and_nodes_among_themselves) {
  on_ranks(
      5,
      [](Ranks& ranks) {
        const auto channel = ranks.channel("tiles");
        const auto node = ranks.node_channel("node");
        EXPECT_EQ(node->size(), ranks.rank() < 4 ? 2 : 1);
        EXPECT_EQ(node->rank(), ranks.rank() % 2);
        std::thread aside([&] {
          for (int i = 0; i < 50; ++i) EXPECT_EQ(sum_over_ranks(*channel, i), 5.0 * i);
        });
        for (int i = 0; i < 50; ++i) {
          EXPECT_EQ(sum_over_ranks(ranks, 2.0 * i), 10.0 * i);
          EXPECT_EQ(sum_over_ranks(*node, 1), node->size());
        }
        aside.join();
      },
      2);
}

TEST(ThreadRanks, a_rank_that_fails_leaves_nobody_waiting) {
  EXPECT_THROW(on_ranks(3,
                        [](Ranks& ranks) {
                          const auto channel = ranks.channel("tiles");
                          if (ranks.rank() == 1) throw std::runtime_error("disk on fire");
                          channel->barrier();
                        }),
               std::exception);
}

}  // namespace
}  // namespace tailor
