#include "trainer/ranks/ranks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "tests/support/on_ranks.h"

namespace tailor {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class RanksTest : public ::testing::TestWithParam<int> {};

TEST_P(RanksTest, collectives_move_what_they_say_in_rank_order) {
  const int N = GetParam();
  on_ranks(N, [&](Ranks& ranks) {
    ASSERT_EQ(ranks.size(), N);
    const auto mine = static_cast<std::size_t>(ranks.rank());
    const auto count = static_cast<std::size_t>(N);

    std::vector<std::byte> part(3, std::byte(ranks.rank() + 1)), all(3 * count);
    ranks.all_gather(part, all);
    for (std::size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], std::byte(i / 3 + 1));
    // In place.
    std::vector<std::byte> place(3 * count);
    std::copy(part.begin(), part.end(), place.begin() + static_cast<std::ptrdiff_t>(3 * mine));
    ranks.all_gather(std::span(place).subspan(3 * mine, 3), place);
    EXPECT_EQ(place, all);

    std::vector<float> gradients(2 * count), shard(2);
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      gradients[i] = static_cast<float>(i + 1) * std::ldexp(1.0F, ranks.rank());
    }
    ranks.reduce_scatter(gradients, shard);
    const float sum = std::ldexp(1.0F, N) - 1;
    EXPECT_THAT(shard, ElementsAre(static_cast<float>(2 * mine + 1) * sum,
                                   static_cast<float>(2 * mine + 2) * sum));

    std::vector<double> values = {1, static_cast<double>(mine)};
    ranks.all_reduce(values, Reduce::sum);
    EXPECT_THAT(values, ElementsAre(N, N * (N - 1) / 2.0));
    values = {static_cast<double>(mine), -static_cast<double>(mine)};
    ranks.all_reduce(values, Reduce::max);
    EXPECT_THAT(values, ElementsAre(N - 1, 0));

    const int root = N - 1;
    std::vector<std::byte> gathered(ranks.rank() == root ? all.size() : 0);
    ranks.gather(part, gathered, root);
    if (ranks.rank() == root) {
      EXPECT_EQ(gathered, all);
    }

    std::vector<std::byte> word(5, std::byte(ranks.rank()));
    ranks.broadcast(word, root);
    EXPECT_EQ(word, std::vector<std::byte>(5, std::byte(root)));
    ranks.barrier();
  });
}

TEST_P(RanksTest, texts_of_any_length_reach_everybody) {
  on_ranks(GetParam(), [&](Ranks& ranks) {
    const auto texts =
        all_texts(ranks, std::string(static_cast<std::size_t>(ranks.rank()) * 7, 'x'));
    for (std::size_t r = 0; r < texts.size(); ++r) EXPECT_EQ(texts[r], std::string(r * 7, 'x'));
    EXPECT_TRUE(any_rank(ranks, ranks.rank() == ranks.size() - 1));
    EXPECT_FALSE(any_rank(ranks, false));
    EXPECT_EQ(sum_over_ranks(ranks, 1.5), 1.5 * ranks.size());
  });
}

TEST_P(RanksTest, payload_is_what_the_algorithm_must_send) {
  const int N = GetParam();
  on_ranks(N, [&](Ranks& ranks) {
    const auto count = static_cast<std::size_t>(N);
    std::vector<std::byte> part(100), all(100 * count);
    ranks.all_gather(part, all);
    std::vector<float> gradients(10 * count), shard(10);
    ranks.reduce_scatter(gradients, shard);
    const RankTraffic traffic = ranks.traffic();
    EXPECT_EQ(traffic.of(Collective::all_gather).payload_bytes, 100 * (N - 1));
    EXPECT_EQ(traffic.of(Collective::reduce_scatter).payload_bytes, 40 * (N - 1));
    EXPECT_EQ(traffic.of(Collective::all_gather).calls, 1);
    EXPECT_EQ(traffic.payload_bytes(), 140 * (N - 1));
  });
}

TEST_P(RanksTest, ranks_that_disagree_name_the_first_difference_and_both_ranks) {
  const int N = GetParam();
  std::string said;
  try {
    on_ranks(N, [&](Ranks& ranks) {
      const bool odd = N > 1 && ranks.rank() == N - 1;
      const std::vector<SharedFact> facts = {
          {"recipe", "same"}, {"training data", odd ? "b" : "a"}, {"base model", odd ? "d" : "c"}};
      require_agreement(ranks, facts);
    });
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
