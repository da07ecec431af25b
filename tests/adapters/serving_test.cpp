// Exports for servers: what they accept, with the products of the adapter they came from.

#include "adapters/serving.h"

#include <gmock/gmock.h>

#include <cmath>
#include <cstring>

#include "adapters/inspect.h"
#include "adapters_support.h"
#include "base/error.h"
#include "base/json.h"
#include "data/checkpoint/safetensors.h"

namespace tailor {
namespace {

using namespace testing_support;
using testing::ElementsAre;
using testing::HasSubstr;

struct Matrix {
  Dtype dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;
};
std::map<std::string, Matrix> load(const fs::path& folder) {
  const fs::path path = folder / "adapter_model.safetensors";
  const MappedFile file(path);
  std::map<std::string, Matrix> out;
  for (const auto& [name, info] : parse_safetensors_header(file.bytes(), path).tensors) {
    const auto bytes = file.bytes().subspan(static_cast<std::size_t>(info.offset),
                                            static_cast<std::size_t>(info.bytes));
    out[name] = {info.dtype, info.shape, {bytes.begin(), bytes.end()}};
  }
  return out;
}

class Serving : public FolderTest {
 protected:
  /// An adapter of `options` whose factors are all different numbers, written to "given".
  fs::path make(const ModelSpec& spec, const LoraOptions& options) {
    Adapter adapter = Adapter::create(spec, options, 3);
    std::span<float> x = adapter.factors();
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = std::sin(static_cast<float>(i) * 0.7F) / 3 + 0.01F;
    write_peft_adapter(folder_ / "given", adapter, spec, {"some/base", "", "fingerprint"});
    return folder_ / "given";
  }
  ServingReport run(const fs::path& adapter, const ModelSpec& spec, const std::string& target,
                    ServingOptions options = {}) {
    options.target = serving_target_from_text(target);
    fs::remove_all(to());
    return export_adapter(PeftReader(adapter, spec), spec, options, to());
  }
  fs::path to() const { return folder_ / "out"; }
  Json config() const { return read_json(to() / "adapter_config.json"); }

  /// How far the exported products are from those given, relative to their norm, the worst matrix.
  double worst(const fs::path& adapter, const ModelSpec& spec) const {
    const PeftReader given(adapter, spec), made(to(), spec);
    const AdapterDifference difference =
        compare(matrices_of_model(made), matrices_of_model(given), "out");
    EXPECT_TRUE(difference.only_here.empty() && difference.only_there.empty());
    double out = 0;
    for (const auto& matrix : difference.matrices) out = std::max(out, matrix.relative);
    return out;
  }
  std::string refusal(const fs::path& adapter, const ModelSpec& spec, const std::string& target) {
    try {
      run(adapter, spec, target);
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::bad_file);
      EXPECT_FALSE(fs::exists(to()));
      EXPECT_TRUE(fs::is_empty(folder_) || fs::exists(folder_ / "given"));
      return to_text(error);
    }
    return "no error";
  }
};

LoraOptions options_for(std::vector<std::string> targets) {
  LoraOptions options;
  options.rank = 4;
  options.alpha = 8;
  options.expert_rank = 4;
  options.expert_alpha = 8;
  options.targets = std::move(targets);
  return options;
}

TEST_F(Serving, traps_are_refused_by_name) {
  const ModelSpec maverick = spec_of("llama4_maverick_tiny"), r1 = spec_of("deepseek_v3_tiny");
  const fs::path experts = make(maverick, options_for({"attention", "experts"}));
  EXPECT_EQ(refusal(experts, maverick, "vllm"),
            "error: vLLM applies LoRA of Llama 4's routed experts wrongly: its router scales an "
            "expert's input, and there the factors do not see that\n"
            "  where: " +
                (experts / "adapter_model.safetensors").string() +
                ", model.layers.1.feed_forward.experts\n"
                "  mend:  Merge it into the base and serve that: tailor merge. Factors on "
                "attention and the shared expert alone can be served as an adapter.\n");
  EXPECT_THAT(refusal(experts, maverick, "sglang"),
              HasSubstr("SGLang applies LoRA of Llama 4's routed experts wrongly"));
  EXPECT_THAT(refusal(experts, maverick, "peft@0.16.0"),
              HasSubstr("PEFT 0.16.0 has no LoRA on experts held as one parameter"));
  EXPECT_THAT(
      refusal(make(maverick, options_for({"k_proj"})), maverick, "sglang"),
      HasSubstr("SGLang reorders the rows of Llama 4's q_proj and k_proj as it loads them"));
  EXPECT_EQ(refusal(make(maverick, options_for({"v_proj", "o_proj"})), maverick, "sglang"),
            "no error");
  const fs::path router = make(maverick, options_for({"attention", "router"}));
  EXPECT_THAT(refusal(router, maverick, "sglang"), HasSubstr("SGLang has no LoRA on routers"));
  EXPECT_THAT(refusal(router, maverick, "peft"), HasSubstr("PEFT has no LoRA on Llama 4's router"));
  EXPECT_EQ(refusal(router, maverick, "vllm"), "no error");
  const fs::path folded = make(r1, options_for({"attention", "kv_b_proj"}));
  EXPECT_THAT(refusal(folded, r1, "vllm"),
              HasSubstr("vLLM folds kv_b_proj into attention and ignores factors on it"));
  EXPECT_EQ(refusal(folded, r1, "sglang"), "no error");
  EXPECT_EQ(refusal(folded, r1, "peft"), "no error");
  LoraOptions wide = options_for({"q_proj"});
  wide.rank = 513;
  EXPECT_THAT(refusal(make(maverick, wide), maverick, "vllm"),
              HasSubstr("rank 513 is above the 512 that vLLM takes"));
}

TEST_F(Serving, experts_of_r1_come_one_by_one_as_the_fixture_has_them) {
  const ModelSpec spec = spec_of("deepseek_v3_tiny");
  const fs::path given = golden("deepseek_v3_tiny/lora/adapter_final");
  for (const char* server : {"vllm", "sglang"}) {
    if (refusal(given, spec, server) != "no error") {
      // The fixture trains kv_b_proj too, which vLLM must not be given.
      EXPECT_STREQ(server, "vllm");
      continue;
    }
    const auto made = load(to()), want = load(golden("deepseek_v3_tiny/lora/adapter_vllm_2d"));
    std::size_t compared = 0;
    for (const auto& [name, matrix] : want) {
      ASSERT_TRUE(made.contains(name)) << name;
      EXPECT_EQ(made.at(name).shape, matrix.shape) << name;
      EXPECT_TRUE(made.at(name).bytes == matrix.bytes) << name;
      ++compared;
    }
    EXPECT_GT(compared, 8U * 6U);
  }
}

TEST_F(Serving, one_rank_one_scale_every_expert_and_the_same_products) {
  const ModelSpec spec = spec_of("deepseek_v3_tiny");
  LoraOptions options = options_for({"attention", "experts", "shared_expert"});
  options.expert_rank = 2;
  options.expert_alpha = 5;  // 2.5, beside 2
  options.chosen_experts = {{1, {0, 5}}};
  for (const bool rslora : {false, true}) {
    options.rslora = rslora;
    const fs::path given = make(spec, options);
    for (const char* server : {"vllm", "sglang"}) {
      SCOPED_TRACE(testing::Message() << server << (rslora ? ", rslora" : ""));
      const ServingReport report = run(given, spec, server);
      EXPECT_EQ(report.rank, 4);
      EXPECT_EQ(report.layout, "one_by_one");
      const Json json = config();
      EXPECT_EQ(json.at("r"), 4);
      EXPECT_TRUE(json.at("lora_alpha").is_number_integer());
      EXPECT_EQ(json.at("use_rslora"), false);
      EXPECT_TRUE(json.at("rank_pattern").empty());
      EXPECT_TRUE(json.at("alpha_pattern").empty());
      EXPECT_TRUE(json.at("target_modules").is_array());
      EXPECT_EQ(json.at("target_parameters"), nullptr);
      EXPECT_EQ(json.at("base_model_name_or_path"), "some/base");
      EXPECT_EQ(PeftFolder(to()).base_fingerprint(), "fingerprint");
      for (const auto& [name, matrix] : load(to())) {
        const bool a = name.ends_with(".lora_A.weight");
        EXPECT_EQ(matrix.shape[a ? 0 : 1], 4) << name;
      }
      EXPECT_LT(worst(given, spec), 1e-6);
      EXPECT_THAT(report.notes.front(), HasSubstr("had another rank than 4"));
      EXPECT_EQ(std::any_of(report.notes.begin(), report.notes.end(),
                            [](const auto& note) { return note.starts_with("rsLoRA"); }),
                rslora);
    }
  }
  const auto made = load(to());
  const auto zero = [&](const std::string& name) {
    const Matrix& matrix =
        made.at("base_model.model.model.layers.1.mlp.experts." + name + ".lora_B.weight");
    return std::all_of(matrix.bytes.begin(), matrix.bytes.end(),
                       [](std::byte x) { return x == std::byte{0}; });
  };
  EXPECT_TRUE(zero("3.gate_proj") && zero("3.down_proj"));
  EXPECT_FALSE(zero("5.gate_proj") || zero("5.down_proj"));
}

TEST_F(Serving, all_three_projections_of_an_expert_are_there) {
  const ModelSpec spec = spec_of("deepseek_v3_tiny");
  for (const char* target : {"experts.down_proj", "experts.gate_up_proj"}) {
    run(make(spec, options_for({target})), spec, "vllm");
    const auto made = load(to());
    for (const char* name : {"0.gate_proj", "7.up_proj", "7.down_proj"}) {
      EXPECT_TRUE(made.contains(std::string("base_model.model.model.layers.1.mlp.experts.") + name +
                                ".lora_A.weight"))
          << target << ", " << name;
    }
  }
}

TEST_F(Serving, sglang_gets_what_it_holds_as_one_whole) {
  const ModelSpec spec = spec_of("llama_tiny");
  const fs::path given = make(spec, options_for({"layers.0.self_attn.k_proj", "up_proj"}));
  run(given, spec, "sglang");
  EXPECT_EQ(config().at("target_modules"),
            Json::array({"gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"}));
  EXPECT_TRUE(
      load(to()).contains("base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"));
  EXPECT_FALSE(
      load(to()).contains("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"));
  run(given, spec, "vllm");
  EXPECT_EQ(config().at("target_modules"), Json::array({"k_proj", "up_proj"}));
}

TEST_F(Serving, gate_and_up_with_an_a_each_keep_their_rank) {
  // Read as one matrix of twice the rank; written as what they were.
  const ModelSpec spec = spec_of("deepseek_v3_tiny");
  const fs::path given = make(spec, options_for({"experts"}));
  run(given, spec, "vllm");
  const fs::path apart = folder_ / "apart";
  fs::rename(to(), apart);
  auto matrices = load(apart);
  std::vector<TensorToWrite> tensors;
  for (auto& [name, matrix] : matrices) {
    if (name.find(".up_proj.lora_A") != std::string::npos) {
      for (std::size_t i = 0; i + 4 <= matrix.bytes.size(); i += 4) {
        float value = 0;
        std::memcpy(&value, matrix.bytes.data() + i, 4);
        value *= 2;
        std::memcpy(matrix.bytes.data() + i, &value, 4);
      }
    }
    tensors.push_back({name, matrix.dtype, matrix.shape, matrix.bytes});
  }
  write_safetensors(apart / "adapter_model.safetensors", tensors);
  EXPECT_EQ(PeftReader(apart, spec).sites().front().rank, 8);
  EXPECT_EQ(run(apart, spec, "vllm").rank, 4);
  const auto again = load(to());
  ASSERT_EQ(again.size(), matrices.size());
  for (const auto& [name, matrix] : matrices)
    EXPECT_TRUE(again.at(name).bytes == matrix.bytes) << name;
}

TEST_F(Serving, layouts_of_peft_s_versions) {
  for (const auto& [model, old_layout] :
       {std::pair("llama4_maverick_tiny", "straight"), std::pair("deepseek_v3_tiny", "swapped")}) {
    const ModelSpec spec = spec_of(model);
    LoraOptions options = options_for({"attention", "experts"});
    options.expert_rank = 2;
    options.expert_alpha = 5;
    const fs::path given = make(spec, options);
    for (const char* version : {"0.17.0", "0.18.1", "0.19.0", "0.19.1", "0.20.0", "0.21.2"}) {
      SCOPED_TRACE(testing::Message() << model << ", PEFT " << version);
      const ServingReport report = run(given, spec, std::string("peft@") + version);
      const bool before = std::string(version) < "0.19.1";
      EXPECT_EQ(report.layout == old_layout, before) << report.layout;
      EXPECT_EQ(config().at("peft_version"), version);
      EXPECT_EQ(config().at("rank_pattern").size(),
                2U * static_cast<std::size_t>(spec.moe_layer_count()));
      EXPECT_EQ(worst(given, spec), 0);
    }
    EXPECT_EQ(run(given, spec, "peft").layout == old_layout, false);
    const auto made = load(to()), same = load(given);
    ASSERT_EQ(made.size(), same.size());
    for (const auto& [name, matrix] : same)
      EXPECT_TRUE(made.at(name).bytes == matrix.bytes) << name;
    ServingOptions uniform;
    uniform.uniform = true;
    EXPECT_EQ(run(given, spec, "peft", uniform).rank, 4);
    EXPECT_TRUE(config().at("rank_pattern").empty() && config().at("alpha_pattern").empty());
    EXPECT_LT(worst(given, spec), 1e-6);
  }
}

TEST_F(Serving, bf16_halves_the_file_and_rounds_to_nearest) {
  const ModelSpec spec = spec_of("qwen2_tiny");
  const fs::path given = golden("qwen2_tiny/lora/adapter_final");
  const ServingReport whole = run(given, spec, "vllm");
  EXPECT_LT(worst(given, spec), 1e-6);
  ServingOptions options;
  options.dtype = Dtype::bf16;
  EXPECT_EQ(2 * run(given, spec, "vllm", options).bytes, whole.bytes);
  EXPECT_GT(worst(given, spec), 1e-4);
  EXPECT_LT(worst(given, spec), 1e-2) << "two factors, each to one part in 512";
  for (const auto& [name, matrix] : load(to())) EXPECT_EQ(matrix.dtype, Dtype::bf16);
}

TEST_F(Serving, rows_of_llama_4s_q_and_k_are_where_vllm_has_the_bases) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  const fs::path given = make(spec, options_for({"attention"}));
  const ServingReport report = run(given, spec, "vllm");
  EXPECT_THAT(report.notes, testing::Contains(HasSubstr("this folder is for vLLM alone")));
  const auto before = load(given), after = load(to());
  ASSERT_EQ(before.size(), after.size());
  std::size_t turned = 0;
  for (const auto& [name, matrix] : before) {
    const bool moves =
        name.ends_with("lora_B.weight") &&
        (name.find("q_proj") != std::string::npos || name.find("k_proj") != std::string::npos);
    if (!moves) {
      EXPECT_TRUE(after.at(name).bytes == matrix.bytes) << name;
      continue;
    }
    ++turned;
    // vLLM: view(heads, head_dim / 2, 2, rank).transpose(1, 2)
    const auto row_bytes = matrix.bytes.size() / static_cast<std::size_t>(matrix.shape[0]);
    const auto heads = static_cast<std::size_t>(matrix.shape[0] / spec.head_dim),
               half = static_cast<std::size_t>(spec.head_dim / 2);
    ASSERT_GE(half, 2U) << "a head of two rows would not move";
    std::size_t row = 0;
    for (std::size_t head = 0; head < heads; ++head) {
      for (std::size_t second = 0; second < 2; ++second) {
        for (std::size_t pair = 0; pair < half; ++pair, ++row) {
          const std::size_t from = head * 2 * half + 2 * pair + second;
          EXPECT_EQ(std::memcmp(after.at(name).bytes.data() + row * row_bytes,
                                matrix.bytes.data() + from * row_bytes, row_bytes),
                    0)
              << name << " " << row;
        }
      }
    }
  }
  EXPECT_EQ(turned, 2U * 4U) << "q and k of every layer";
  // It is no adapter any more that others could read.
  try {
    const PeftReader read(to(), spec);
    ADD_FAILURE() << "was read";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::bad_file);
    EXPECT_THAT(to_text(error), HasSubstr("in vLLM's order: this was exported for vLLM alone"));
  }
  run(given, spec, "peft");
  EXPECT_EQ(worst(given, spec), 0);
  EXPECT_FALSE(config().contains("tailor_qk_rows"));
  // Other matrices stay where they are, and anybody may read them.
  const fs::path others = make(spec, options_for({"v_proj", "o_proj"}));
  EXPECT_THAT(run(others, spec, "vllm").notes,
              testing::Not(testing::Contains(HasSubstr("vLLM alone"))));
  EXPECT_LT(worst(others, spec), 1e-7);
}

TEST_F(Serving, the_wrapper_s_prefix_and_the_folder) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  const fs::path given = make(spec, options_for({"v_proj", "o_proj"}));
  ServingOptions options;
  options.module_prefix = "language_model.";
  // What a killed export left goes.
  make_folders(folder_ / ".out.tailor-export");
  write_atomically(folder_ / ".out.tailor-export/adapter_model.safetensors.staging.1.1", "half");
  run(given, spec, "vllm", options);
  EXPECT_FALSE(fs::exists(to() / "adapter_model.safetensors.staging.1.1"));
  for (const auto& [name, matrix] : load(to()))
    EXPECT_TRUE(name.starts_with("base_model.model.language_model.model.layers.")) << name;
  EXPECT_LT(worst(given, spec), 1e-7);
  std::vector<std::string> files;
  for (const auto& entry : fs::directory_iterator(folder_))
    files.push_back(entry.path().filename());
  std::sort(files.begin(), files.end());
  EXPECT_THAT(files, ElementsAre("given", "out")) << "no staging is left";
  for (const fs::path& taken : {to(), given, folder_}) {
    try {
      export_adapter(PeftReader(given, spec), spec, options, taken);
      ADD_FAILURE() << taken;
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::usage);
      EXPECT_THAT(to_text(error), HasSubstr("the folder is there already"));
    }
  }
  EXPECT_EQ(PeftReader(given, spec).sites().size(), 8U);
}

TEST(ServingTargets, are_read_strictly) {
  EXPECT_EQ(serving_target_from_text("peft").version, kPeftVersion);
  EXPECT_EQ(serving_target_from_text("peft@0.18.1").version, "0.18.1");
  const auto refusal = [](const char* text) -> std::string {
    try {
      serving_target_from_text(text);
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::usage);
      return to_text(error);
    }
    return "no error";
  };
  EXPECT_THAT(refusal("vlm"), HasSubstr("Did you mean vllm?"));
  EXPECT_THAT(refusal(""), HasSubstr("'' is no value of --for"));
  EXPECT_THAT(refusal("vllm@0.33"), HasSubstr("--for vllm takes no version"));
  EXPECT_THAT(refusal("peft@"), HasSubstr("'' is no version of PEFT"));
  EXPECT_THAT(refusal("peft@new"), HasSubstr("'new' is no version of PEFT"));
}

}  // namespace
}  // namespace tailor
