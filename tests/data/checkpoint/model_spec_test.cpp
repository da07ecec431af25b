#include "data/checkpoint/model_spec.h"

#include <gmock/gmock.h>

#include <cmath>
#include <tuple>

#include "data/checkpoint/checkpoint.h"
#include "tests/data/checkpoint/folder_fixture.h"

namespace tailor {
namespace {

using testing::HasSubstr;
using testing_support::error_of;

Json golden_config(const std::string& name) {
  return read_json(fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name);
}
Json llama() { return golden_config("llama_tiny/model/config.json"); }
Json llama4() { return golden_config("llama4_maverick_tiny/model/config.json"); }
Json deepseek() { return golden_config("deepseek_v3_tiny/model/config.json"); }
/// As it is published, of the configs that come with Tailor.
Json shipped(const std::string& name) {
  return read_json(fs::path(TAILOR_SOURCE_DIR) / "recipes/models" / (name + ".json"));
}
Json r1() { return shipped("deepseek-ai--DeepSeek-R1"); }
ModelSpec spec_of(const Json& config) { return model_spec_from_config(config, "config.json"); }
std::string refusal(const Json& config) {
  return error_of([&] { spec_of(config); });
}
Json with(Json config, const std::string& key, const Json& value) {
  config[key] = value;
  return config;
}
Json without(Json config, const std::string& key) {
  config.erase(key);
  return config;
}

/// As meta-llama/Llama-4-Maverick-17B-128E-Instruct publishes it, with what decides the model.
Json published_maverick() {
  Json text = {{"attention_bias", false},
               {"attention_chunk_size", 8192},
               {"attn_scale", 0.1},
               {"attn_temperature_tuning", 4},
               {"floor_scale", 8192},
               {"for_llm_compressor", false},
               {"head_dim", 128},
               {"hidden_act", "silu"},
               {"hidden_size", 5120},
               {"interleave_moe_layer_step", 2},
               {"intermediate_size", 8192},
               {"intermediate_size_mlp", 16384},
               {"max_position_embeddings", 1048576},
               {"model_type", "llama4_text"},
               {"no_rope_layers", Json::array()},
               {"num_attention_heads", 40},
               {"num_experts_per_tok", 1},
               {"num_hidden_layers", 48},
               {"num_key_value_heads", 8},
               {"num_local_experts", 128},
               {"rms_norm_eps", 1e-5},
               {"rope_scaling", nullptr},
               {"rope_theta", 500000.0},
               {"torch_dtype", "bfloat16"},
               {"use_qk_norm", false},
               {"vocab_size", 202048}};
  return {{"architectures", {"Llama4ForConditionalGeneration"}},
          {"model_type", "llama4"},
          {"text_config", text},
          {"tie_word_embeddings", false},
          {"vision_config", {{"model_type", "llama4_vision_model"}}}};
}

TEST(ModelSpec, maverick_as_published) {
  const ModelSpec spec = spec_of(published_maverick());
  EXPECT_EQ(spec.family, Family::llama4);
  EXPECT_EQ(spec.architecture, "Llama4ForConditionalGeneration");
  EXPECT_EQ(spec.layer_count(), 48);
  EXPECT_EQ(spec.moe_layer_count(), 24);
  EXPECT_EQ(spec.dense_width, 16384);
  EXPECT_EQ(spec.expert_width, 8192);
  EXPECT_EQ(spec.query_width(), 5120);
  EXPECT_EQ(spec.kv_width(), 1024);
  EXPECT_TRUE(spec.temperature);
  EXPECT_FALSE(spec.qk_norm);
  EXPECT_TRUE(spec.rope.pairs);
  EXPECT_EQ(spec.rope.kind, RopeSpec::Kind::plain);
  EXPECT_EQ(spec.rope.theta, 500000);
  for (std::size_t l = 0; l < 48; ++l) {
    EXPECT_EQ(spec.layers[l].moe, l % 2 == 1) << l;
    EXPECT_EQ(spec.layers[l].rope, l % 4 != 3) << l;
    EXPECT_EQ(spec.layers[l].attention_chunk, l % 4 != 3 ? 8192 : 0) << l;
  }
  // Meta's model card: 400B in all, 17B active.
  EXPECT_NEAR(static_cast<double>(spec.parameters()), 400e9, 4e9);
  EXPECT_NEAR(static_cast<double>(spec.active_parameters()), 17e9, 0.5e9);
}

TEST(ModelSpec, scout_as_published) {
  Json config = published_maverick();
  Json& text = config["text_config"];
  text["num_local_experts"] = 16;
  text["interleave_moe_layer_step"] = 1;
  text["use_qk_norm"] = true;
  text["rope_scaling"] = {{"factor", 16.0},
                          {"high_freq_factor", 1.0},
                          {"low_freq_factor", 1.0},
                          {"original_max_position_embeddings", 8192},
                          {"rope_type", "llama3"}};
  const ModelSpec spec = spec_of(config);
  EXPECT_EQ(spec.moe_layer_count(), 48);
  EXPECT_TRUE(spec.qk_norm);
  EXPECT_EQ(spec.rope.kind, RopeSpec::Kind::llama3);
  EXPECT_EQ(spec.rope.factor, 16);
  EXPECT_EQ(spec.rope.high_freq_factor, spec.rope.low_freq_factor);
  EXPECT_NEAR(static_cast<double>(spec.parameters()), 109e9, 2e9);
  EXPECT_NEAR(static_cast<double>(spec.active_parameters()), 17e9, 0.5e9);
}

TEST(ModelSpec, llama_as_published) {
  // HuggingFaceTB/SmolLM2-135M-Instruct.
  const ModelSpec spec = spec_of({{"architectures", {"LlamaForCausalLM"}},
                                  {"attention_bias", false},
                                  {"hidden_act", "silu"},
                                  {"hidden_size", 576},
                                  {"intermediate_size", 1536},
                                  {"max_position_embeddings", 8192},
                                  {"mlp_bias", false},
                                  {"model_type", "llama"},
                                  {"num_attention_heads", 9},
                                  {"num_hidden_layers", 30},
                                  {"num_key_value_heads", 3},
                                  {"pretraining_tp", 1},
                                  {"rms_norm_eps", 1e-5},
                                  {"rope_interleaved", false},
                                  {"rope_scaling", nullptr},
                                  {"rope_theta", 100000},
                                  {"tie_word_embeddings", true},
                                  {"torch_dtype", "bfloat16"},
                                  {"vocab_size", 49152}});
  EXPECT_EQ(spec.head_dim, 64);
  EXPECT_TRUE(spec.tied_head);
  EXPECT_FALSE(spec.rope.pairs);
  EXPECT_EQ(spec.moe_layer_count(), 0);
  EXPECT_EQ(spec.parameters(), 134'515'008) << "as the hub counts them";
  EXPECT_EQ(spec.active_parameters(), spec.parameters());
}

TEST(ModelSpec, r1_as_published) {
  const ModelSpec spec = spec_of(r1());
  EXPECT_EQ(spec.family, Family::deepseek_v3);
  EXPECT_EQ(spec.layer_count(), 61);
  EXPECT_EQ(spec.moe_layer_count(), 58);
  for (std::size_t l = 0; l < 61; ++l) EXPECT_EQ(spec.layers[l].moe, l >= 3) << l;
  EXPECT_EQ(spec.query_width(), 128 * 192);
  EXPECT_EQ(spec.qkv_width(), 1536 + 512 + 64);
  EXPECT_EQ(spec.attention_width(), 128 * 128);
  EXPECT_EQ(spec.shared_width, 2048);
  EXPECT_EQ(spec.prediction_layers, 1);
  EXPECT_EQ(spec.rope.kind, RopeSpec::Kind::yarn);
  EXPECT_EQ(spec.rope.original_positions, 4096);
  EXPECT_DOUBLE_EQ(spec.rope.attention_factor, 1) << "mscale and mscale_all_dim are equal";
  EXPECT_TRUE(spec.rope.pairs);
  const double mscale = 0.1 * std::log(40.0) + 1;  // on the softmax instead
  EXPECT_DOUBLE_EQ(spec.softmax_scale(), mscale * mscale / std::sqrt(192.0));
  EXPECT_EQ(spec.router.groups, 8);
  EXPECT_EQ(spec.router.groups_kept, 4);
  EXPECT_EQ(spec.router.scale, 2.5);
  EXPECT_TRUE(spec.router.normalise);
  // Without the prediction layer; DeepSeek-AI, arXiv 2412.19437: 671B in all, 37B active.
  EXPECT_EQ(spec.parameters(), 671'026'419'200);
  EXPECT_NEAR(static_cast<double>(spec.active_parameters()), 37.5e9, 0.1e9);
}

TEST(ModelSpec, distills_of_r1_as_published) {
  const ModelSpec qwen = spec_of(shipped("deepseek-ai--DeepSeek-R1-Distill-Qwen-7B"));
  EXPECT_EQ(qwen.family, Family::qwen2);
  EXPECT_TRUE(qwen.qkv_bias);
  EXPECT_EQ(qwen.rope.theta, 10000);
  EXPECT_EQ(qwen.parameters(), 7'615'616'512) << "as the hub counts them";
  const ModelSpec llama = spec_of(shipped("deepseek-ai--DeepSeek-R1-Distill-Llama-8B"));
  EXPECT_EQ(llama.family, Family::llama);
  EXPECT_EQ(llama.rope.kind, RopeSpec::Kind::llama3);
  EXPECT_EQ(llama.parameters(), 8'030'261'248) << "as the hub counts them";
}

TEST(ModelSpec, r1_reads_the_same_in_both_spellings) {
  Json v5 = without(without(r1(), "rope_scaling"), "rope_theta");
  v5["rope_parameters"] = without(r1().at("rope_scaling"), "type");
  v5["rope_parameters"]["rope_type"] = "yarn";
  v5["rope_parameters"]["rope_theta"] = 10000.0;
  v5["head_dim"] = 64;  // transformers 5 writes the rotary width here
  v5["qk_head_dim"] = 192;
  v5["rope_interleave"] = true;
  for (const char* key : {"topk_method", "scoring_func", "moe_layer_freq"}) v5.erase(key);
  const ModelSpec a = spec_of(r1()), b = spec_of(v5);
  const auto rope = [](const RopeSpec& r) {
    return std::tuple(r.kind, r.theta, r.factor, r.original_positions, r.beta_fast, r.beta_slow,
                      r.truncate, r.attention_factor, r.mscale_all_dim, r.pairs, r.factors);
  };
  const auto sizes = [](const ModelSpec& s) {
    return std::tuple(s.hidden, s.heads, s.kv_heads, s.head_dim, s.vocab, s.dense_width,
                      s.expert_width, s.shared_width, s.experts, s.experts_per_token,
                      s.positions_max, s.norm_eps, s.softmax_scale(), s.parameters(),
                      s.prediction_layers);
  };
  const auto latent = [](const LatentSpec& l) {
    return std::tuple(l.q_rank, l.kv_rank, l.nope_dim, l.rope_dim, l.value_dim);
  };
  const auto router = [](const RouterSpec& r) {
    return std::tuple(r.kind, r.groups, r.groups_kept, r.normalise, r.scale);
  };
  EXPECT_EQ(rope(a.rope), rope(b.rope));
  EXPECT_EQ(sizes(a), sizes(b));
  EXPECT_EQ(latent(a.latent), latent(b.latent));
  EXPECT_EQ(router(a.router), router(b.router));
}

TEST(ModelSpec, parameters_are_the_checkpoint_s) {
  for (const char* name : {"llama_tiny", "llama4_maverick_tiny", "llama4_scout_tiny", "qwen2_tiny",
                           "deepseek_v3_tiny"}) {
    const fs::path folder = fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name / "model";
    std::int64_t elements = 0;
    const Checkpoint checkpoint = Checkpoint::open(folder);
    for (const auto& entry : checkpoint.tensors()) elements += entry.second.info.elements();
    EXPECT_EQ(read_model_spec(folder).parameters(), elements) << name;
  }
}

TEST(ModelSpec, both_spellings_of_rotary_embedding) {
  const auto same = [](const RopeSpec& a, const RopeSpec& b) {
    return a.kind == b.kind && a.theta == b.theta && a.factor == b.factor &&
           a.low_freq_factor == b.low_freq_factor && a.high_freq_factor == b.high_freq_factor &&
           a.original_positions == b.original_positions && a.pairs == b.pairs;
  };
  const Json v5 = golden_config("llama4_scout_tiny/model/config.json");
  Json v4 = without(v5, "rope_parameters");
  v4["rope_scaling"] = without(v5.at("rope_parameters"), "rope_theta");
  v4["rope_theta"] = v5.at("rope_parameters").at("rope_theta");
  EXPECT_TRUE(same(spec_of(v5).rope, spec_of(v4).rope));
  EXPECT_EQ(spec_of(v4).rope.kind, RopeSpec::Kind::llama3);
  EXPECT_EQ(spec_of(v4).rope.theta, 500000);
  v4["rope_scaling"].erase("rope_type");
  v4["rope_scaling"]["type"] = "llama3";  // before transformers 4.43
  EXPECT_TRUE(same(spec_of(v5).rope, spec_of(v4).rope));

  const ModelSpec wrapped = spec_of(golden_config("llama4_conditional_tiny/model/config.json"));
  const ModelSpec old = spec_of(golden_config("llama4_conditional_tiny/config.v4style.json"));
  EXPECT_TRUE(same(wrapped.rope, old.rope));
  EXPECT_EQ(wrapped.parameters(), old.parameters());
  for (std::size_t l = 0; l < wrapped.layers.size(); ++l) {
    EXPECT_EQ(wrapped.layers[l].rope, old.layers[l].rope);
    EXPECT_EQ(wrapped.layers[l].attention_chunk, old.layers[l].attention_chunk);
  }
  EXPECT_EQ(spec_of(without(without(llama(), "rope_parameters"), "rope_theta")).rope.theta, 10000);
}

TEST(ModelSpec, llama4_defaults) {
  Json config = llama4();
  for (const char* key :
       {"no_rope_layers", "layer_types", "moe_layers", "attention_chunk_size", "use_qk_norm",
        "attn_temperature_tuning", "floor_scale", "attn_scale", "interleave_moe_layer_step",
        "no_rope_layer_interval", "num_experts_per_tok", "rms_norm_eps", "tie_word_embeddings"}) {
    config.erase(key);
  }
  const ModelSpec spec = spec_of(config);
  EXPECT_TRUE(spec.qk_norm);
  EXPECT_TRUE(spec.temperature);
  EXPECT_EQ(spec.temperature_floor, 8192);
  EXPECT_EQ(spec.temperature_scale, 0.1);
  EXPECT_EQ(spec.experts_per_token, 1);
  EXPECT_EQ(spec.norm_eps, 1e-5);
  EXPECT_FALSE(spec.tied_head);
  for (std::size_t l = 0; l < 4; ++l) {
    EXPECT_TRUE(spec.layers[l].moe);
    EXPECT_EQ(spec.layers[l].rope, l != 3);
    EXPECT_EQ(spec.layers[l].attention_chunk, l != 3 ? 8192 : 0);
  }
  EXPECT_FALSE(spec_of(with(llama4(), "attn_temperature_tuning", 0)).temperature);
  EXPECT_EQ(spec_of(with(llama4(), "moe_layers", Json::array({2}))).moe_layer_count(), 1);
  EXPECT_EQ(spec_of(with(llama4(), "moe_layers", Json::array())).moe_layer_count(), 0)
      << "an empty list is a list";
}

TEST(ModelSpec, each_option_that_is_not_implemented_is_refused_by_name) {
  EXPECT_EQ(refusal(with(llama(), "hidden_act", "gelu")),
            "error: hidden_act is \"gelu\", which Tailor does not implement\n"
            "  where: config.json\n"
            "  mend:  Models with hidden_act: \"silu\" can be trained.\n");
  EXPECT_THAT(refusal(with(llama(), "mlp_bias", true)), HasSubstr("mlp_bias is true"));
  EXPECT_THAT(refusal(with(llama(), "attention_bias", true)), HasSubstr("attention_bias is true"));
  EXPECT_THAT(refusal(with(llama4(), "attention_bias", true)), HasSubstr("attention_bias is true"));
  EXPECT_THAT(refusal(with(r1(), "attention_bias", true)), HasSubstr("attention_bias is true"));
  Json rope = llama();
  rope["rope_parameters"]["rope_type"] = "dynamic";
  EXPECT_EQ(refusal(rope),
            "error: rope type 'dynamic' is not implemented\n"
            "  where: config.json, rope_parameters\n"
            "  mend:  Rope types 'default', 'llama3', 'yarn' and 'longrope' can be trained.\n");
  rope["rope_parameters"] = {{"rope_type", "llama3"},
                             {"factor", 0.5},
                             {"low_freq_factor", 1},
                             {"high_freq_factor", 4},
                             {"original_max_position_embeddings", 8192}};
  EXPECT_THAT(refusal(rope), HasSubstr("impossible factors"));
  EXPECT_THAT(
      refusal(with(llama4(), "layer_types", Json::array({"sliding_attention", "x", "x", "x"}))),
      HasSubstr("layer_types[0] is \"sliding_attention\", which is not implemented"));
  EXPECT_EQ(refusal(with(with(llama(), "model_type", "qwen3_moe"), "architectures",
                         Json::array({"Qwen3MoeForCausalLM"}))),
            "error: model_type 'qwen3_moe' is not supported (architecture Qwen3MoeForCausalLM)\n"
            "  where: config.json\n"
            "  mend:  Supported: llama (LlamaForCausalLM), qwen2 (Qwen2ForCausalLM), llama4 "
            "(Llama4ForCausalLM and the language part of Llama4ForConditionalGeneration), "
            "deepseek_v3 (DeepseekV3ForCausalLM: V3, R1).\n");
}

TEST(ModelSpec, what_deepseek_has_beside_v3_is_refused) {
  EXPECT_EQ(refusal(with(r1(), "topk_method", "greedy")),
            "error: topk_method is \"greedy\", which Tailor does not implement\n"
            "  where: config.json\n"
            "  mend:  Models with topk_method: \"noaux_tc\" can be trained.\n");
  EXPECT_THAT(refusal(with(r1(), "scoring_func", "softmax")),
              HasSubstr("scoring_func is \"softmax\", which Tailor does not implement"));
  EXPECT_THAT(refusal(with(r1(), "moe_layer_freq", 2)), HasSubstr("moe_layer_freq is 2, which"));
  Json quant = r1();
  quant["quantization_config"]["weight_block_size"] = {64, 128};
  EXPECT_EQ(refusal(quant),
            "error: weight_block_size is [64,128], which Tailor does not implement\n"
            "  where: config.json, quantization_config\n"
            "  mend:  Models with weight_block_size: [128,128] can be trained.\n");
  quant = r1();
  quant["quantization_config"]["fmt"] = "e5m2";
  EXPECT_THAT(refusal(quant), HasSubstr("fmt is \"e5m2\", which Tailor does not implement"));
  Json rope = r1();
  rope["rope_scaling"]["type"] = "dynamic";
  EXPECT_THAT(refusal(rope), HasSubstr("rope type 'dynamic' is not implemented"));
  rope["rope_scaling"] = r1().at("rope_scaling");
  rope["rope_scaling"]["factor"] = 0.5;
  EXPECT_THAT(refusal(rope), HasSubstr("yarn rope scaling has impossible factors"));
  EXPECT_EQ(refusal(with(with(r1(), "model_type", "deepseek_v4"), "architectures",
                         Json::array({"DeepseekV4ForCausalLM"}))),
            "error: model_type 'deepseek_v4' is not supported (architecture "
            "DeepseekV4ForCausalLM)\n"
            "  where: config.json\n"
            "  mend:  Supported: llama (LlamaForCausalLM), qwen2 (Qwen2ForCausalLM), llama4 "
            "(Llama4ForCausalLM and the language part of Llama4ForConditionalGeneration), "
            "deepseek_v3 (DeepseekV3ForCausalLM: V3, R1).\n");
  EXPECT_THAT(
      refusal(with(r1(), "n_group", 7)),
      HasSubstr("n_group 7, topk_group 4 and num_experts_per_tok 8 do not fit 256 experts"));
  EXPECT_THAT(refusal(with(r1(), "topk_group", 9)), HasSubstr("n_group 8, topk_group 9"));
  EXPECT_THAT(refusal(with(r1(), "num_experts_per_tok", 129)),
              HasSubstr("num_experts_per_tok 129 do not fit 256 experts"))
      << "four groups hold 128";
  EXPECT_THAT(refusal(with(r1(), "first_k_dense_replace", 61)),
              HasSubstr("first_k_dense_replace is 61"));
}

/// Each refusal whole: the key, what was found, what is supported.
TEST(ModelSpec, what_deepseek_configs_ask_for_is_named_with_what_is_supported) {
  const auto refused = [](const Json& config, const std::string& key, const std::string& found,
                          const std::string& supported, const std::string& section = "") {
    EXPECT_EQ(refusal(config), "error: " + key + " is " + found +
                                   ", which Tailor does not implement\n  where: config.json" +
                                   section + "\n  mend:  Models with " + key + ": " + supported +
                                   " can be trained.\n");
  };
  for (const char* method : {"greedy", "group_limited_greedy", "hash"}) {
    refused(with(r1(), "topk_method", method), "topk_method", '"' + std::string(method) + '"',
            "\"noaux_tc\"");
  }
  for (const char* scores : {"softmax", "sqrtsoftplus"}) {
    refused(with(r1(), "scoring_func", scores), "scoring_func", '"' + std::string(scores) + '"',
            "\"sigmoid\"");
  }
  for (const char* block : {"[64,128]", "[128,64]", "[1,128]", "[256,256]", "[128]", "128"}) {
    Json quant = r1();
    quant["quantization_config"]["weight_block_size"] = Json::parse(block);
    refused(quant, "weight_block_size", block, "[128,128]", ", quantization_config");
  }
  refused(with(r1(), "expert_dtype", "fp4"), "expert_dtype", "\"fp4\"", "\"fp8\"");
  for (const char* type : {"linear", "dynamic", "su", "ntk"}) {
    Json rope = r1();
    rope["rope_scaling"]["type"] = type;
    EXPECT_EQ(
        refusal(rope),
        "error: rope type '" + std::string(type) +
            "' is not implemented\n"
            "  where: config.json, rope_scaling\n"
            "  mend:  Rope types 'default', 'llama3', 'yarn' and 'longrope' can be trained.\n");
  }
}

TEST(ModelSpec, sizes_that_latent_attention_determines_must_agree) {
  const auto refused = [](const char* key, std::int64_t found, const char* needed) {
    EXPECT_EQ(
        refusal(with(r1(), key, found)),
        "error: " + std::string(key) + " is " + std::to_string(found) + ", needed: " + needed +
            "\n  where: config.json\n"
            "  mend:  Latent attention of deepseek_v3 expands keys and values for every head. "
            "Check that config.json is the one published with the weights, or leave the key "
            "out.\n");
  };
  for (const std::int64_t heads : {1, 3, 64, 256}) {
    refused("num_key_value_heads", heads, "128, as num_attention_heads");
  }
  for (const std::int64_t width : {56, 63, 128, 192}) {
    refused("head_dim", width, "64, as qk_rope_head_dim");
  }
  refused("qk_head_dim", 128, "192, the sum of qk_nope_head_dim and qk_rope_head_dim");
  EXPECT_THAT(refusal(with(r1(), "head_dim", "64")), HasSubstr("head_dim"));
  Json config = with(with(r1(), "head_dim", 64), "qk_head_dim", 192);
  for (const Json& heads : {Json(128), Json()}) {  // null: as many as of queries
    config["num_key_value_heads"] = heads;
    EXPECT_EQ(spec_of(config).kv_heads, 128);
    EXPECT_EQ(spec_of(config).head_dim, 192);
  }
  // 56 heads of hidden 7168 would be a width of 128: nothing is guessed from it.
  config =
      without(without(with(r1(), "num_attention_heads", 56), "num_key_value_heads"), "head_dim");
  EXPECT_EQ(spec_of(config).kv_heads, 56);
}

TEST(ModelSpec, later_deepseeks_are_refused_by_what_they_have) {
  // Of DeepSeek V3.2 and V4, each alone in a config that calls itself V3.
  const std::vector<std::pair<const char*, Json>> later = {
      {"index_topk", 2048},
      {"index_head_dim", 128},
      {"index_n_heads", 64},
      {"compress_ratios", Json::array({0, 4, 128})},
      {"compress_rates", {{"compressed_sparse_attention", 4}}},
      {"compress_rope_theta", 160000.0},
      {"compress_rate_csa", 4},
      {"compress_rate_hca", 128},
      {"hc_mult", 4},
      {"hc_sinkhorn_iters", 20},
      {"hc_eps", 1e-6},
      {"num_hash_layers", 3},
      {"mlp_layer_types", Json::array({"hash_moe"})},
      {"swiglu_limit", 10.0},
      {"sliding_window", 128},
      {"o_groups", 8},
      {"o_lora_rank", 1024},
      {"layer_types", Json::array({"compressed_sparse_attention"})}};
  for (const auto& [key, value] : later) {
    EXPECT_EQ(refusal(with(r1(), key, value)),
              "error: " + std::string(key) + " is " + value.dump() +
                  ", which Tailor does not implement: DeepSeek V3.2 and V4 have it\n"
                  "  where: config.json\n"
                  "  mend:  DeepSeek V3 and R1 can be trained, whose configs do not have this key: "
                  "full latent attention, plain residuals, every token routed by its scores.\n");
    EXPECT_EQ(spec_of(with(r1(), key, Json())).layer_count(), 61) << key << ": null is none";
  }
  for (const char* type : {"deepseek_v2", "deepseek_v32", "deepseek_v4"}) {
    EXPECT_THAT(refusal(with(r1(), "model_type", type)),
                HasSubstr("model_type '" + std::string(type) + "' is not supported"));
  }
}

/// deepseek() with longrope of `pairs` factors; qk_rope_head_dim is 8, so that 4 are needed.
Json with_longrope(std::size_t pairs) {
  Json config = deepseek();
  const std::vector<double> factors(pairs, 1.25);
  config["rope_parameters"] = {{"rope_type", "longrope"},
                               {"rope_theta", 10000.0},
                               {"original_max_position_embeddings", 160},
                               {"short_factor", factors},
                               {"long_factor", factors}};
  return config;
}

TEST(ModelSpec, longrope_has_a_factor_for_every_pair) {
  EXPECT_EQ(spec_of(with_longrope(4)).rope.factors, std::vector<double>(4, 1.25));
  EXPECT_EQ(refusal(with_longrope(5)),
            "error: longrope has 5 factors for 4 pairs\n"
            "  where: config.json\n"
            "  mend:  short_factor holds one for every pair of qk_rope_head_dim.\n");
  Json plain = llama();
  plain["rope_parameters"] = with_longrope(3).at("rope_parameters");
  EXPECT_THAT(refusal(plain), HasSubstr("longrope has 3 factors for "));
}

TEST(ModelSpec, qwen2_without_sliding_windows) {
  const Json config = shipped("deepseek-ai--DeepSeek-R1-Distill-Qwen-7B");
  EXPECT_EQ(refusal(with(config, "use_sliding_window", true)),
            "error: use_sliding_window is true, which Tailor does not implement\n"
            "  where: config.json\n"
            "  mend:  Models with use_sliding_window: false can be trained.\n");
  EXPECT_THAT(refusal(with(config, "layer_types", Json::array({"sliding_attention"}))),
              HasSubstr("layer_types holds \"sliding_attention\""));
}

TEST(ModelSpec, sizes_that_are_missing_or_impossible) {
  for (const char* key : {"hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers",
                          "intermediate_size", "intermediate_size_mlp", "num_local_experts"}) {
    EXPECT_THAT(refusal(without(llama4(), key)), HasSubstr(key));
    EXPECT_THAT(refusal(with(llama4(), key, 0)), HasSubstr(std::string(key) + " is 0")) << key;
    EXPECT_THAT(refusal(with(llama4(), key, -3)), HasSubstr(key));
    EXPECT_THAT(refusal(with(llama4(), key, "64")), HasSubstr("must be an integer"));
    EXPECT_THAT(refusal(with(llama4(), key, 1LL << 40)), HasSubstr(key));
  }
  EXPECT_THAT(refusal(with(llama4(), "num_hidden_layers", 20000)), HasSubstr("20000"));
  EXPECT_THAT(refusal(with(llama4(), "num_key_value_heads", 3)), HasSubstr("do not divide over 3"));
  EXPECT_THAT(refusal(with(llama4(), "head_dim", 15)), HasSubstr("width 15"));
  EXPECT_THAT(refusal(with(llama4(), "num_experts_per_tok", 9)),
              HasSubstr("num_experts_per_tok is 9 of 8 experts"));
  EXPECT_THAT(refusal(with(llama4(), "no_rope_layers", Json::array({1}))),
              HasSubstr("no_rope_layers has 1 entries for 4 layers"));
  EXPECT_THAT(refusal(with(llama4(), "layer_types", Json::array({"full_attention"}))),
              HasSubstr("layer_types does not name every layer"));
  EXPECT_THAT(refusal(with(without(llama4(), "moe_layers"), "interleave_moe_layer_step", 0)),
              HasSubstr("layer intervals must be 1 or more"));
  EXPECT_THAT(refusal(without(llama(), "model_type")), HasSubstr("'model_type' is missing"));
  EXPECT_THAT(refusal(Json::array()), HasSubstr("a JSON object is needed"));
  EXPECT_THAT(refusal(without(published_maverick(), "text_config")), HasSubstr("'text_config'"));
}

TEST(ModelSpec, no_config) {
  EXPECT_EQ(error_of([] { read_model_spec("/nowhere"); }),
            "error: config.json is missing\n"
            "  where: /nowhere\n"
            "  mend:  Name the folder of a Hugging Face model: config.json beside its safetensors "
            "files.\n");
}

}  // namespace
}  // namespace tailor
