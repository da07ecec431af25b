// The page of a scan: its figures, its size, and text that might be markup.

#include "recipes/expert_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/clock.h"

namespace tailor {
namespace {

using testing::HasSubstr;
using testing::Not;

ExpertSelection selection_for(const ExpertLoad& load, const ChosenExperts& chosen) {
  ExpertSelection out;
  out.model_name = "models/<b>&model";
  out.model.experts = static_cast<std::int64_t>(load.layers.front().tokens.size());
  out.model.experts_per_token = load.experts_per_token;
  out.data = {"rows \"1\".jsonl"};
  out.tokens = load.tokens;
  out.value = 0.5;
  out.expert_rank = 2;
  for (std::size_t l = 0; l < load.layers.size(); ++l) {
    const Coverage share = coverage(load.layers[l], chosen[l]);
    out.layers.push_back({load.layers[l].layer, chosen[l], share.tokens, share.gate});
  }
  out.bytes = 1000 * out.expert_count();
  return out;
}

std::size_t count_of(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++count;
  }
  return count;
}

TEST(ExpertSummary, is_a_row_a_layer) {
  ExpertLoad load;
  load.tokens = 10;
  load.layers = {{1, {6, 2, 2, 0}, {3, 1, 1, 0}}, {3, {0, 0, 0, 0}, {0, 0, 0, 0}}};
  const auto rows = summarise(load, selection_for(load, {{0, 1}, {}}));
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[0].layer, 1);
  EXPECT_EQ(rows[0].top_expert, 0);
  EXPECT_DOUBLE_EQ(rows[0].top_share, 0.6);
  EXPECT_EQ(rows[0].chosen, 2);
  EXPECT_DOUBLE_EQ(rows[0].tokens_covered, 0.8);
  EXPECT_EQ(rows[0].bytes, 2000);
  EXPECT_EQ(rows[1].top_expert, -1);
  EXPECT_EQ(rows[1].effective_experts, 0);
  EXPECT_EQ(rows[1].bytes, 0);
}

TEST(ExpertReport, has_a_field_with_its_count_for_every_expert) {
  ExpertLoad load;
  load.tokens = 16;
  // Shares of an even one: 2.5, 1, 0.5, none.
  load.layers = {{1, {10, 4, 2, 0}, {5, 2, 1, 0}}};
  const std::string page = expert_report_html(load, selection_for(load, {{0}}));
  EXPECT_THAT(page, HasSubstr("<td class=\"h s\" title=\"0: 10, gate 62.50 %\">"));
  EXPECT_THAT(page, HasSubstr("<td class=g title=\"1: 4, gate 25.00 %\">"));
  EXPECT_THAT(page, HasSubstr("<td class=f title=\"2: 2, gate 12.50 %\">"));
  EXPECT_THAT(page, HasSubstr("<td class=a title=\"3: 0\">"));
  EXPECT_EQ(count_of(page, "<td class="), 4U);
  EXPECT_EQ(count_of(page, "<li>"), 11U) << "every colour has its legend";
  EXPECT_THAT(page, HasSubstr("prefers-color-scheme: dark"));
}

TEST(ExpertReport, names_are_text) {
  ExpertLoad load;
  load.layers = {{0, {1, 1}, {1, 1}}};
  const std::string page = expert_report_html(load, selection_for(load, {{0}}));
  EXPECT_THAT(page, Not(HasSubstr("<b>&model")));
  EXPECT_THAT(page, HasSubstr("models/&lt;b&gt;&amp;model"));
  EXPECT_THAT(page, Not(HasSubstr("http")));
  EXPECT_THAT(page, Not(HasSubstr("<script")));
}

TEST(ExpertReport, of_the_largest_model_is_below_a_megabyte_and_quick) {
  ExpertLoad load;
  load.tokens = 10'000'000;
  load.experts_per_token = 8;
  for (std::int64_t l = 3; l < 61; ++l) {
    LayerLoad layer{l, {}, {}};
    for (std::int64_t e = 0; e < 256; ++e) {
      layer.tokens.push_back(100'000 + (e * 7919 + l) % 400'000);
      layer.gate.push_back(static_cast<double>(layer.tokens.back()) * 0.3);
    }
    load.layers.push_back(layer);
  }
  const ChosenExperts chosen = choose_top_p(load, ExpertScore::gate, 0.5);
  const double began = seconds_now();
  const std::string page = expert_report_html(load, selection_for(load, chosen));
  EXPECT_LT(seconds_now() - began, 2);
  EXPECT_LT(page.size(), 1'000'000U);
  EXPECT_GT(page.size(), 400'000U);
  EXPECT_EQ(count_of(page, "<td class="), 58U * 256U);
}

}  // namespace
}  // namespace tailor
