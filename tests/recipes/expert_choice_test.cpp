// Which experts a scan chooses, by every rule.

#include "recipes/expert_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

namespace tailor {
namespace {

using testing::DoubleNear;
using testing::ElementsAre;
using testing::IsEmpty;

/// Two layers of five experts, 100 tokens, two choices a token; the gate prefers other experts than
/// the counts do.
ExpertLoad load_of_two() {
  ExpertLoad load;
  load.tokens = 100;
  load.experts_per_token = 2;
  load.layers = {{1, {80, 60, 40, 20, 0}, {10, 20, 30, 40, 0}},
                 {3, {40, 40, 40, 40, 40}, {20, 20, 20, 20, 20}}};
  return load;
}

TEST(ExpertShares, add_up_to_one_by_either_score) {
  const ExpertLoad load = load_of_two();
  EXPECT_THAT(expert_shares(load.layers[0], ExpertScore::token),
              ElementsAre(0.4, 0.3, 0.2, 0.1, 0));
  EXPECT_THAT(expert_shares(load.layers[0], ExpertScore::gate), ElementsAre(0.1, 0.2, 0.3, 0.4, 0));
  const LayerLoad nothing{0, {0, 0}, {0, 0}};
  EXPECT_THAT(expert_shares(nothing, ExpertScore::token), ElementsAre(0, 0));
}

TEST(EffectiveExperts, is_the_exponential_of_the_entropy) {
  EXPECT_DOUBLE_EQ(effective_experts(std::vector<double>(8, 0.125)), 8);
  EXPECT_DOUBLE_EQ(effective_experts(std::vector<double>{0, 1, 0}), 1);
  const double entropy = -(0.75 * std::log(0.75) + 0.25 * std::log(0.25));
  EXPECT_DOUBLE_EQ(effective_experts(std::vector<double>{0.75, 0.25}), std::exp(entropy));
  EXPECT_EQ(effective_experts(std::vector<double>{0, 0}), 0);
}

TEST(TopP, is_the_smallest_set_that_reaches_it) {
  const ExpertLoad load = load_of_two();
  EXPECT_THAT(choose_top_p(load, ExpertScore::token, 0.39),
              ElementsAre(ElementsAre(0), ElementsAre(0, 1)));
  EXPECT_THAT(choose_top_p(load, ExpertScore::token, 0.71),
              ElementsAre(ElementsAre(0, 1, 2), ElementsAre(0, 1, 2, 3)));
  EXPECT_THAT(choose_top_p(load, ExpertScore::gate, 0.7),
              ElementsAre(ElementsAre(2, 3), ElementsAre(0, 1, 2, 3)));
}

TEST(TopP, reaches_what_sums_to_it_but_for_rounding) {
  // 0.1 + 0.2 > 0.3 and 3 * 0.2 > 0.6 in doubles, and other sums fall short the same way.
  for (int n = 1; n <= 40; ++n) {
    ExpertLoad load;
    load.layers = {{0, std::vector<std::int64_t>(40, 1), std::vector<double>(40, 1)}};
    const ChosenExperts chosen = choose_top_p(load, ExpertScore::token, n / 40.0);
    EXPECT_EQ(count_experts(chosen), n);
  }
}

TEST(TopP, of_one_is_every_expert_that_a_token_went_to) {
  ExpertLoad load = load_of_two();
  load.layers[0].tokens = {1'000'000'000'000'000, 1, 0, 0, 1};
  load.layers[0].gate = {1e15, 1e-9, 0, 0, 0};
  EXPECT_THAT(choose_top_p(load, ExpertScore::token, 1)[0], ElementsAre(0, 1, 4));
  EXPECT_THAT(choose_top_p(load, ExpertScore::gate, 1)[0], ElementsAre(0, 1, 4));
}

TEST(Count, takes_the_best_of_every_layer_and_none_that_nobody_went_to) {
  const ExpertLoad load = load_of_two();
  EXPECT_THAT(choose_count(load, ExpertScore::gate, 2),
              ElementsAre(ElementsAre(2, 3), ElementsAre(0, 1)));
  EXPECT_THAT(choose_count(load, ExpertScore::token, 99),
              ElementsAre(ElementsAre(0, 1, 2, 3), ElementsAre(0, 1, 2, 3, 4)));
}

TEST(Total, takes_the_largest_shares_of_the_whole_model) {
  const ExpertLoad load = load_of_two();
  // Shares: 0.4 0.3 0.2 0.1 and five times 0.2.
  EXPECT_THAT(choose_total(load, ExpertScore::token, 2), ElementsAre(ElementsAre(0, 1), IsEmpty()));
  // Among equal shares the lower layer is first, then the lower expert.
  EXPECT_THAT(choose_total(load, ExpertScore::token, 5),
              ElementsAre(ElementsAre(0, 1, 2), ElementsAre(0, 1)));
  EXPECT_EQ(count_experts(choose_total(load, ExpertScore::token, 100)), 9);
  EXPECT_EQ(count_experts(choose_total(load, ExpertScore::token, 0)), 0);
}

TEST(Total, a_larger_one_holds_a_smaller_one) {
  const ExpertLoad load = load_of_two();
  for (std::int64_t n = 1; n <= 9; ++n) {
    const ChosenExperts small = choose_total(load, ExpertScore::gate, n - 1);
    const ChosenExperts large = choose_total(load, ExpertScore::gate, n);
    EXPECT_EQ(count_experts(large), n);
    for (std::size_t l = 0; l < 2; ++l) EXPECT_THAT(large[l], testing::IsSupersetOf(small[l]));
  }
}

TEST(Coverage, is_the_share_of_choices_and_of_gate_weight) {
  const ExpertLoad load = load_of_two();
  const Coverage some = coverage(load.layers[0], std::vector<std::int32_t>{0, 3});
  EXPECT_THAT(some.tokens, DoubleNear(0.5, 1e-15));
  EXPECT_THAT(some.gate, DoubleNear(0.5, 1e-15));
  EXPECT_EQ(coverage(load.layers[0], {}).tokens, 0);
}

}  // namespace
}  // namespace tailor
