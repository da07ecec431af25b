// Selection files: what is written reads back, and everything else is refused by name.

#include "recipes/expert_selection.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"

namespace tailor {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

ModelSpec spec() {
  ModelSpec out;
  out.architecture = "DeepseekV3ForCausalLM";
  out.hidden = 64;
  out.experts = 16;
  out.experts_per_token = 2;
  out.expert_width = 32;
  out.layers.resize(4);
  out.layers[1].moe = out.layers[3].moe = true;
  return out;
}

ExpertSelection selection() {
  ExpertSelection out;
  out.model_name = "models/deep seek: \"tiny\"";
  out.model = routed_model(spec());
  out.model.fingerprint = "0123456789";
  out.layers = {{1, {0, 1, 2, 5, 9, 10}, 0.75, 0.5}, {3, {}, 0, 0}};
  out.data = {"rows one.jsonl", "two.jsonl"};
  out.counted = "trained";
  out.tokens = 12'345;
  out.by = "token";
  out.rule = "top_p";
  out.value = 0.2;
  out.expert_rank = 4;
  out.bytes = 6 * 4 * 4 * (2 * 64 + 3 * 32);
  return out;
}

Error::Parts refusal(const std::string& text, Fault fault = Fault::bad_file) {
  try {
    parse_selection(text, "chosen.yaml");
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), fault) << to_text(error);
    return error.parts();
  }
  ADD_FAILURE() << "accepted:\n" << text;
  return {};
}

std::string replaced(const std::string& from, const std::string& to) {
  std::string text = selection_text(selection());
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(Family, is_the_name_that_the_architecture_begins_with) {
  ModelSpec model = spec();
  EXPECT_EQ(routed_model(model).family, "deepseek_v3");
  model.architecture = "Llama4ForConditionalGeneration";
  EXPECT_EQ(routed_model(model).family, "llama4");
  model.architecture = "Llama4ForCausalLM";
  EXPECT_EQ(routed_model(model).family, "llama4");
}

TEST(SelectionFile, reads_back_as_it_was_written) {
  const ExpertSelection want = selection();
  const std::string text = selection_text(want);
  const ExpertSelection got = parse_selection(text, "chosen.yaml");
  EXPECT_EQ(selection_text(got), text);
  EXPECT_EQ(got.model_name, want.model_name);
  EXPECT_EQ(got.model.family, "deepseek_v3");
  EXPECT_EQ(got.model.fingerprint, want.model.fingerprint);
  EXPECT_THAT(got.model.moe_layers, ElementsAre(1, 3));
  EXPECT_THAT(got.data, ElementsAre("rows one.jsonl", "two.jsonl"));
  EXPECT_EQ(got.counted, "trained");
  EXPECT_EQ(got.tokens, 12'345);
  EXPECT_EQ(got.rule, "top_p");
  EXPECT_DOUBLE_EQ(got.value, 0.2);
  EXPECT_EQ(got.bytes, want.bytes);
  ASSERT_EQ(got.layers.size(), 2U);
  EXPECT_THAT(got.layers[0].experts, ElementsAre(0, 1, 2, 5, 9, 10));
  EXPECT_THAT(got.layers[1].experts, IsEmpty());
  EXPECT_EQ(got.expert_count(), 6);
  EXPECT_DOUBLE_EQ(got.tokens_covered(), 0.375);
  EXPECT_THAT(text, HasSubstr("experts: [0-2, 5, 9-10]"));
  EXPECT_NO_THROW(check_selection(got, want.model, "chosen.yaml"));
}

// Every expert of the largest model we know, none next to another: within what the reader takes.
TEST(SelectionFile, the_largest_model_s_fits) {
  ExpertSelection large = selection();
  large.model.layers = 61;
  large.model.experts = 384;
  large.layers.clear();
  for (std::int64_t l = 1; l < 61; ++l) {
    ExpertSelection::Layer layer{l, {}, 0.5, 0.5};
    for (std::int32_t e = 0; e < 384; e += 2) layer.experts.push_back(e);
    large.layers.push_back(layer);
  }
  const ExpertSelection got = parse_selection(selection_text(large), "chosen.yaml");
  EXPECT_EQ(got.expert_count(), 60 * 192);
}

TEST(SelectionFile, one_mistake_is_named_with_its_place) {
  EXPECT_THAT(refusal(replaced("experts_per_token", "experts_per_tokn")).where,
              HasSubstr("unknown key 'experts_per_tokn'"));
  EXPECT_EQ(refusal(replaced("  tokens: 12345\n", "  tokens: 12345\n  speed: 3\n")).what,
            "unknown key 'speed'");
  const Error::Parts range = refusal(replaced("9-10", "9-16"));
  EXPECT_EQ(range.what, "expert 16 is out of range, the model has 16 a layer");
  EXPECT_THAT(range.where, HasSubstr("chosen.yaml:"));
  EXPECT_EQ(refusal(replaced("9-10", "2")).what, "expert 2 is named twice");
  EXPECT_THAT(refusal(replaced("9-10", "10-9")).what, HasSubstr("a run of them is needed"));
  EXPECT_EQ(refusal(replaced("[]", "none")).what, "layers.experts is none, a list is needed");
  EXPECT_THAT(refusal(replaced("9-10", "-1")).what, HasSubstr("a run of them is needed"));
  EXPECT_THAT(refusal(replaced("9-10", "nine")).what, HasSubstr("a run of them is needed"));
  EXPECT_EQ(refusal(replaced("layer: 3", "layer: 1")).what, "layer 1 comes after layer 1");
  EXPECT_THAT(refusal(replaced("layer: 3", "layer: 4")).what, HasSubstr("at most 3 is needed"));
  EXPECT_EQ(refusal(replaced("0-2, 5, 9-10", "")).what, "no expert is chosen");
  EXPECT_THAT(refusal(replaced("format: 1", "format: 2")).what, HasSubstr("format 2 is not known"));
  EXPECT_THAT(refusal(replaced("tokens: 12345", "tokens: many")).what, HasSubstr("scan.tokens"));
  EXPECT_THAT(refusal(replaced("rule: top_p", "rule: luck")).what, HasSubstr("luck"));
  EXPECT_THAT(refusal("").what, HasSubstr("a section is needed"));
  EXPECT_THAT(refusal("- 1\n").what, HasSubstr("a section is needed"));
  EXPECT_THAT(refusal("format: [1\n").where, HasSubstr("chosen.yaml"));
}

TEST(SelectionFile, several_mistakes_are_named_at_once) {
  std::string text = replaced("expert_rank: 4", "expert_rank: zero");
  text.replace(text.find("counted: trained"), 16, "counted: some");
  const Error::Parts parts = refusal(text);
  EXPECT_THAT(parts.where, AllOf(HasSubstr("expert_rank"), HasSubstr("counted")));
}

TEST(SelectionFile, one_that_is_not_there_is_a_wrong_recipe) {
  try {
    read_selection("nowhere/chosen.yaml");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::usage);
    EXPECT_THAT(error.parts().what, HasSubstr("expert selection"));
  }
}

TEST(SelectionCheck, another_model_is_refused_with_what_differs) {
  const auto what_of = [&](const RoutedModel& model) -> std::string {
    try {
      check_selection(parse_selection(selection_text(selection()), "chosen.yaml"), model,
                      "chosen.yaml");
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::bad_file);
      EXPECT_THAT(error.parts().where, HasSubstr("chosen.yaml"));
      return error.parts().what;
    }
    return "";
  };
  RoutedModel model = routed_model(spec());
  EXPECT_EQ(what_of(model), "") << "a fingerprint that is not known says nothing";
  model.experts = 8;
  model.family = "llama4";
  EXPECT_THAT(what_of(model), AllOf(HasSubstr("family deepseek_v3, this model is of llama4"),
                                    HasSubstr("experts 16, this model has 8")));
  model = routed_model(spec());
  model.fingerprint = "another";
  EXPECT_THAT(what_of(model), HasSubstr("another model of the same shape"));
  model = routed_model(spec());
  model.moe_layers = {1};
  EXPECT_THAT(what_of(model), HasSubstr("names layer 3, which this model gives no routed experts"));
  model.moe_layers = {1, 2, 3};
  EXPECT_THAT(what_of(model), HasSubstr("leaves out layer 2"));
}

}  // namespace
}  // namespace tailor
