// What becomes of each stored format, and that packing it again gives the same numbers.

#include "data/store/export_towers.h"
#include "tests/data/store_export/export_fixture.h"

namespace tailor {
namespace {

using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;
using namespace testing_support;

using Layouts = ExportTest;

constexpr const char* kExperts = "model.layers.1.feed_forward.experts.";

TEST_F(Layouts, int4_experts_are_pack_quantized_one_by_one_with_the_stores_bytes) {
  pack(golden("llama4_maverick_tiny"), int4_of());
  const ExportReport report = export_to(out());
  EXPECT_EQ(report.format, "pack-quantized");
  const Checkpoint exported = Checkpoint::open(out());
  EXPECT_EQ(static_cast<std::size_t>(report.tensors), exported.tensors().size());
  EXPECT_FALSE(exported.has(std::string(kExperts) + "gate_up_proj"));
  EXPECT_EQ(form_of(exported, std::string(kExperts) + "5.up_proj.weight_packed"), "I32 [48, 8]");
  EXPECT_EQ(form_of(exported, std::string(kExperts) + "5.up_proj.weight_scale"), "BF16 [48, 1]");
  EXPECT_EQ(form_of(exported, std::string(kExperts) + "5.up_proj.weight_shape"), "I64 [2]");
  EXPECT_EQ(form_of(exported, std::string(kExperts) + "5.up_proj.weight"), "none");
  EXPECT_EQ(form_of(exported, "model.layers.1.feed_forward.router.weight"), "BF16 [8, 64]");
  EXPECT_EQ(form_of(exported, "model.layers.1.input_layernorm.weight"), "BF16 [64]");
  std::int64_t shape[2] = {};
  const std::string stored_shape =
      bytes_of(exported, std::string(kExperts) + "5.down_proj.weight_shape");
  ASSERT_EQ(stored_shape.size(), sizeof shape);
  std::memcpy(shape, stored_shape.data(), sizeof shape);
  EXPECT_THAT(shape, ElementsAre(64, 48));

  const Store from = Store::open(store());
  std::int64_t compared = 0;
  for (const StoredUnit& unit : from.layout().units) {
    if (unit.id.kind != UnitKind::expert) continue;
    const auto bytes = unit_bytes(from, unit);
    const auto published = unit_matrices(from.spec(), unit.id, false);
    for (std::size_t i = 0; i < published.size(); ++i) {
      const MatrixPlace& place = unit.matrices[i];
      const std::string weight = published[i].name;
      const auto part = [&](std::int64_t offset, std::int64_t count) {
        return std::string(reinterpret_cast<const char*>(bytes.data()) + offset,
                           static_cast<std::size_t>(count));
      };
      EXPECT_EQ(bytes_of(exported, weight + "_packed"), part(place.codes_offset, place.codes_bytes))
          << weight;
      EXPECT_EQ(bytes_of(exported, weight + "_scale"),
                part(place.scales_offset, place.scales_bytes))
          << weight;
      ++compared;
    }
  }
  EXPECT_EQ(compared, 2 * 8 * 3);
  expect_round_trip();
}

TEST_F(Layouts, int4_everywhere_leaves_q_k_and_v_of_llama4_in_bfloat16_with_the_same_values) {
  pack(golden("llama4_maverick_tiny"), int4_of(), int4_of());
  const ExportReport report = export_to(out());
  EXPECT_THAT(report.notes, Contains(HasSubstr("k, q, v")));
  const Checkpoint exported = Checkpoint::open(out());
  for (const char* name : {"q_proj", "k_proj", "v_proj"}) {
    const std::string module = "model.layers.2.self_attn." + std::string(name);
    EXPECT_THAT(form_of(exported, module + ".weight"), HasSubstr("BF16")) << module;
    EXPECT_THAT(quantization(out())["ignore"], Contains(module));
  }
  EXPECT_EQ(form_of(exported, "model.layers.2.self_attn.o_proj.weight_packed"), "I32 [64, 8]");
  EXPECT_EQ(form_of(exported, "model.layers.0.feed_forward.down_proj.weight_packed"),
            "I32 [64, 12]");
  EXPECT_EQ(form_of(exported, "model.layers.1.feed_forward.shared_expert.up_proj.weight_packed"),
            "I32 [48, 8]");
  expect_round_trip();
}

TEST_F(Layouts, beside_int4_plain_experts_are_one_by_one_too) {
  pack(golden("llama4_maverick_tiny"), {}, int4_of());
  EXPECT_EQ(export_to(out()).format, "pack-quantized");
  const Checkpoint exported = Checkpoint::open(out());
  EXPECT_EQ(form_of(exported, std::string(kExperts) + "3.down_proj.weight"), "BF16 [64, 48]");
  EXPECT_FALSE(exported.has(std::string(kExperts) + "down_proj"));
  EXPECT_THAT(quantization(out())["ignore"],
              Contains(R"(re:model\.layers\.1\.feed_forward\.experts\.[0-9]+\.down_proj$)"));
  expect_round_trip();
}

TEST_F(Layouts, int4_of_a_dense_llama_takes_q_k_and_v_along) {
  pack(golden("llama_tiny"), {}, int4_of());
  EXPECT_THAT(export_to(out()).notes, ElementsAre());
  const Checkpoint exported = Checkpoint::open(out());
  EXPECT_EQ(form_of(exported, "model.layers.0.self_attn.k_proj.weight_packed"), "I32 [32, 8]");
  EXPECT_EQ(form_of(exported, "lm_head.weight"), "none") << "the head is tied";
  EXPECT_THAT(quantization(out())["ignore"], ElementsAre("lm_head"));
  expect_round_trip();
}

TEST_F(Layouts, what_is_not_quantised_comes_back_as_published_to_the_byte) {
  for (const char* name : {"llama4_maverick_tiny", "llama4_scout_tiny", "llama_tiny",
                           "deepseek_v3_tiny", "qwen2_tiny"}) {
    SCOPED_TRACE(name);
    pack(golden(name));
    const ExportReport report = export_to(out());
    EXPECT_EQ(report.format, "");
    EXPECT_TRUE(quantization(out()).is_null());
    const Checkpoint original = Checkpoint::open(golden(name)), exported = Checkpoint::open(out());
    ASSERT_EQ(original.tensors().size(), exported.tensors().size());
    for (const auto& [tensor, info] : original.tensors()) {
      EXPECT_EQ(form_of(exported, tensor), form_of(original, tensor)) << tensor;
      EXPECT_TRUE(bytes_of(exported, tensor) == bytes_of(original, tensor)) << tensor;
    }
    fs::remove_all(store());
    fs::remove_all(out());
  }
}

TEST_F(Layouts, bfloat16_is_every_decoded_value_rounded_once_whatever_the_store_holds) {
  for (const WeightKind kind : {WeightKind::int4, WeightKind::nf4, WeightKind::fp8}) {
    SCOPED_TRACE(static_cast<int>(kind));
    pack(golden("llama4_maverick_tiny"), as(kind), as(kind));
    const ExportReport report = export_to(out(), bfloat16());
    EXPECT_EQ(report.format, "");
    EXPECT_TRUE(quantization(out()).is_null());
    EXPECT_EQ(read_json(out() / "config.json")["dtype"], "bfloat16");
    const Checkpoint exported = Checkpoint::open(out());
    for (const auto& [tensor, info] : exported.tensors()) {
      EXPECT_EQ(info.info.dtype, Dtype::bf16) << tensor;
    }
    EXPECT_EQ(form_of(exported, std::string(kExperts) + "gate_up_proj"), "BF16 [8, 64, 96]");
    EXPECT_EQ(form_of(exported, std::string(kExperts) + "down_proj"), "BF16 [8, 48, 64]");

    pack_into(out(), folder_ / "again");
    auto wanted = decoded(store());
    for (auto& [name, values] : wanted) {
      std::vector<std::uint16_t> narrow(values.size());
      const EncodedMatrix wide{WeightFormat::f32(), 1, static_cast<std::int64_t>(values.size()),
                               reinterpret_cast<const std::byte*>(values.data())};
      decode_rows_bf16(wide, 0, 1, narrow.data());
      const EncodedMatrix rounded{WeightFormat::bf16(), 1, wide.columns,
                                  reinterpret_cast<const std::byte*>(narrow.data())};
      decode_rows(rounded, 0, 1, values.data());
    }
    expect_same(wanted, decoded(folder_ / "again"));
    fs::remove_all(store());
    fs::remove_all(out());
    fs::remove_all(folder_ / "again");
  }
}

TEST_F(Layouts, bfloat16_rounds_a_float32_model_too) {
  pack(golden("llama_tiny"));
  static_cast<void>(export_to(out(), bfloat16()));
  const Checkpoint exported = Checkpoint::open(out());
  EXPECT_EQ(form_of(exported, "model.norm.weight"), "BF16 [64]");
  EXPECT_EQ(form_of(exported, "model.embed_tokens.weight"), "BF16 [256, 64]");
  EXPECT_EQ(read_json(out() / "config.json")["dtype"], "bfloat16");
}

TEST_F(Layouts, biases_of_deepseeks_router_stay_float32) {
  pack(golden("deepseek_v3_tiny"), as(WeightKind::int4));
  export_to(out(), bfloat16());
  const std::string bias = "model.layers.1.mlp.gate.e_score_correction_bias";
  const Checkpoint exported = Checkpoint::open(out());
  EXPECT_EQ(form_of(exported, bias), "F32 [8]");
  EXPECT_EQ(bytes_of(exported, bias), bytes_of(Checkpoint::open(golden("deepseek_v3_tiny")), bias));
}

TEST_F(Layouts, fp8_blocks_alone_are_as_deepseek_publishes) {
  pack(golden("llama_tiny"), {}, as(WeightKind::fp8));
  const ExportReport report = export_to(out());
  EXPECT_EQ(report.format, "fp8");
  const Checkpoint exported = Checkpoint::open(out());
  EXPECT_EQ(form_of(exported, "model.layers.1.mlp.up_proj.weight"), "F8_E4M3 [96, 64]");
  EXPECT_EQ(form_of(exported, "model.layers.1.mlp.up_proj.weight_scale_inv"), "F32 [1, 1]");
  const Json config = quantization(out());
  EXPECT_EQ(config["quant_method"], "fp8");
  EXPECT_THAT(config["weight_block_size"], ElementsAre(128, 128));
  EXPECT_THAT(config["modules_to_not_convert"], ElementsAre("lm_head"));
  expect_round_trip();
}

TEST_F(Layouts, fp8_beside_int4_is_mixed_precision_of_compressed_tensors) {
  pack(golden("llama4_maverick_tiny"), int4_of(), as(WeightKind::fp8));
  const ExportReport report = export_to(out());
  EXPECT_EQ(report.format, "mixed-precision");
  const Checkpoint exported = Checkpoint::open(out());
  EXPECT_EQ(form_of(exported, "model.layers.1.self_attn.o_proj.weight"), "F8_E4M3 [64, 64]");
  EXPECT_EQ(form_of(exported, "model.layers.1.self_attn.o_proj.weight_scale"), "F32 [1, 1]");
  // Here decoding rounds: q, k and v are what bfloat16 can hold of them.
  EXPECT_EQ(form_of(exported, "model.layers.1.self_attn.q_proj.weight"), "BF16 [64, 64]");
  pack_into(out(), folder_ / "again");
  auto wanted = decoded(store()), found = decoded(folder_ / "again");
  for (auto* of : {&wanted, &found}) {
    std::erase_if(*of, [](const auto& entry) {
      return entry.first.ends_with(" q") || entry.first.ends_with(" k") ||
             entry.first.ends_with(" v");
    });
  }
  expect_same(wanted, found);
}

/// The tiny Maverick with its experts as Meta publishes fp8: fused, a scale an output.
void write_fp8_model(const fs::path& from, const fs::path& to) {
  make_folders(to);
  Json config = read_json(from / "config.json");
  config["quantization_config"] = {{"quant_method", "fbgemm_fp8"}};
  write_atomically(to / "config.json", config.dump());
  const Checkpoint checkpoint = Checkpoint::open(from);
  std::vector<TensorToWrite> tensors;
  std::vector<std::vector<std::byte>> codes;
  std::vector<std::vector<float>> scales;
  codes.reserve(checkpoint.tensors().size());
  scales.reserve(checkpoint.tensors().size());
  std::uint32_t random = 7;
  const auto next = [&] { return (random = random * 1664525U + 1013904223U) >> 24U; };
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    const auto& shape = tensor.info.shape;
    if (name.find("experts.") == std::string::npos) {
      tensors.push_back({name, tensor.info.dtype, shape, checkpoint.bytes(tensor)});
      continue;
    }
    auto& own = codes.emplace_back(static_cast<std::size_t>(tensor.info.elements()));
    for (std::byte& code : own) {
      code = static_cast<std::byte>(next());
      if ((code & std::byte{0x7F}) == std::byte{0x7F}) code = std::byte{0};  // no numbers
    }
    auto& scale = scales.emplace_back(static_cast<std::size_t>(shape[0] * shape[2]));
    for (float& value : scale) value = static_cast<float>(next() + 1) * 0x1p-16F;
    tensors.push_back({name, Dtype::f8_e4m3, shape, own});
    tensors.push_back(
        {name + "_scale", Dtype::f32, {shape[0], 1, shape[2]}, std::as_bytes(std::span(scale))});
  }
  write_safetensors(to / "model.safetensors", tensors);
}

TEST_F(Layouts, fp8_with_a_scale_an_output_is_float_quantized_by_channel) {
  write_fp8_model(golden("llama4_maverick_tiny"), made());
  pack(made());
  const ExportReport report = export_to(out());
  EXPECT_EQ(report.format, "float-quantized");
  const Checkpoint exported = Checkpoint::open(out());
  EXPECT_EQ(form_of(exported, std::string(kExperts) + "7.gate_proj.weight"), "F8_E4M3 [48, 64]");
  EXPECT_EQ(form_of(exported, std::string(kExperts) + "7.gate_proj.weight_scale"), "F32 [48, 1]");
  const Json group = quantization(out())["config_groups"]["group_0"];
  EXPECT_EQ(group["weights"]["strategy"], "channel");
  EXPECT_EQ(group["input_activations"]["strategy"], "token");
  EXPECT_EQ(quantization(out())["quant_method"], "compressed-tensors")
      << "the source's is replaced";
  expect_round_trip();
}

TEST_F(Layouts, the_wrappers_prefix_is_put_back_and_its_towers_are_said_to_be_missing) {
  pack(golden("llama4_conditional_tiny"), int4_of());
  const ExportReport report = export_to(out());
  EXPECT_THAT(report.notes, Contains(HasSubstr("--towers-from")));
  const Json index = read_json(out() / "model.safetensors.index.json");
  for (const auto& [name, file] : index["weight_map"].items()) {
    EXPECT_TRUE(name.starts_with("language_model.")) << name;
  }
  EXPECT_TRUE(index["weight_map"].contains("language_model.lm_head.weight"));
  const Json ignore = quantization(out())["ignore"];
  EXPECT_THAT(ignore, Contains("language_model.model.layers.1.feed_forward.router"));
  EXPECT_THAT(ignore, Contains("re:vision_model.*"));
  EXPECT_EQ(read_json(out() / "config.json")["model_type"], "llama4");
  expect_round_trip();
}

/// A dense model so wide that its vocabulary is stored in runs of 128 rows, its head in int4.
void write_wide_model(const fs::path& to) {
  constexpr std::int64_t kWidth = 65'536, kVocabulary = 200, kHidden = 8, kHead = 2;
  make_folders(to);
  const Json config = {{"architectures", {"LlamaForCausalLM"}},
                       {"model_type", "llama"},
                       {"hidden_size", kWidth},
                       {"num_attention_heads", 1},
                       {"num_key_value_heads", 1},
                       {"head_dim", kHead},
                       {"vocab_size", kVocabulary},
                       {"num_hidden_layers", 1},
                       {"intermediate_size", kHidden}};
  write_atomically(to / "config.json", config.dump());
  const ModelSpec spec = read_model_spec(to);
  std::vector<PublishedMatrix> matrices = attention_matrices(spec, 0);
  for (const auto& matrix : feed_forward_matrices(spec, 0)) matrices.push_back(matrix);
  matrices.push_back(embedding_matrix(spec));
  matrices.push_back(final_norm_matrix(spec));
  std::uint32_t random = 3;
  std::vector<std::vector<std::uint16_t>> values;
  values.reserve(matrices.size() + 1);
  std::vector<TensorToWrite> tensors;
  const auto numbers = [&](std::int64_t count) -> const std::vector<std::uint16_t>& {
    auto& own = values.emplace_back(static_cast<std::size_t>(count));
    for (std::uint16_t& bits : own) {
      random = random * 1664525U + 1013904223U;
      bits = static_cast<std::uint16_t>(0x3C00U | random >> 24U | (random & 0x80000U) >> 4U);
    }
    return own;
  };
  for (const PublishedMatrix& matrix : matrices) {
    std::vector<std::int64_t> shape = {matrix.rows, matrix.columns};
    if (matrix.rows == 1) shape = {matrix.columns};
    tensors.push_back({matrix.name, Dtype::bf16, shape,
                       std::as_bytes(std::span(numbers(matrix.rows * matrix.columns)))});
  }
  std::vector<std::uint32_t> codes(kVocabulary * kWidth / 8);
  for (std::uint32_t& word : codes) word = random = random * 1664525U + 1013904223U;
  tensors.push_back({"lm_head.weight_packed",
                     Dtype::i32,
                     {kVocabulary, kWidth / 8},
                     std::as_bytes(std::span(codes))});
  tensors.push_back({"lm_head.weight_scale",
                     Dtype::bf16,
                     {kVocabulary, kWidth / 128},
                     std::as_bytes(std::span(numbers(kVocabulary * kWidth / 128)))});
  write_safetensors(to / "model.safetensors", tensors);
}

TEST_F(Layouts, the_towers_of_the_original_are_added_as_they_are) {
  const fs::path original = golden("llama4_conditional_tiny");
  pack(original, int4_of());
  ExportOptions options;
  options.towers_from = original;
  options.shard_bytes_max = 60'000;
  const ExportReport report = export_to(out(), options);
  for (const std::string& note : report.notes) EXPECT_THAT(note, Not(HasSubstr("tower")));
  const Json index = read_json(out() / "model.safetensors.index.json");
  const auto written = tower_tensors(out()), published = tower_tensors(original);
  ASSERT_EQ(written.size(), published.size());
  ASSERT_GT(written.size(), 20U);
  for (std::size_t i = 0; i < written.size(); ++i) {
    const auto text_of = [](const TowerTensor& tensor) {
      return read_text(tensor.file)
          .substr(static_cast<std::size_t>(tensor.info.offset),
                  static_cast<std::size_t>(tensor.info.bytes));
    };
    EXPECT_EQ(written[i].name, published[i].name);
    EXPECT_EQ(written[i].info.shape, published[i].info.shape);
    EXPECT_TRUE(text_of(written[i]) == text_of(published[i])) << written[i].name;
    EXPECT_EQ(index["weight_map"][written[i].name], written[i].file.filename().string());
  }
  expect_round_trip();

  // One bit of a layer's attention tells another model.
  fs::copy(original, made());
  const Checkpoint checkpoint = Checkpoint::open(made());
  const auto& tensor = checkpoint.find("model.layers.2.self_attn.k_proj.weight");
  {
    std::fstream file(checkpoint.shard_path(tensor),
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(tensor.info.offset);
    const char first = static_cast<char>(file.get() ^ 1);
    file.seekp(tensor.info.offset);
    file.put(first);
  }
  options.towers_from = made();
  const Error another = error_of([&] { static_cast<void>(export_to(folder_ / "b", options)); });
  EXPECT_EQ(another.fault(), Fault::bad_file);
  EXPECT_THAT(another.parts().what, HasSubstr("another model"));
}

TEST_F(Layouts, towers_of_a_language_model_are_refused) {
  pack(golden("llama4_maverick_tiny"), int4_of());
  ExportOptions options;
  for (const char* name : {"llama4_maverick_tiny", "llama4_conditional_tiny"}) {
    options.towers_from = golden(name);
    const Error error = error_of([&] { static_cast<void>(export_to(out(), options)); });
    EXPECT_EQ(error.fault(), Fault::usage) << name;
    EXPECT_THAT(error.parts().what, HasSubstr("without other towers")) << name;
  }
  EXPECT_FALSE(fs::exists(out()));
}

TEST_F(Layouts, runs_of_the_vocabulary_are_one_tensor_and_a_quantised_head_is_decoded) {
  write_wide_model(made());
  pack(made());
  const ExportReport report = export_to(out());
  EXPECT_EQ(report.format, "");
  EXPECT_THAT(report.notes, ElementsAre(HasSubstr("head")));
  EXPECT_NE(Store::open(store()).layout().find({UnitKind::head, 0, 128}), nullptr);
  const Checkpoint original = Checkpoint::open(made()), exported = Checkpoint::open(out());
  EXPECT_TRUE(bytes_of(exported, "model.embed_tokens.weight") ==
              bytes_of(original, "model.embed_tokens.weight"));
  EXPECT_EQ(form_of(exported, "lm_head.weight"), "BF16 [200, 65536]");
  expect_round_trip();
}

TEST_F(Layouts, nf4_is_refused_with_the_way_out) {
  pack(golden("llama4_maverick_tiny"), as(WeightKind::nf4));
  const Error error = error_of([&] { static_cast<void>(export_to(out())); });
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_THAT(error.parts().what, HasSubstr("nf4"));
  EXPECT_THAT(error.parts().where, HasSubstr("layer 1, expert 0"));
  EXPECT_THAT(error.parts().mend, HasSubstr("--dtype bfloat16"));
  EXPECT_FALSE(fs::exists(out()));
}

TEST_F(Layouts, int4_groups_that_do_not_divide_the_inputs_are_refused) {
  pack(golden("llama4_maverick_tiny"), int4_of(40));
  const Error error = error_of([&] { static_cast<void>(export_to(out())); });
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_THAT(error.parts().what, HasSubstr("64 inputs, which int4 groups of 40 do not divide"));
  static_cast<void>(export_to(out(), bfloat16()));
}

}  // namespace
}  // namespace tailor
