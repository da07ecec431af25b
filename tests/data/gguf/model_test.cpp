#include "data/gguf/model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "data/checkpoint/checkpoint.h"
#include "data/gguf_export/export_gguf.h"
#include "data/store/source.h"
#include "tests/data/gguf/gguf_files.h"
#include "tests/support/small_disk.h"

namespace tailor {
namespace {

using gguf_tests::change_config;
using gguf_tests::error_of;
using gguf_tests::golden;
using testing::HasSubstr;

/// Maverick's tiny model with options that llama.cpp runs.
const Json kScoutLike = {{"use_qk_norm", true},         {"attention_chunk_size", 8192},
                         {"layer_types", nullptr},      {"no_rope_layers", nullptr},
                         {"no_rope_layer_interval", 4}, {"floor_scale", 8192},
                         {"attn_scale", 0.1},           {"attn_temperature_tuning", true}};

class GgufModels : public gguf_tests::ScratchTest {
 protected:
  GgufExportReport write(const fs::path& model, const std::string& name, GgmlType type,
                         int threads = 2) const {
    GgufExportOptions options;
    options.type = type;
    options.threads = threads;
    return export_gguf(model, folder_ / name, options);
  }
  /// Largest difference of any number of two models, by their published matrices.
  static double difference(const fs::path& a_folder, const fs::path& b_folder) {
    const ModelSpec spec = read_model_spec(a_folder);
    const Checkpoint a = Checkpoint::open(a_folder), b = Checkpoint::open(b_folder);
    SourceReader a_reader(a), b_reader(b);
    double worst = 0;
    const auto compare = [&](const PublishedMatrix& in_a, const PublishedMatrix& in_b) {
      const auto count = static_cast<std::size_t>(in_a.rows * in_a.columns);
      std::vector<float> x(count), y(count);
      a_reader.read_rows(in_a, 0, in_a.rows, x.data());
      b_reader.read_rows(in_b, 0, in_b.rows, y.data());
      for (std::size_t i = 0; i < count; ++i) {
        worst = std::max(worst, std::fabs(static_cast<double>(x[i]) - static_cast<double>(y[i])));
      }
    };
    const auto fused = [&](const Checkpoint& checkpoint) {
      return experts_are_fused(spec, [&](const std::string& name) { return checkpoint.has(name); });
    };
    const std::vector<GgufMatrix> of_a = gguf_matrices(spec, fused(a));
    const std::vector<GgufMatrix> of_b = gguf_matrices(spec, fused(b));
    for (std::size_t i = 0; i < of_a.size(); ++i) compare(of_a[i].matrix, of_b[i].matrix);
    return worst;
  }
};

void expect_same_model(const ModelSpec& a, const ModelSpec& b) {
  EXPECT_EQ(a.family, b.family);
  EXPECT_EQ(a.parameters(), b.parameters());
  EXPECT_EQ(a.positions_max, b.positions_max);
  EXPECT_EQ(a.norm_eps, b.norm_eps);
  EXPECT_EQ(a.tied_head, b.tied_head);
  EXPECT_EQ(a.qk_norm, b.qk_norm);
  EXPECT_EQ(a.experts_per_token, b.experts_per_token);
  EXPECT_EQ(a.softmax_scale(), b.softmax_scale());
  EXPECT_EQ(a.rope.theta, b.rope.theta);
  EXPECT_EQ(a.rope.pairs, b.rope.pairs);
  EXPECT_EQ(a.rope.kind, b.rope.kind);
  EXPECT_EQ(a.rope.factor, b.rope.factor);
  EXPECT_EQ(a.rope.original_positions, b.rope.original_positions);
  EXPECT_NEAR(a.rope.attention_factor, b.rope.attention_factor, 1e-7);
  EXPECT_EQ(a.rope.mscale_all_dim, b.rope.mscale_all_dim);
  EXPECT_EQ(a.router.kind, b.router.kind);
  EXPECT_EQ(a.router.groups, b.router.groups);
  EXPECT_EQ(a.router.groups_kept, b.router.groups_kept);
  EXPECT_EQ(a.router.normalise, b.router.normalise);
  EXPECT_NEAR(a.router.scale, b.router.scale, 1e-6);
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (std::size_t l = 0; l < a.layers.size(); ++l) {
    EXPECT_EQ(a.layers[l].moe, b.layers[l].moe);
    EXPECT_EQ(a.layers[l].rope, b.layers[l].rope);
    EXPECT_EQ(a.layers[l].attention_chunk, b.layers[l].attention_chunk);
  }
}

TEST_F(GgufModels, of_every_family_come_back_to_the_bit) {
  for (const char* name :
       {"llama_tiny", "qwen2_tiny", "llama4_maverick_tiny", "deepseek_v3_tiny"}) {
    SCOPED_TRACE(name);
    const fs::path model = copy_model(name);
    if (std::string(name) == "llama4_maverick_tiny") change_config(model, kScoutLike);
    for (const GgmlType type : {GgmlType::f32, GgmlType::bf16}) {
      const std::string file = std::string(name) + std::string(ggml_layout(type).name) + ".gguf";
      write(model, file, type);
      const fs::path back = find_model_folder((folder_ / file).string());
      expect_same_model(read_model_spec(model), read_model_spec(back));
      const Checkpoint source = Checkpoint::open(model);
      const bool fits = type == GgmlType::f32 ||
                        source.find("model.embed_tokens.weight").info.dtype == Dtype::bf16;
      if (fits) {
        EXPECT_EQ(difference(model, back), 0);
      } else {
        EXPECT_LT(difference(model, back), 0.01);
      }
    }
  }
}

TEST_F(GgufModels, a_disk_filled_half_way_leaves_nothing_and_a_second_try_is_whole) {
  const fs::path copy = copy_model("llama4_maverick_tiny");
  change_config(copy, kScoutLike);
  write(copy, "whole.gguf", GgmlType::f32);
  testing_support::SmallDisk disk(folder_ / "disk");
  if (!disk.without_reserving(8 << 20)) GTEST_SKIP() << "no file system can be mounted here";
  GgufExportOptions options;
  options.type = GgmlType::f32;
  options.threads = 1;
  int asked = 0;
  options.stop = [&] {
    if (++asked == 3) disk.fill();
    return false;
  };
  const Error error = error_of([&] { export_gguf(copy, disk / "out.gguf", options); });
  EXPECT_EQ(error.fault(), Fault::io);
  EXPECT_THAT(error.parts().what, HasSubstr("No space left on device"));
  EXPECT_FALSE(fs::exists(disk / "out.gguf"));
  EXPECT_FALSE(fs::exists(disk / ".out.gguf.tailor-gguf"));
  options.stop = nullptr;
  EXPECT_EQ(error_of([&] { export_gguf(copy, disk / "out.gguf", options); }).fault(),
            Fault::does_not_fit)
      << "the disk is still full, which is known before";
  disk.make_room();
  export_gguf(copy, disk / "out.gguf", options);
  EXPECT_EQ(read_text(disk / "out.gguf"), read_text(folder_ / "whole.gguf"));
}

TEST_F(GgufModels, in_fp8_are_decoded_and_in_q8_0_are_near) {
  write(golden("deepseek_v3_fp8_tiny") / "model", "fp8.gguf", GgmlType::f32);
  EXPECT_EQ(difference(golden("deepseek_v3_fp8_tiny") / "model",
                       find_model_folder((folder_ / "fp8.gguf").string())),
            0);
  write(golden("qwen2_tiny") / "model", "q8.gguf", GgmlType::q8_0);
  const double lost =
      difference(golden("qwen2_tiny") / "model", find_model_folder((folder_ / "q8.gguf").string()));
  EXPECT_GT(lost, 0);
  EXPECT_LT(lost, 0.02);
  const GgufModel read = GgufModel::open(folder_ / "q8.gguf");
  EXPECT_EQ(read.header().tensors.at("blk.0.attn_q.weight").type, GgmlType::q8_0);
  EXPECT_EQ(read.header().tensors.at("blk.0.attn_norm.weight").type, GgmlType::f32);
}

TEST_F(GgufModels, are_the_same_file_on_any_number_of_threads) {
  const fs::path model = golden("deepseek_v3_tiny") / "model";
  write(model, "one.gguf", GgmlType::q8_0, 1);
  write(model, "five.gguf", GgmlType::q8_0, 5);
  EXPECT_EQ(sha256_file(folder_ / "one.gguf"), sha256_file(folder_ / "five.gguf"));
}

TEST_F(GgufModels, are_unpacked_once_and_found_in_a_folder) {
  fs::create_directories(folder_ / "there");
  write(golden("llama_tiny") / "model", "there/model.gguf", GgmlType::f16);
  const fs::path first = find_model_folder((folder_ / "there").string());
  EXPECT_EQ(find_model_folder((folder_ / "there/model.gguf").string()), first);
  EXPECT_TRUE(fs::exists(first / "config.json"));
  write(golden("llama_tiny") / "model", "there/other.gguf", GgmlType::f16);
  const Error error = error_of([&] { find_model_folder((folder_ / "there").string()); });
  EXPECT_THAT(error.parts().mend, HasSubstr("model.gguf, other.gguf"));
}

TEST_F(GgufModels, are_not_written_over_a_file_and_leave_nothing_when_stopped) {
  const fs::path model = golden("llama_tiny") / "model";
  write_atomically(folder_ / "mine.gguf", "mine");
  EXPECT_EQ(error_of([&] { write(model, "mine.gguf", GgmlType::f16); }).fault(), Fault::usage);
  EXPECT_EQ(read_text(folder_ / "mine.gguf"), "mine");
  GgufExportOptions options;
  options.stop = [] { return true; };
  const Error error = error_of([&] { export_gguf(model, folder_ / "stopped.gguf", options); });
  EXPECT_EQ(error.fault(), Fault::stopped);
  for (const auto& entry : fs::directory_iterator(folder_)) {
    EXPECT_EQ(entry.path().filename().string().find("stopped"), std::string::npos) << entry.path();
  }
}

TEST_F(GgufModels, whose_tensors_do_not_fit_are_refused_by_name) {
  write(golden("llama_tiny") / "model", "good.gguf", GgmlType::f16);
  const std::string good = read_text(folder_ / "good.gguf");
  const auto broken = [&](const std::string& from, const std::string& to) {
    std::string file = good;
    const auto at = file.find(from);
    EXPECT_NE(at, std::string::npos);
    file.replace(at, from.size(), to);
    write_atomically(folder_ / "bad.gguf", file);
    return to_text(error_of([&] { GgufModel::open(folder_ / "bad.gguf"); }));
  };
  EXPECT_THAT(broken("blk.0.attn_k.weight", "blk.0.attn_z.weight"),
              testing::AllOf(HasSubstr("blk.0.attn_k.weight is missing"),
                             HasSubstr("blk.0.attn_z.weight belongs to no part")));
  EXPECT_THAT(broken("llama.embedding_length", "llama.embedding_lengtx"),
              HasSubstr("key llama.embedding_length"));
  EXPECT_THAT(broken(std::string("general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", 37),
                     std::string("general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0gemma", 37)),
              HasSubstr("architecture 'gemma' is not supported"));
}

TEST_F(GgufModels, with_impossible_sizes_are_refused) {
  write(golden("deepseek_v3_tiny") / "model", "good.gguf", GgmlType::f16);
  const std::string good = read_text(folder_ / "good.gguf");
  for (const char* key :
       {"block_count", "embedding_length", "attention.head_count", "expert_count",
        "attention.kv_lora_rank", "attention.key_length_mla", "expert_shared_count",
        "rope.dimension_count", "leading_dense_block_count", "expert_used_count"}) {
    for (const std::uint32_t value : {0U, 3'000U, 70'000U, 0x7FFFFFFFU, 0xFFFFFFFFU}) {
      SCOPED_TRACE(std::string(key) + " " + std::to_string(value));
      std::string file = good;
      const std::string name = std::string("deepseek2.") + key;
      const auto at = file.find(name);
      ASSERT_NE(at, std::string::npos);
      std::memcpy(file.data() + at + name.size() + 4, &value, sizeof value);
      write_atomically(folder_ / "bad.gguf", file);
      const Error error = error_of([&] { GgufModel::open(folder_ / "bad.gguf"); });
      EXPECT_EQ(error.fault(), Fault::bad_file);
    }
  }
}

/// Whatever the head says, it is a model or it is refused.
TEST_F(GgufModels, with_bytes_changed_are_read_or_refused) {
  for (const char* name : {"llama_tiny", "deepseek_v3_tiny"}) {
    write(golden(name) / "model", std::string(name) + ".gguf", GgmlType::q8_0);
    const std::string good = read_text(folder_ / (std::string(name) + ".gguf"));
    const auto head = static_cast<std::size_t>(gguf_tests::parse(good).data_begin);
    std::mt19937 numbers(5);
    int refused = 0;
    constexpr int kRounds = 1500;
    for (int round = 0; round < kRounds; ++round) {
      std::string file = good;
      for (unsigned i = 0; i < 1 + numbers() % 3; ++i) {
        file[numbers() % head] = static_cast<char>(numbers() % 3 == 0 ? 0xFF : numbers());
      }
      FileWriter writer(folder_ / "bad.gguf");
      writer.write(std::string_view(file));
      writer.flush();
      try {
        const GgufModel model = GgufModel::open(folder_ / "bad.gguf");
        static_cast<void>(model.tokenizer_files());
      } catch (const Error& error) {
        ASSERT_EQ(error.fault(), Fault::bad_file) << to_text(error);
        ++refused;
      }
    }
    EXPECT_GT(refused, kRounds / 2);
  }
}

/// What of a spec llama.cpp would compute otherwise, and the words that say so.
TEST_F(GgufModels, that_llama_cpp_cannot_run_are_refused_by_name) {
  struct Case {
    const char* model;
    Json changes;
    const char* what;
  };
  const auto with = [](Json more) {
    Json out = kScoutLike;
    for (const auto& [key, value] : more.items()) out[key] = value;
    return out;
  };
  const std::vector<Case> cases = {
      {"llama4_maverick_tiny", with({{"use_qk_norm", false}}),
       "use_qk_norm is false with 8 experts"},
      {"llama4_maverick_tiny", with({{"no_rope_layer_interval", 2}}), "no rotary embedding"},
      {"llama4_maverick_tiny", with({{"attention_chunk_size", 16}}), "chunks of 16"},
      {"deepseek_v3_tiny", {{"rope_interleave", false}}, "rope_interleave"},
      {"qwen2_tiny",
       {{"rope_parameters",
         {{"rope_type", "llama3"},
          {"rope_theta", 10000},
          {"factor", 8},
          {"low_freq_factor", 1},
          {"high_freq_factor", 4},
          {"original_max_position_embeddings", 32}}}},
       "rope type llama3 with model_type qwen2"},
      {"llama_tiny",
       {{"rope_parameters",
         {{"rope_type", "yarn"},
          {"rope_theta", 10000},
          {"factor", 4},
          {"truncate", false},
          {"original_max_position_embeddings", 32}}}},
       "truncate"},
  };
  for (const Case& each : cases) {
    SCOPED_TRACE(each.what);
    const fs::path model = copy_model(each.model);
    change_config(model, each.changes);
    const Error error = error_of([&] { write(model, "x.gguf", GgmlType::f16); });
    EXPECT_EQ(error.fault(), Fault::usage);
    EXPECT_THAT(error.parts().what, HasSubstr(each.what));
    EXPECT_FALSE(fs::exists(folder_ / "x.gguf"));
    fs::remove_all(model);
  }
}

TEST_F(GgufModels, with_scaled_rotary_embedding_keep_it) {
  const Json kinds[] = {{{"rope_type", "llama3"},
                         {"rope_theta", 500000},
                         {"factor", 32},
                         {"low_freq_factor", 1},
                         {"high_freq_factor", 4},
                         {"original_max_position_embeddings", 8192}},
                        {{"rope_type", "yarn"},
                         {"rope_theta", 10000},
                         {"factor", 4},
                         {"original_max_position_embeddings", 32}},
                        {{"rope_type", "yarn"},
                         {"rope_theta", 10000},
                         {"factor", 4},
                         {"attention_factor", 1.5},
                         {"original_max_position_embeddings", 32}}};
  for (const Json& kind : kinds) {
    SCOPED_TRACE(kind.dump());
    const fs::path model = copy_model("llama_tiny");
    change_config(model, {{"rope_parameters", kind}});
    write(model, "x.gguf", GgmlType::f32);
    expect_same_model(read_model_spec(model),
                      read_model_spec(find_model_folder((folder_ / "x.gguf").string())));
    fs::remove_all(model);
    fs::remove(folder_ / "x.gguf");
  }
}

TEST_F(GgufModels, with_a_weight_that_is_no_number_are_refused) {
  write(golden("llama_tiny") / "model", "good.gguf", GgmlType::f32);
  std::string file = read_text(folder_ / "good.gguf");
  const GgufHeader header = gguf_tests::parse(file);
  const float odd = std::numeric_limits<float>::infinity();
  const auto at = static_cast<std::size_t>(header.tensors.at("blk.1.ffn_up.weight").offset) + 4;
  std::memcpy(file.data() + at, &odd, sizeof odd);
  write_atomically(folder_ / "bad.gguf", file);
  const Error error = error_of([&] { find_model_folder((folder_ / "bad.gguf").string()); });
  EXPECT_EQ(error.fault(), Fault::bad_file);
  EXPECT_THAT(error.parts().where, HasSubstr("blk.1.ffn_up.weight, row 0, column 1"));
  for (const auto& entry : fs::recursive_directory_iterator(folder_ / "cache")) {
    EXPECT_FALSE(entry.path().extension() == ".safetensors") << entry.path();
  }
}

}  // namespace
}  // namespace tailor
