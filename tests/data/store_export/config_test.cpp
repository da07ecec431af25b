#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/store/export_config.h"

namespace tailor {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

ExportedLinear linear(const std::string& module, const WeightFormat& format) {
  return {module, "", "", format};
}
ExportedLinear expert(int layer, int number, const std::string& projection,
                      const WeightFormat& format) {
  const std::string experts = "model.layers." + std::to_string(layer) + ".feed_forward.experts";
  return {experts + "." + std::to_string(number) + "." + projection, experts, projection, format};
}
const WeightFormat kInt4 = WeightFormat::int4(128), kBf16 = WeightFormat::bf16();

TEST(QuantizationConfig, is_null_where_nothing_is_quantised) {
  EXPECT_TRUE(quantization_config({linear("lm_head", kBf16)}, false).is_null());
  EXPECT_EQ(quantization_format({linear("lm_head", kBf16)}), "");
}

TEST(QuantizationConfig, of_one_scheme_targets_linears_and_names_the_others) {
  const Json config = quantization_config(
      {linear("a.q_proj", kBf16), linear("a.down_proj", kInt4), linear("lm_head", kBf16)}, true);
  EXPECT_EQ(config["quant_method"], "compressed-tensors");
  EXPECT_EQ(config["format"], "pack-quantized");
  EXPECT_EQ(config["config_groups"].size(), 1U);
  const Json group = config["config_groups"]["group_0"];
  EXPECT_THAT(group["targets"], ElementsAre("Linear"));
  EXPECT_EQ(group["weights"],
            Json::parse(R"({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group",
                            "group_size": 128, "dynamic": false})"));
  EXPECT_TRUE(group["input_activations"].is_null());
  EXPECT_FALSE(group.contains("format"));
  EXPECT_THAT(config["ignore"], ElementsAre("a.q_proj", "lm_head", "re:vision_model.*",
                                            "re:multi_modal_projector.*"));
}

TEST(QuantizationConfig, experts_that_are_alike_are_one_expression) {
  const std::vector<ExportedLinear> linears = {
      expert(1, 0, "up_proj", kBf16),   expert(1, 1, "up_proj", kBf16),
      expert(1, 0, "down_proj", kBf16), expert(1, 1, "down_proj", kInt4),
      expert(11, 0, "up_proj", kInt4),  expert(11, 1, "up_proj", kInt4)};
  EXPECT_THAT(quantization_config(linears, false)["ignore"],
              ElementsAre(R"(re:model\.layers\.1\.feed_forward\.experts\.[0-9]+\.up_proj$)",
                          "model.layers.1.feed_forward.experts.0.down_proj"));
}

TEST(QuantizationConfig, of_several_schemes_every_group_names_its_linears) {
  const std::vector<ExportedLinear> linears = {linear("a.o_proj", WeightFormat::fp8_rows()),
                                               expert(3, 0, "up_proj", kInt4),
                                               expert(3, 1, "up_proj", kInt4),
                                               linear("a.k_proj", WeightFormat::fp8_blocks()),
                                               linear("a.gate_proj", WeightFormat::int4(64)),
                                               linear("lm_head", kBf16)};
  const Json config = quantization_config(linears, false);
  EXPECT_EQ(config["format"], "mixed-precision");
  const Json& groups = config["config_groups"];
  ASSERT_EQ(groups.size(), 4U);
  EXPECT_THAT(groups["group_0"]["targets"], ElementsAre("a.o_proj"));
  EXPECT_EQ(groups["group_0"]["format"], "float-quantized");
  EXPECT_EQ(groups["group_0"]["input_activations"]["strategy"], "token");
  EXPECT_THAT(groups["group_1"]["targets"],
              ElementsAre(R"(re:model\.layers\.3\.feed_forward\.experts\.[0-9]+\.up_proj$)"));
  EXPECT_EQ(groups["group_1"]["format"], "pack-quantized");
  EXPECT_THAT(groups["group_2"]["weights"]["block_structure"], ElementsAre(128, 128));
  EXPECT_EQ(groups["group_2"]["input_activations"]["group_size"], 128);
  EXPECT_EQ(groups["group_3"]["weights"]["group_size"], 64);
  EXPECT_THAT(config["ignore"], ElementsAre("lm_head"));
}

TEST(QuantizationConfig, of_fp8_blocks_alone_is_deepseeks) {
  const WeightFormat fp8 = WeightFormat::fp8_blocks();
  const Json config = quantization_config(
      {linear("a.q_proj", kBf16), linear("a.o_proj", fp8), expert(1, 0, "up_proj", kBf16),
       expert(1, 1, "up_proj", kBf16), expert(3, 0, "up_proj", fp8), expert(3, 1, "up_proj", kBf16),
       linear("lm_head", kBf16)},
      false);
  EXPECT_EQ(config["quant_method"], "fp8");
  EXPECT_THAT(config["modules_to_not_convert"],
              ElementsAre("a.q_proj", "model.layers.1.feed_forward.experts",
                          "model.layers.3.feed_forward.experts.1.up_proj", "lm_head"));
  EXPECT_FALSE(config.contains("config_groups"));
}

}  // namespace
}  // namespace tailor
