// PEFT adapter folders: every layout there is, read and written.

#include "adapters/peft_files.h"

#include <gmock/gmock.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

#include "adapters/peft_folder.h"
#include "adapters_support.h"
#include "base/error.h"
#include "base/json.h"
#include "data/checkpoint/safetensors.h"

namespace tailor {
namespace {

using namespace testing_support;
using testing::HasSubstr;

/// A tensor of float32.
struct Matrix {
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};
using Matrices = std::map<std::string, Matrix>;

Matrices load(const fs::path& path) {
  const MappedFile file(path);
  Matrices out;
  for (const auto& [name, info] : parse_safetensors_header(file.bytes(), path).tensors) {
    EXPECT_EQ(info.dtype, Dtype::f32);
    Matrix matrix{info.shape, std::vector<float>(static_cast<std::size_t>(info.elements()))};
    std::memcpy(matrix.values.data(), file.bytes().data() + info.offset,
                static_cast<std::size_t>(info.bytes));
    out[name] = matrix;
  }
  return out;
}
void save(const fs::path& path, const Matrices& matrices) {
  std::vector<TensorToWrite> tensors;
  for (const auto& [name, matrix] : matrices) {
    tensors.push_back({name, Dtype::f32, matrix.shape, std::as_bytes(std::span(matrix.values))});
  }
  write_safetensors(path, tensors);
}

/// scale * B A of every expert, [experts][out * in], by the formula.
std::vector<std::vector<double>> products(const Adapter& adapter, const LoraSite& site) {
  const auto a = adapter.a_of(site), b = adapter.b_of(site);
  std::vector<std::vector<double>> out;
  for (std::int64_t e = 0; e < site.experts; ++e) {
    std::vector<double> delta(static_cast<std::size_t>(site.out * site.in));
    for (std::int64_t r = 0; r < site.rank; ++r) {
      const std::int64_t row = e * site.rank + r;
      for (std::int64_t o = 0; o < site.out; ++o) {
        for (std::int64_t i = 0; i < site.in; ++i) {
          delta[static_cast<std::size_t>(o * site.in + i)] +=
              site.scale * static_cast<double>(b[static_cast<std::size_t>(row * site.out + o)]) *
              static_cast<double>(a[static_cast<std::size_t>(row * site.in + i)]);
        }
      }
    }
    out.push_back(delta);
  }
  return out;
}

class PeftFiles : public FolderTest {
 protected:
  fs::path file() const { return folder_ / "adapter_model.safetensors"; }
  fs::path config() const { return folder_ / "adapter_config.json"; }
  /// The folder holds a copy of a fixture's adapter.
  void take(const std::string& adapter = "llama4_maverick_tiny/lora/adapter_final") {
    for (const char* name : {"adapter_model.safetensors", "adapter_config.json"}) {
      fs::copy_file(golden(adapter) / name, folder_ / name, fs::copy_options::overwrite_existing);
    }
  }
  void change_config(const std::string& key, const Json& value) {
    Json json = read_json(config());
    json[key] = value;
    write_atomically(config(), json.dump());
  }
  void change_tensors(const std::function<void(Matrices&)>& change) {
    Matrices matrices = load(file());
    change(matrices);
    save(file(), matrices);
  }
  Adapter read(const std::string& model = "llama4_maverick_tiny") {
    return read_peft_adapter(folder_, spec_of(model));
  }
  std::string refusal(const std::string& model = "llama4_maverick_tiny") {
    try {
      read(model);
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::bad_file) << to_text(error);
      EXPECT_THAT(error.parts().where, HasSubstr(folder_.string()));
      return to_text(error);
    }
    return "no error";
  }
  /// Every site's products equal those of adapter_final, to the rounding of `unit`.
  void expect_final(const Adapter& got, double unit = 0) {
    const ModelSpec spec = spec_of("llama4_maverick_tiny");
    const Adapter want = read_peft_adapter(golden("llama4_maverick_tiny/lora/adapter_final"), spec);
    ASSERT_EQ(got.sites().size(), want.sites().size());
    for (const LoraSite& site : want.sites()) {
      const LoraSite* own = got.find(site.layer, site.projection);
      ASSERT_NE(own, nullptr) << site.module;
      const auto a = products(want, site), b = products(got, *own);
      ASSERT_EQ(a.size(), b.size());
      for (std::size_t e = 0; e < a.size(); ++e) {
        double difference = 0, size = 0;
        for (std::size_t i = 0; i < a[e].size(); ++i) {
          difference = std::max(difference, std::fabs(a[e][i] - b[e][i]));
          size = std::max(size, std::fabs(a[e][i]));
        }
        EXPECT_GT(size, 0);
        EXPECT_LE(difference, size * (unit + 1e-12)) << site.module << ", expert " << e;
      }
    }
  }
};

constexpr const char* kExperts = "base_model.model.model.layers.1.feed_forward.experts";

TEST_F(PeftFiles, a_plain_pair_is_read_as_peft_means_it) {
  const fs::path source = golden("llama_tiny/lora/adapter_init");
  const Adapter adapter = read_peft_adapter(source, spec_of("llama_tiny"));
  const Matrices matrices = load(source / "adapter_model.safetensors");
  EXPECT_EQ(adapter.sites().size() * 2, matrices.size());
  for (const LoraSite& site : adapter.sites()) {
    const std::string key = "base_model.model." + site.module;
    const Matrix& a = matrices.at(key + ".lora_A.weight");
    const Matrix& b = matrices.at(key + ".lora_B.weight");
    EXPECT_EQ(site.rank, 4);
    EXPECT_DOUBLE_EQ(site.scale, 2);
    EXPECT_TRUE(std::ranges::equal(adapter.a_of(site), a.values));
    for (std::int64_t r = 0; r < site.rank; ++r) {
      for (std::int64_t o = 0; o < site.out; ++o) {
        ASSERT_EQ(adapter.b_of(site)[static_cast<std::size_t>(r * site.out + o)],
                  b.values[static_cast<std::size_t>(o * site.rank + r)]);
      }
    }
  }
}

TEST_F(PeftFiles, an_adapter_s_products_are_what_merging_adds) {
  // adapter_final merged by PEFT minus the base, F32 minus BF16 widened: exact to one rounding of
  // the merged weight.
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  const Adapter adapter =
      read_peft_adapter(golden("llama4_maverick_tiny/lora/adapter_final"), spec);
  Matrices merged;
  for (const auto& entry : fs::directory_iterator(golden("llama4_maverick_tiny/lora/merged"))) {
    if (entry.path().extension() == ".safetensors") merged.merge(load(entry.path()));
  }
  std::map<std::string, std::vector<float>> base;
  for (const auto& entry : fs::directory_iterator(golden("llama4_maverick_tiny/model"))) {
    if (entry.path().extension() != ".safetensors") continue;
    const MappedFile mapped(entry.path());
    for (const auto& [name, info] :
         parse_safetensors_header(mapped.bytes(), entry.path()).tensors) {
      std::vector<float>& values = base[name];
      for (std::int64_t i = 0; i < info.elements(); ++i) {
        std::uint16_t raw = 0;
        std::memcpy(&raw, mapped.bytes().data() + info.offset + 2 * i, 2);
        const std::uint32_t bits = std::uint32_t{raw} << 16U;
        float value = 0;
        std::memcpy(&value, &bits, sizeof value);
        values.push_back(value);
      }
    }
  }
  for (const LoraSite& site : adapter.sites()) {
    std::string name = site.module + ".weight";
    if (site.projection == Projection::experts_gate_up) name = site.module + ".gate_up_proj";
    if (site.projection == Projection::experts_down) name = site.module + ".down_proj";
    const auto deltas = products(adapter, site);
    for (std::int64_t e = 0; e < site.experts; ++e) {
      for (std::int64_t o = 0; o < site.out; ++o) {
        for (std::int64_t i = 0; i < site.in; ++i) {
          // Linear weights are [out, in], experts [E, in, out].
          const auto at = static_cast<std::size_t>(
              site.is_experts() ? (e * site.in + i) * site.out + o : o * site.in + i);
          ASSERT_NEAR(
              merged.at(name).values[at],
              static_cast<double>(base.at(name)[at]) +
                  deltas[static_cast<std::size_t>(e)][static_cast<std::size_t>(o * site.in + i)],
              1e-6)
              << name;
        }
      }
    }
  }
}

TEST_F(PeftFiles, what_is_written_reads_back_and_keeps_its_bytes) {
  for (const auto& [model, adapter] : std::vector<std::pair<std::string, std::string>>{
           {"llama_tiny", "llama_tiny/lora/adapter_final"},
           {"llama4_maverick_tiny", "llama4_maverick_tiny/lora/adapter_init"},
           {"llama4_maverick_tiny", "llama4_router_tiny/lora/adapter_final"}}) {
    const ModelSpec spec = spec_of(model);
    const Adapter source = read_peft_adapter(golden(adapter), spec);
    write_peft_adapter(folder_, source, spec, {"some/model", ""});
    const Adapter again = read_peft_adapter(folder_, spec);
    EXPECT_TRUE(std::ranges::equal(source.factors(), again.factors())) << adapter;
    for (std::size_t i = 0; i < source.sites().size(); ++i) {
      EXPECT_EQ(source.sites()[i].scale, again.sites()[i].scale);
      EXPECT_EQ(source.sites()[i].module, again.sites()[i].module);
    }
    // PEFT's own tensors, name by name.
    const Matrices ours = load(file()), peft = load(golden(adapter) / "adapter_model.safetensors");
    ASSERT_EQ(ours.size(), peft.size());
    for (const auto& [name, matrix] : peft) {
      ASSERT_TRUE(ours.contains(name)) << name;
      EXPECT_EQ(ours.at(name).shape, matrix.shape) << name;
      EXPECT_EQ(ours.at(name).values, matrix.values) << name;
    }
    EXPECT_EQ(read_json(config()).at("base_model_name_or_path"), "some/model");
  }
}

TEST_F(PeftFiles, the_wrapper_s_prefix) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  const Adapter source = read_peft_adapter(golden("llama4_maverick_tiny/lora/adapter_final"), spec);
  write_peft_adapter(folder_, source, spec, {"some/model", "language_model."});
  for (const auto& [name, matrix] : load(file())) {
    EXPECT_TRUE(name.starts_with("base_model.model.language_model.model.layers.")) << name;
  }
  expect_final(read());
}

TEST_F(PeftFiles, ranks_and_alphas_that_differ_become_patterns) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  for (const bool rslora : {false, true}) {
    LoraOptions options;
    options.rank = 4;
    options.alpha = 8;
    options.expert_rank = 2;
    options.expert_alpha = 12.5;
    options.rslora = rslora;
    options.targets = {"attention", "experts"};
    const Adapter source = Adapter::create(spec, options, 3);
    write_peft_adapter(folder_, source, spec, {});
    const Json written = read_json(config());
    EXPECT_EQ(written.at("r"), 4);
    EXPECT_EQ(written.at("lora_alpha"), 8);
    EXPECT_EQ(written.at("use_rslora"), rslora);
    EXPECT_EQ(written.at("rank_pattern").size(), 4U);
    EXPECT_EQ(written.at("rank_pattern").at("model.layers.1.feed_forward.experts.down_proj"), 2);
    EXPECT_EQ(written.at("alpha_pattern").at("model.layers.3.feed_forward.experts.gate_up_proj"),
              12.5);
    EXPECT_EQ(written.at("target_modules"), Json::array({"k_proj", "o_proj", "q_proj", "v_proj"}));
    const Adapter again = read();
    for (std::size_t i = 0; i < source.sites().size(); ++i) {
      EXPECT_EQ(source.sites()[i].rank, again.sites()[i].rank);
      EXPECT_DOUBLE_EQ(source.sites()[i].scale, again.sites()[i].scale);
    }
  }
}

TEST_F(PeftFiles, target_modules_never_name_one_matrix_more) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  LoraOptions options;
  options.targets = {"shared_expert.gate_proj", "layers.0.self_attn.q_proj"};
  write_peft_adapter(folder_, Adapter::create(spec, options, 3), spec, {});
  EXPECT_EQ(read_json(config()).at("target_modules"),
            Json::array({"model.layers.0.self_attn.q_proj",
                         "model.layers.1.feed_forward.shared_expert.gate_proj",
                         "model.layers.3.feed_forward.shared_expert.gate_proj"}));
  EXPECT_EQ(read_json(config()).at("target_parameters"), nullptr);
}

TEST_F(PeftFiles, alpha_patterns_match_as_in_peft) {
  take("llama_tiny/lora/adapter_final");
  change_config("alpha_pattern",
                {{"layers.0.self_attn.q_proj", 20}, {"k_proj", 12}, {"layers\\.1\\..*_proj", 32}});
  const Adapter adapter = read("llama_tiny");
  const auto scale = [&](int layer, Projection projection) {
    return adapter.find(layer, projection)->scale;
  };
  EXPECT_DOUBLE_EQ(scale(0, Projection::q_proj), 5);
  EXPECT_DOUBLE_EQ(scale(0, Projection::k_proj), 3);
  EXPECT_DOUBLE_EQ(scale(1, Projection::k_proj), 3) << "the first pattern that matches";
  EXPECT_DOUBLE_EQ(scale(1, Projection::q_proj), 8);
  EXPECT_DOUBLE_EQ(scale(0, Projection::v_proj), 2);
  change_config("use_rslora", true);
  EXPECT_DOUBLE_EQ(read("llama_tiny").find(0, Projection::v_proj)->scale, 4);
  change_config("alpha_pattern", {{"(", 20}});
  EXPECT_THAT(refusal("llama_tiny"), HasSubstr("alpha_pattern '(' is not a regular expression"));
  change_config("alpha_pattern", {{"q_proj", "20"}});
  EXPECT_THAT(refusal("llama_tiny"), HasSubstr("alpha_pattern['q_proj'] is not a number"));
}

TEST_F(PeftFiles, every_layout_of_experts_gives_the_same_products) {
  take();
  expect_final(read());
  for (const char* layout : {"adapter_vllm_3d", "adapter_vllm_2d"}) {
    SCOPED_TRACE(layout);
    fs::copy_file(golden("llama4_maverick_tiny/lora") / layout / "adapter_model.safetensors",
                  file(), fs::copy_options::overwrite_existing);
    expect_final(read());
  }
}

TEST_F(PeftFiles, one_parameter_of_the_experts_alone) {
  // PEFT wraps the parameters of a module one in another; one alone is never "base_layer".
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  for (const auto& [target, name] : {std::pair("experts.gate_up_proj", "gate_up_proj"),
                                     std::pair("experts.down_proj", "down_proj")}) {
    for (const bool everywhere : {true, false}) {
      SCOPED_TRACE(testing::Message() << target << (everywhere ? ", all layers" : ", layer 1"));
      const std::string module = "model.layers.1.feed_forward.experts";
      LoraOptions options;
      options.targets = {"q_proj", everywhere ? target : module + "." + name};
      const Adapter source = Adapter::create(spec, options, 3);
      write_peft_adapter(folder_, source, spec, {});
      const Matrices matrices = load(file());
      EXPECT_TRUE(matrices.contains(std::string(kExperts) + ".lora_A.weight"));
      EXPECT_FALSE(matrices.contains(std::string(kExperts) + ".base_layer.lora_A.weight"));
      EXPECT_EQ(read_json(config()).at("target_parameters"),
                Json::array({everywhere ? std::string("feed_forward.experts.") + name
                                        : module + "." + name}));
      const Adapter again = read();
      ASSERT_EQ(again.sites().size(), source.sites().size());
      EXPECT_TRUE(std::ranges::equal(again.factors(), source.factors()));
    }
  }
  // Both in layer 1, gate_up alone in layer 3.
  LoraOptions options;
  options.targets = {"model.layers.1.feed_forward.experts.down_proj", "experts.gate_up_proj"};
  const Adapter mixed = Adapter::create(spec, options, 3);
  write_peft_adapter(folder_, mixed, spec, {});
  EXPECT_TRUE(load(file()).contains(std::string(kExperts) + ".base_layer.lora_A.weight"));
  EXPECT_EQ(read().sites().size(), 3U);
  EXPECT_EQ(read_json(config()).at("target_parameters"),
            Json::array({"model.layers.1.feed_forward.experts.down_proj",
                         "feed_forward.experts.gate_up_proj"}));
}

TEST_F(PeftFiles, experts_whose_gate_and_up_have_their_own_a) {
  take();
  fs::copy_file(golden("llama4_maverick_tiny/lora/adapter_vllm_2d/adapter_model.safetensors"),
                file(), fs::copy_options::overwrite_existing);
  // Twice the A and half the B of every up_proj: another factor, the same product.
  change_tensors([](Matrices& matrices) {
    for (auto& [name, matrix] : matrices) {
      if (name.find(".up_proj.") == std::string::npos ||
          name.find(".experts.") == std::string::npos) {
        continue;
      }
      const float factor = name.ends_with("lora_A.weight") ? 2.0F : 0.5F;
      for (float& value : matrix.values) value *= factor;
    }
  });
  const Adapter adapter = read();
  EXPECT_EQ(adapter.find(1, Projection::experts_gate_up)->rank, 8)
      << "both ranks, one after the other";
  EXPECT_EQ(adapter.find(1, Projection::experts_down)->rank, 4);
  expect_final(adapter);
  change_config("use_rslora", true);
  change_config("lora_alpha", 4);  // 4 / sqrt(4) = 8 / 4
  expect_final(read(), 1e-12);
  change_config("alpha_pattern", {{"experts\\.3\\.up_proj", 7}});
  EXPECT_THAT(refusal(), HasSubstr("alpha_pattern gives 'model.layers.1.feed_forward.experts.3."
                                   "up_proj' another alpha than 'model.layers.1.feed_forward."
                                   "experts.0.gate_proj'"));
  change_config("alpha_pattern", {{"up_proj", 4}, {"gate_proj", 4}});
  expect_final(read(), 1e-12);
  change_tensors([](Matrices& matrices) {
    matrices.erase("base_model.model.model.layers.1.feed_forward.experts.3.up_proj.lora_A.weight");
    matrices.erase("base_model.model.model.layers.1.feed_forward.experts.3.up_proj.lora_B.weight");
  });
  EXPECT_THAT(refusal(),
              HasSubstr("factors of 'model.layers.1.feed_forward.experts.3.up_proj' are missing"));
}

TEST_F(PeftFiles, half_precision_factors) {
  take("llama_tiny/lora/adapter_final");
  const Matrices matrices = load(file());
  // Exactly representable numbers, the smallest and the largest of each type among them.
  const std::vector<std::pair<float, std::uint16_t>> f16 = {{1.0F, 0x3C00},      {-2.5F, 0xC100},
                                                            {65504.0F, 0x7BFF},  {0x1p-24F, 0x0001},
                                                            {-0x1p-14F, 0x8400}, {0.0F, 0}};
  const std::vector<std::pair<float, std::uint16_t>> bf16 = {
      {1.0F, 0x3F80}, {-2.5F, 0xC020}, {0x1p127F, 0x7F00}, {-0x1p-126F, 0x8080}, {0.0F, 0}};
  for (const auto& [dtype, numbers] : {std::pair(Dtype::f16, f16), std::pair(Dtype::bf16, bf16)}) {
    std::vector<std::vector<std::uint16_t>> raws;
    std::vector<TensorToWrite> tensors;
    for (const auto& [name, matrix] : matrices) {
      raws.emplace_back();
      for (std::size_t i = 0; i < matrix.values.size(); ++i) {
        raws.back().push_back(numbers[i % numbers.size()].second);
      }
    }
    std::size_t next = 0;
    for (const auto& [name, matrix] : matrices) {
      tensors.push_back({name, dtype, matrix.shape, std::as_bytes(std::span(raws[next++]))});
    }
    write_safetensors(file(), tensors);
    const Adapter adapter = read("llama_tiny");
    const auto a = adapter.a_of(adapter.sites()[0]);
    for (std::size_t i = 0; i < a.size(); ++i) ASSERT_EQ(a[i], numbers[i % numbers.size()].first);
  }
}

TEST_F(PeftFiles, which_side_is_the_input) {
  ModelSpec spec = spec_of("llama4_maverick_tiny");  // D 64, F 48
  const auto layout = [&](std::int64_t gate_up, std::int64_t down, const std::string& version) {
    return detect_expert_layout(spec, gate_up, down, version, "FILE");
  };
  EXPECT_EQ(layout(96, 0, ""), ExpertLayout::swapped);
  EXPECT_EQ(layout(64, 0, ""), ExpertLayout::straight);
  EXPECT_EQ(layout(0, 64, ""), ExpertLayout::swapped);
  EXPECT_EQ(layout(0, 48, ""), ExpertLayout::straight);
  EXPECT_EQ(layout(64, 48, "0.21.2"), ExpertLayout::straight) << "shapes before versions";
  spec.expert_width = 32;  // 2 F = D: gate_up is square, down still tells
  EXPECT_EQ(layout(64, 64, ""), ExpertLayout::swapped);
  EXPECT_EQ(layout(64, 32, ""), ExpertLayout::straight);
  EXPECT_EQ(layout(64, 0, "0.17.0"), ExpertLayout::straight);
  EXPECT_EQ(layout(64, 0, "0.19.0"), ExpertLayout::straight);
  EXPECT_EQ(layout(64, 0, "0.19.1"), ExpertLayout::swapped);
  EXPECT_EQ(layout(64, 0, "0.20.0.dev0"), ExpertLayout::swapped);
  EXPECT_EQ(layout(64, 0, "1.0"), ExpertLayout::swapped);
  // transformers holds the other families' experts outputs first: the versions' sides change.
  const Family llama4 = std::exchange(spec.family, Family::deepseek_v3);
  EXPECT_EQ(layout(64, 0, "0.18.1"), ExpertLayout::swapped);
  EXPECT_EQ(layout(64, 0, "0.19.0"), ExpertLayout::swapped);
  EXPECT_EQ(layout(64, 0, "0.19.1"), ExpertLayout::straight);
  EXPECT_THROW(layout(64, 0, ""), Error);
  spec.family = llama4;
  for (const char* version : {"", "unknown", "@"}) {
    try {
      layout(64, 0, version);
      ADD_FAILURE() << version;
    } catch (const Error& error) {
      EXPECT_EQ(to_text(error),
                "error: which side of the experts' factors is the input cannot be told\n"
                "  where: FILE\n"
                "  mend:  PEFT changed this between versions. Add the version that wrote the file "
                "to adapter_config.json as \"peft_version\".\n");
    }
  }
}

TEST_F(PeftFiles, options_that_change_the_maths_are_refused_by_name) {
  const std::vector<std::pair<const char*, Json>> options = {{"alora_invocation_tokens", {7}},
                                                             {"kasa_config", {{"beta", 1}}},
                                                             {"arrow_config", {{"top_k", 3}}},
                                                             {"use_dora", true},
                                                             {"lora_bias", true},
                                                             {"use_qalora", true},
                                                             {"use_bdlora", true},
                                                             {"bias", "all"},
                                                             {"bias", "lora_only"},
                                                             {"modules_to_save", {"lm_head"}},
                                                             {"trainable_token_indices", {1, 2}},
                                                             {"layer_replication", {{0, 2}}},
                                                             {"peft_type", "LOHA"}};
  for (const auto& [option, value] : options) {
    take();
    change_config(option, value);
    EXPECT_THAT(refusal(), HasSubstr("error: " + std::string(option) + " is")) << option;
  }
  take();
  change_config("use_dora", true);
  EXPECT_EQ(refusal(),
            "error: use_dora is true, which Tailor does not implement\n"
            "  where: " +
                config().string() +
                "\n"
                "  mend:  Only plain LoRA factors are read.\n");
  // Starts that change the base: the factors alone are another function.
  for (const char* start : {"pissa", "pissa_niter_4", "olora", "corda", "loftq"}) {
    take();
    change_config("init_lora_weights", start);
    EXPECT_THAT(refusal(), HasSubstr("init_lora_weights is '" + std::string(start) +
                                     "': the factors belong to a changed base"));
  }
  for (const Json& start : {Json("gaussian"), Json("eva"), Json(true), Json(false), Json()}) {
    take();
    change_config("init_lora_weights", start);
    expect_final(read());
  }
  // An option of a PEFT to come.
  take();
  change_config("use_marvel", true);
  EXPECT_THAT(refusal(), HasSubstr("option 'use_marvel' is true, which Tailor does not know"));
  change_config("use_marvel", false);
  expect_final(read());
  // Empty or null, they change nothing.
  take();
  change_config("modules_to_save", Json::array());
  change_config("layer_replication", nullptr);
  expect_final(read());
}

TEST_F(PeftFiles, tensors_that_are_no_plain_factors) {
  const std::string q = "base_model.model.model.layers.0.self_attn.q_proj";
  const auto with = [&](const std::function<void(Matrices&)>& change) {
    take();
    change_tensors(change);
    return refusal();
  };
  EXPECT_THAT(with([&](Matrices& m) { m.erase(q + ".lora_B.weight"); }),
              HasSubstr("factor lora_B of 'model.layers.0.self_attn.q_proj' is missing"));
  EXPECT_THAT(with([&](Matrices& m) { m.erase(q + ".lora_A.weight"); }),
              HasSubstr("factor lora_A of 'model.layers.0.self_attn.q_proj' is missing"));
  EXPECT_THAT(with([&](Matrices& m) {
                m["base_model.model.lm_head.lora_A.weight"] = {{1, 1}, {1.0F}};
                m["base_model.model.lm_head.lora_B.weight"] = {{1, 1}, {1.0F}};
              }),
              HasSubstr("factors of 'lm_head' belong to no matrix of this model"));
  EXPECT_THAT(with([&](Matrices& m) {
                m[q + ".lora_magnitude_vector"] = {{1}, {1.0F}};
              }),
              HasSubstr("q_proj.lora_magnitude_vector' is no LoRA factor"));
  EXPECT_THAT(with([&](Matrices& m) {
                m[q + ".lora_A.weight"] = {{4, 1, 64}, std::vector<float>(256)};
              }),
              HasSubstr("factor has shape [4, 1, 64] and type F32"));
  EXPECT_THAT(with([&](Matrices& m) {
                m[q + ".lora_A.weight"] = {{4, 63}, std::vector<float>(252)};
              }),
              HasSubstr("factor has shape [4, 63], the model asks for [4, 64]"));
  EXPECT_THAT(with([&](Matrices& m) {
                m[q + ".lora_A.weight"] = {{5, 64}, std::vector<float>(320)};
              }),
              HasSubstr("factor has shape [64, 4], the model asks for [64, 5]"));
  EXPECT_THAT(with([&](Matrices& m) {
                m[q + ".lora_A.weight"] = {{0, 64}, {}};
                m[q + ".lora_B.weight"] = {{64, 0}, {}};
              }),
              HasSubstr("factor has shape [0, 64], which holds nothing"));
  EXPECT_THAT(
      with([&](Matrices& m) {
        m[std::string(kExperts) + ".lora_A.weight"] = {{31, 64}, std::vector<float>(31 * 64)};
      }),
      HasSubstr("factor A has 31 rows, which 8 experts do not divide"));
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    EXPECT_THAT(with([&](Matrices& m) { m.at(q + ".lora_B.weight").values[17] = bad; }),
                HasSubstr("factors hold NaN or infinite values"));
  }
  EXPECT_THAT(with([](Matrices& m) { m.clear(); }), HasSubstr("the adapter holds no factors"));
  take();
  EXPECT_THAT(refusal("llama_tiny"), HasSubstr("error: "));
}

TEST_F(PeftFiles, ranks_must_be_the_config_s_which_decide_the_scale) {
  take();
  change_config("r", 8);
  EXPECT_THAT(refusal(), HasSubstr("factors of 'model.layers.0.self_attn.q_proj' have rank 4, "
                                   "adapter_config.json says 8"));
  change_config("rank_pattern", {{".*proj", 4}});
  expect_final(read());
  change_config("rank_pattern", {{"proj", 4}});
  EXPECT_THAT(refusal(), HasSubstr("adapter_config.json says 8")) << "whole parts of names only";
  change_config("rank_pattern", {{"q_proj", "4"}});
  EXPECT_THAT(refusal(), HasSubstr("rank_pattern['q_proj'] is not a number"));
  change_config("rank_pattern", Json::array({4}));
  EXPECT_THAT(refusal(), HasSubstr("rank_pattern is no object"));
  change_config("r", 4);
  change_config("rank_pattern", {{"experts.down_proj", 2}});
  EXPECT_THAT(refusal(),
              HasSubstr("factors of 'model.layers.1.feed_forward.experts.down_proj' have rank 4, "
                        "adapter_config.json says 2"));
  fs::copy_file(golden("llama4_maverick_tiny/lora/adapter_vllm_2d/adapter_model.safetensors"),
                file(), fs::copy_options::overwrite_existing);
  change_config("rank_pattern", {{"experts.3.up_proj", 2}});
  EXPECT_THAT(refusal(), HasSubstr("experts.3.up_proj' have rank 4, adapter_config.json says 2"));
}

TEST_F(PeftFiles, record_the_base_s_fingerprint) {
  const ModelSpec spec = spec_of("llama_tiny");
  const Adapter source = read_peft_adapter(golden("llama_tiny/lora/adapter_final"), spec);
  write_peft_adapter(folder_, source, spec, {"some/model", "", "0123abc"});
  EXPECT_EQ(PeftFolder(folder_).base_fingerprint(), "0123abc");
  write_peft_adapter(folder_, source, spec, {"some/model", ""});
  EXPECT_EQ(PeftFolder(folder_).base_fingerprint(), "");
}

TEST_F(PeftFiles, one_tensor_under_two_names) {
  take("llama_tiny/lora/adapter_final");
  change_tensors([](Matrices& matrices) {
    const std::string name = "model.layers.0.self_attn.q_proj.lora_A.weight";
    matrices[name] = matrices.at("base_model.model." + name);
  });
  EXPECT_THAT(refusal("llama_tiny"), HasSubstr("is there twice, with and without a prefix"));
}

TEST_F(PeftFiles, files_that_are_missing_or_cut_off) {
  EXPECT_THAT(refusal(), HasSubstr("adapter_config.json is missing"));
  take();
  fs::resize_file(file(), fs::file_size(file()) - 1);
  EXPECT_THAT(refusal(), HasSubstr("tensor data should end at byte"));
  fs::resize_file(file(), 100);
  EXPECT_THAT(refusal(), HasSubstr("file is cut off"));
  fs::remove(file());
  EXPECT_THAT(refusal(), HasSubstr("An adapter_model.bin is a pickle file, which can run code"));
  write_atomically(config(), "{\"r\": 4,");
  EXPECT_THAT(refusal(), HasSubstr("not valid JSON"));
  write_atomically(config(), "{\"peft_type\": \"LORA\"}");
  EXPECT_THAT(refusal(), HasSubstr("key 'r' is missing"));
}

/// PEFT takes deepseek_v3's gate_proj, up_proj and down_proj as modules to mean its routed experts:
/// the MLPs and the router are named as parameters, and their alphas come back.
TEST_F(PeftFiles, deepseeks_mlps_and_router_are_parameters_and_return_with_their_alphas) {
  const ModelSpec spec = spec_of("deepseek_v3_tiny");
  LoraOptions options;
  options.rank = 3;
  options.alpha = 7;
  options.expert_rank = 2;
  options.expert_alpha = 5;
  options.targets = {"experts", "router", "layers.1.mlp.shared_experts.up_proj", "q_a_proj"};
  Adapter adapter = Adapter::create(spec, options, 1);
  for (std::size_t i = 0; i < adapter.factors().size(); ++i) {
    adapter.factors()[i] = static_cast<float>(i % 101) / 64.0F - 0.7F;
  }
  const fs::path folder = folder_ / "deepseek";
  write_peft_adapter(folder, adapter, spec, {"base", ""});
  const Json config = read_json(folder / "adapter_config.json");
  EXPECT_EQ(config.at("target_modules"), Json::array({"q_a_proj"}));
  EXPECT_EQ(config.at("target_parameters"),
            Json::array({"mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight",
                         "model.layers.1.mlp.shared_experts.up_proj.weight"}));
  const Adapter back = read_peft_adapter(folder, spec);
  ASSERT_EQ(back.sites().size(), adapter.sites().size());
  for (std::size_t i = 0; i < adapter.sites().size(); ++i) {
    EXPECT_EQ(back.sites()[i].module, adapter.sites()[i].module);
    EXPECT_EQ(back.sites()[i].alpha, adapter.sites()[i].alpha) << adapter.sites()[i].module;
    EXPECT_EQ(back.sites()[i].rank, adapter.sites()[i].rank) << adapter.sites()[i].module;
  }
  EXPECT_TRUE(std::equal(back.factors().begin(), back.factors().end(), adapter.factors().begin()));
}

/// kv_b_proj carries factors only when it is named.
TEST(DeepseekTargets, attention_leaves_kv_b_proj_out) {
  const ModelSpec spec = spec_of("deepseek_v3_tiny");
  LoraOptions options;
  const auto count = [&](std::vector<std::string> targets) {
    options.targets = std::move(targets);
    const auto sites = choose_sites(spec, options);
    return std::count_if(sites.begin(), sites.end(), [](const LoraSite& site) {
      return site.projection == Projection::kv_b_proj;
    });
  };
  EXPECT_EQ(count({"attention"}), 0);
  EXPECT_EQ(count({"all"}), 0);
  EXPECT_EQ(count({"attention", "kv_b_proj"}), spec.layer_count());
}

}  // namespace
}  // namespace tailor
