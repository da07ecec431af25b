#pragma once

// What any group of ranks must do, threads or processes: each runs on every rank.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/error.h"
#include "trainer/ranks/ranks.h"

namespace tailor {

inline void collectives_move_what_they_say(Ranks& ranks) {
  using ::testing::ElementsAre;
  const int N = ranks.size();
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
  const std::vector<float> kept = gradients;
  ranks.reduce_scatter(gradients, shard);
  const float sum = std::ldexp(1.0F, N) - 1;
  EXPECT_THAT(shard, ElementsAre(static_cast<float>(2 * mine + 1) * sum,
                                 static_cast<float>(2 * mine + 2) * sum));
  gradients = kept;
  ranks.reduce_scatter(gradients, std::span(gradients).subspan(2 * mine, 2));
  EXPECT_EQ(gradients[2 * mine + 1], shard[1]);

  std::vector<double> values = {1, static_cast<double>(mine)};
  ranks.all_reduce(values, Reduce::sum);
  EXPECT_THAT(values, ElementsAre(N, N * (N - 1) / 2.0));
  values = {static_cast<double>(mine), -static_cast<double>(mine)};
  ranks.all_reduce(values, Reduce::max);
  EXPECT_THAT(values, ElementsAre(N - 1, 0));

  for (int root = 0; root < N; ++root) {
    std::vector<std::byte> gathered(ranks.rank() == root ? all.size() : 0);
    ranks.gather(part, gathered, root);
    if (ranks.rank() == root) {
      EXPECT_EQ(gathered, all);
    }
    std::vector<std::byte> word(5, std::byte(ranks.rank()));
    ranks.broadcast(word, root);
    EXPECT_EQ(word, std::vector<std::byte>(5, std::byte(root)));
  }
  ranks.barrier();

  // Nothing at all, from everybody.
  ranks.all_gather({}, {});
  ranks.reduce_scatter({}, {});
  ranks.all_reduce({}, Reduce::sum);
  ranks.gather({}, {}, 0);
  ranks.broadcast({}, N - 1);
}

/// Float sums depend on their order: it is the ranks' order, from zero.
inline void sums_are_taken_in_rank_order(Ranks& ranks) {
  const auto count = static_cast<std::size_t>(ranks.size());
  const auto value = [](std::size_t rank, std::size_t at) {
    return std::ldexp(1.0F + static_cast<float>(at % 97) / 97,
                      static_cast<int>((rank * 13 + at) % 40));
  };
  const std::size_t n = 600'001;  // several pieces, the last one odd
  std::vector<float> all(n * count), mine(n);
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i] = value(static_cast<std::size_t>(ranks.rank()), i);
  }
  ranks.reduce_scatter(all, mine);
  for (std::size_t i = 0; i < n; i += 1 + i % 5) {
    float sum = 0;
    for (std::size_t r = 0; r < count; ++r) {
      sum += value(r, i + n * static_cast<std::size_t>(ranks.rank()));
    }
    ASSERT_EQ(mine[i], sum);
  }
  std::vector<double> doubles(7);
  for (std::size_t i = 0; i < doubles.size(); ++i) {
    doubles[i] = std::ldexp(1.0 / 3, ranks.rank() * 20 + static_cast<int>(i));
  }
  ranks.all_reduce(doubles, Reduce::sum);
  for (std::size_t i = 0; i < doubles.size(); ++i) {
    double sum = 0;
    for (int r = 0; r < ranks.size(); ++r) sum += std::ldexp(1.0 / 3, r * 20 + static_cast<int>(i));
    ASSERT_EQ(doubles[i], sum);
  }
}

inline void texts_of_any_length_reach_everybody(Ranks& ranks) {
  const auto texts = all_texts(ranks, std::string(static_cast<std::size_t>(ranks.rank()) * 7, 'x'));
  for (std::size_t r = 0; r < texts.size(); ++r) EXPECT_EQ(texts[r], std::string(r * 7, 'x'));
  EXPECT_TRUE(any_rank(ranks, ranks.rank() == ranks.size() - 1));
  EXPECT_FALSE(any_rank(ranks, false));
  EXPECT_EQ(sum_over_ranks(ranks, 1.5), 1.5 * ranks.size());
}

inline void payload_is_what_the_algorithm_must_send(Ranks& ranks) {
  const int N = ranks.size();
  const auto count = static_cast<std::size_t>(N);
  const RankTraffic before = ranks.traffic();
  std::vector<std::byte> part(100), all(100 * count);
  ranks.all_gather(part, all);
  std::vector<float> gradients(10 * count), shard(10);
  ranks.reduce_scatter(gradients, shard);
  const RankTraffic traffic = ranks.traffic();
  const auto more = [&](Collective which) {
    return traffic.of(which).payload_bytes - before.of(which).payload_bytes;
  };
  EXPECT_EQ(more(Collective::all_gather), 100 * (N - 1));
  EXPECT_EQ(more(Collective::reduce_scatter), 40 * (N - 1));
  EXPECT_EQ(traffic.of(Collective::all_gather).calls - before.of(Collective::all_gather).calls, 1);
  EXPECT_EQ(traffic.payload_bytes() - before.payload_bytes(), 140 * (N - 1));
}

/// Facts of which the last rank has others.
inline void disagree(Ranks& ranks) {
  const int N = ranks.size();
  const bool odd = N > 1 && ranks.rank() == N - 1;
  const std::vector<SharedFact> facts = {
      {"recipe", "same"}, {"training data", odd ? "b" : "a"}, {"base model", odd ? "d" : "c"}};
  require_agreement(ranks, facts);
}

}  // namespace tailor
