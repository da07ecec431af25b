// Merging: PEFT's merged weights, rounding once, every format, resuming, receipts, bad input.

#include "adapters/merge/merge.h"

#include <gmock/gmock.h>

#include <atomic>
#include <cmath>

#include "adapters/base_record.h"
#include "adapters/merge/cpu/low_rank.h"
#include "adapters/merge/receipt.h"
#include "base/json.h"
#include "data/checkpoint/safetensors.h"
#include "data/store/export.h"
#include "data/store/fingerprint.h"
#include "data/store/pack.h"
#include "data/store/source.h"
#include "merge_support.h"

namespace tailor {
namespace {

using namespace testing_support;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

template <class Body>
Error error_of(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return Error(Fault::internal, {});
}

class MergeTest : public testing::Test {
 protected:
  /// Merges into the folder `name` of the test's own.
  MergeReport merge(const fs::path& base, const fs::path& adapter, const std::string& name,
                    MergeDtype dtype = MergeDtype::as_base) {
    return merge_adapters(base, box_ / name, one_adapter(adapter, dtype));
  }
  /// A copy of a golden model, to be changed.
  fs::path copy_of(const std::string& golden_name) {
    const fs::path to = box_ / (golden_name + "-copy");
    fs::copy(golden(golden_name) / "model", to);
    return to;
  }
  TemporaryFolder box_;
};

class MergeFixture : public MergeTest, public testing::WithParamInterface<const char*> {};

TEST_P(MergeFixture, float32_equals_pefts_merged_weights) {
  const fs::path run = golden(GetParam()) / "lora";
  merge(golden(GetParam()) / "model", run / "adapter_final", "out", MergeDtype::float32);
  const auto wanted = load_folder(run / "merged");
  const auto found = load_folder(box_ / "out");
  for (const auto& [name, tensor] : wanted) {
    ASSERT_TRUE(found.count(name) == 1) << name;
    ASSERT_EQ(found.at(name).shape, tensor.shape) << name;
    EXPECT_EQ(found.at(name).dtype, Dtype::f32) << name;
    const auto ours = found.at(name).floats(), theirs = tensor.floats();
    double worst = 0;
    for (std::size_t i = 0; i < ours.size(); ++i) {
      worst = std::max(worst, std::fabs(static_cast<double>(ours[i] - theirs[i])));
    }
    EXPECT_LE(worst, 1e-6) << name;
  }
  // What the base has and PEFT did not save: tied heads.
  for (const auto& [name, tensor] : found) EXPECT_TRUE(wanted.count(name) == 1) << name;
  EXPECT_EQ(read_json(box_ / "out" / "config.json").value("dtype", ""), "float32");
}

TEST_P(MergeFixture, bfloat16_is_the_float32_sum_rounded_once) {
  const fs::path model = golden(GetParam()) / "model";
  const fs::path adapter = golden(GetParam()) / "lora/adapter_final";
  merge(model, adapter, "wide", MergeDtype::float32);
  merge(model, adapter, "narrow", MergeDtype::bfloat16);
  const auto wide = load_folder(box_ / "wide"), narrow = load_folder(box_ / "narrow");
  ASSERT_EQ(wide.size(), narrow.size());
  for (const auto& [name, tensor] : narrow) {
    const auto sums = wide.at(name).floats(), rounded = tensor.floats();
    if (name.ends_with("e_score_correction_bias")) {
      EXPECT_EQ(tensor.bytes, wide.at(name).bytes);
      continue;
    }
    EXPECT_EQ(tensor.dtype, Dtype::bf16) << name;
    for (std::size_t i = 0; i < sums.size(); ++i) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(rounded[i]),
                std::bit_cast<std::uint32_t>(bf16_to_float(bf16_from_float(sums[i]))))
          << name << " " << i;
    }
  }
}

TEST_P(MergeFixture, keeps_the_bases_type_names_and_files) {
  const fs::path model = golden(GetParam()) / "model";
  merge(model, golden(GetParam()) / "lora/adapter_final", "out");
  const auto before = load_folder(model), after = load_folder(box_ / "out");
  ASSERT_EQ(before.size(), after.size());
  std::size_t changed = 0;
  for (const auto& [name, tensor] : before) {
    EXPECT_EQ(after.at(name).dtype, tensor.dtype);
    EXPECT_EQ(after.at(name).shape, tensor.shape);
    changed += after.at(name).bytes == tensor.bytes ? 0U : 1U;
  }
  const Json receipt = read_json(box_ / "out" / kReceiptName);
  EXPECT_EQ(receipt["adapted_tensors"], changed);
  EXPECT_EQ(receipt["unchanged_tensors"], before.size() - changed);
  for (const auto& entry : fs::directory_iterator(model)) {
    const std::string name = entry.path().filename();
    EXPECT_TRUE(fs::exists(box_ / "out" / name)) << name;
    if (entry.path().extension() == ".safetensors" || name.ends_with("index.json")) continue;
    EXPECT_EQ(read_text(box_ / "out" / name), read_text(entry.path())) << name;
  }
  // The index is one that a checkpoint opens with, and the model is whole.
  const Checkpoint merged = Checkpoint::open(box_ / "out");
  EXPECT_EQ(merged.tensors().size(), before.size());
  EXPECT_THAT(verify_merge(box_ / "out", {}).problems, IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(Models, MergeFixture,
                         testing::Values("llama_tiny", "qwen2_tiny", "llama4_maverick_tiny",
                                         "deepseek_v3_tiny"),
                         [](const auto& model) { return std::string(model.param); });

TEST_F(MergeTest, every_layout_of_an_adapter_gives_the_same_model) {
  const fs::path model = golden("llama4_maverick_tiny") / "model";
  const fs::path run = golden("llama4_maverick_tiny") / "lora";
  merge(model, run / "adapter_final", "peft", MergeDtype::float32);
  const auto wanted = load_folder(box_ / "peft");
  for (const char* layout : {"adapter_vllm_2d", "adapter_vllm_3d"}) {
    const fs::path folder = box_ / layout;
    make_folders(folder);
    fs::copy(run / layout / "adapter_model.safetensors", folder / "adapter_model.safetensors");
    Json config = read_json(run / "adapter_final/adapter_config.json");
    // The servers' files have the scale in B, or not: the sum below tells.
    write_atomically(folder / "adapter_config.json", config.dump());
    merge(model, folder, std::string("out-") + layout, MergeDtype::float32);
    for (const auto& [name, tensor] : load_folder(box_ / (std::string("out-") + layout))) {
      const auto ours = tensor.floats(), theirs = wanted.at(name).floats();
      double worst = 0;
      for (std::size_t i = 0; i < ours.size(); ++i) {
        worst = std::max(worst, std::fabs(static_cast<double>(ours[i] - theirs[i])));
      }
      EXPECT_LE(worst, 1e-6) << layout << " " << name;
    }
  }
}

TEST_F(MergeTest, wrapper_keeps_its_prefix_and_its_other_towers) {
  const fs::path adapter = golden("llama4_maverick_tiny") / "lora/adapter_final";
  merge(golden("llama4_maverick_tiny") / "model", adapter, "text");
  merge(golden("llama4_conditional_tiny") / "model", adapter, "wrapper");
  const auto text = load_folder(box_ / "text"), wrapper = load_folder(box_ / "wrapper"),
             before = load_folder(golden("llama4_conditional_tiny") / "model");
  ASSERT_EQ(wrapper.size(), before.size());
  std::size_t towers = 0;
  for (const auto& [name, tensor] : wrapper) {
    if (name.starts_with("language_model.")) {
      EXPECT_EQ(tensor.bytes, text.at(name.substr(15)).bytes) << name;
    } else {
      EXPECT_EQ(tensor.bytes, before.at(name).bytes) << name;
      ++towers;
    }
  }
  EXPECT_GT(towers, 0U);
  // Not quantised and not converted either, whatever the language model is written as.
  merge(golden("llama4_conditional_tiny") / "model", adapter, "wide", MergeDtype::float32);
  for (const auto& [name, tensor] : load_folder(box_ / "wide")) {
    EXPECT_EQ(tensor.dtype,
              name.starts_with("language_model.") ? Dtype::f32 : before.at(name).dtype);
  }
}

TEST_F(MergeTest, several_adapters_add_up_with_their_weights) {
  const fs::path model = golden("llama4_maverick_tiny") / "model";
  const ModelSpec spec = read_model_spec(model);
  make_adapter(box_ / "one", spec, {"attention", "experts"}, 0.05, 1);
  make_adapter(box_ / "two", spec, {"experts", "shared_expert"}, 0.05, 2);
  merge(model, box_ / "one", "m1", MergeDtype::float32);
  merge(model, box_ / "two", "m2", MergeDtype::float32);
  MergeOptions options;
  options.adapters = {{box_ / "one", 0.5}, {box_ / "two", -2}};
  options.dtype = MergeDtype::float32;
  merge_adapters(model, box_ / "both", options);
  const auto base = load_folder(model), one = load_folder(box_ / "m1"),
             two = load_folder(box_ / "m2");
  for (const auto& [name, tensor] : load_folder(box_ / "both")) {
    const auto b = base.at(name).floats(), x = one.at(name).floats(), y = two.at(name).floats(),
               sum = tensor.floats();
    for (std::size_t i = 0; i < b.size(); ++i) {
      const double wanted = static_cast<double>(b[i]) + 0.5 * static_cast<double>(x[i] - b[i]) -
                            2 * static_cast<double>(y[i] - b[i]);
      ASSERT_NEAR(static_cast<double>(sum[i]), wanted, 2e-6) << name << " " << i;
    }
  }
  options.adapters = {{box_ / "one", 0}};
  options.dtype = MergeDtype::as_base;
  merge_adapters(model, box_ / "none", options);
  for (const auto& [name, tensor] : load_folder(box_ / "none")) {
    EXPECT_EQ(tensor.bytes, base.at(name).bytes) << name;
  }
}

TEST_F(MergeTest, experts_without_factors_keep_their_bytes) {
  const fs::path model = golden("llama4_maverick_tiny") / "model";
  const ModelSpec spec = read_model_spec(model);
  make_adapter(box_ / "chosen", spec, {"experts"}, 0.05, 3,
               std::map<int, std::vector<std::int32_t>>{{1, {2, 5}}, {3, {0}}});
  merge(model, box_ / "chosen", "out");
  const std::string name = "model.layers.1.feed_forward.experts.gate_up_proj";
  const Stored before = load_folder(model).at(name), after = load_folder(box_ / "out").at(name);
  const std::size_t each = before.bytes.size() / 8;
  for (std::size_t e = 0; e < 8; ++e) {
    const bool same = std::equal(before.bytes.begin() + static_cast<std::ptrdiff_t>(e * each),
                                 before.bytes.begin() + static_cast<std::ptrdiff_t>((e + 1) * each),
                                 after.bytes.begin() + static_cast<std::ptrdiff_t>(e * each));
    EXPECT_EQ(same, e != 2 && e != 5) << e;
  }
}

// ------------------------------------------------------------------ quantised bases

/// All matrices of a model that adapters reach, as floats.
std::map<std::string, std::vector<float>> decoded(const fs::path& folder) {
  const ModelSpec spec = read_model_spec(folder);
  const Checkpoint checkpoint = Checkpoint::open(folder);
  SourceReader reader(checkpoint);
  const bool fused =
      experts_are_fused(spec, [&](const std::string& name) { return checkpoint.has(name); });
  std::map<std::string, std::vector<float>> out;
  const auto add = [&](const PublishedMatrix& matrix) {
    if (matrix.is_vector()) return;
    auto& values =
        out[matrix.name + "/" + std::to_string(matrix.expert) + "/" + std::to_string(matrix.first)];
    values.resize(static_cast<std::size_t>(matrix.rows * matrix.columns));
    reader.read_rows(matrix, 0, matrix.rows, values.data());
  };
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    for (const auto& matrix : attention_matrices(spec, l)) add(matrix);
    for (const auto& matrix : feed_forward_matrices(spec, l)) add(matrix);
    for (std::int64_t e = 0; spec.layers[static_cast<std::size_t>(l)].moe && e < spec.experts;
         ++e) {
      for (const auto& matrix : expert_matrices(spec, l, e, fused)) add(matrix);
    }
  }
  return out;
}

TEST_F(MergeTest, fp8_is_decoded_added_and_encoded_again) {
  const fs::path model = golden("deepseek_v3_fp8_tiny") / "model";
  const ModelSpec spec = read_model_spec(model);
  make_adapter(box_ / "adapter", spec, {"attention", "experts", "shared_expert", "dense_mlp"}, 0.3);
  const MergeReport report = merge(model, box_ / "adapter", "fp8");
  EXPECT_TRUE(report.quantised);
  merge(model, box_ / "adapter", "wide", MergeDtype::float32);
  const auto base = decoded(model), merged = decoded(box_ / "fp8"), sums = decoded(box_ / "wide");
  const auto types = load_folder(box_ / "fp8");
  std::size_t changed = 0;
  for (const auto& [name, target] : sums) {
    const auto& found = merged.at(name);
    const bool adapted = base.at(name) != target;
    changed += adapted ? 1U : 0U;
    if (!adapted) {
      EXPECT_EQ(found, base.at(name)) << name;
      continue;
    }
    EXPECT_EQ(types.at(name.substr(0, name.find('/'))).dtype, Dtype::f8_e4m3) << name;
    // e4m3 has 3 mantissa bits: half a step is 1/16 of a value, or of the block's smallest normal.
    float largest = 0;
    for (const float value : target) largest = std::max(largest, std::fabs(value));
    for (std::size_t i = 0; i < target.size(); ++i) {
      ASSERT_LE(std::fabs(found[i] - target[i]),
                std::max(std::fabs(target[i]) / 16, largest / 448 / 1024 * 1.01F) * 1.0001F)
          << name << " " << i;
    }
  }
  EXPECT_GT(changed, 20U);
  // Unquantised: config and scales are gone, and the numbers are the rounded sums.
  merge(model, box_ / "adapter", "bf16", MergeDtype::bfloat16);
  EXPECT_FALSE(read_json(box_ / "bf16" / "config.json").contains("quantization_config"));
  const auto narrow = decoded(box_ / "bf16");
  for (const auto& [name, tensor] : load_folder(box_ / "bf16")) {
    EXPECT_THAT(name, testing::Not(HasSubstr("scale_inv")));
    EXPECT_NE(tensor.dtype, Dtype::f8_e4m3);
  }
  for (const auto& [name, target] : sums) {
    for (std::size_t i = 0; i < target.size(); ++i) {
      ASSERT_EQ(narrow.at(name)[i], bf16_to_float(bf16_from_float(target[i]))) << name;
    }
  }
}

TEST_F(MergeTest, fp8_sums_are_the_dequantised_base_and_the_change) {
  // What no adapter changes is, unquantised, the published dequantisation.
  const fs::path model = golden("deepseek_v3_fp8_tiny") / "model";
  make_adapter(box_ / "adapter", read_model_spec(model), {"experts"}, 0.3);
  merge(model, box_ / "adapter", "wide", MergeDtype::float32);
  const auto base = decoded(model), wide = decoded(box_ / "wide");
  const ModelSpec spec = read_model_spec(model);
  const Adapter adapter = read_peft_adapter(box_ / "adapter", spec);
  for (const LoraSite& site : adapter.sites()) {
    if (site.projection != Projection::experts_down) continue;
    const auto a = adapter.a_of(site), b = adapter.b_of(site);
    for (std::int64_t e = 0; e < site.experts; ++e) {
      const std::string name = site.module + "." + std::to_string(e) + ".down_proj.weight/0/0";
      for (std::int64_t o = 0; o < site.out; o += 7) {
        for (std::int64_t i = 0; i < site.in; i += 5) {
          double delta = 0;
          for (std::int64_t r = 0; r < site.rank; ++r) {
            delta +=
                static_cast<double>(
                    b[static_cast<std::size_t>((e * site.rank + r) * site.out + o)]) *
                static_cast<double>(a[static_cast<std::size_t>((e * site.rank + r) * site.in + i)]);
          }
          const auto at = static_cast<std::size_t>(o * site.in + i);
          ASSERT_NEAR(static_cast<double>(wide.at(name)[at]),
                      static_cast<double>(base.at(name)[at]) + site.scale * delta, 1e-6);
        }
      }
    }
  }
}

class Int4Merge : public MergeTest {
 protected:
  /// The golden model with experts in compressed-tensors' INT4.
  fs::path int4_model(const std::string& name) {
    PackOptions pack;
    pack.formats.experts = {false, WeightKind::int4, 32};
    pack_store(golden(name) / "model", box_ / "store", pack);
    export_store(Store::open(box_ / "store"), box_ / "int4", {});
    return box_ / "int4";
  }
};

TEST_F(Int4Merge, keeps_the_format_and_says_what_was_lost) {
  const fs::path model = int4_model("deepseek_v3_tiny");
  const ModelSpec spec = read_model_spec(model);
  make_adapter(box_ / "large", spec, {"experts", "attention"}, 1.0);
  const MergeReport report = merge(model, box_ / "large", "out");
  EXPECT_TRUE(report.quantised);
  merge(model, box_ / "large", "wide", MergeDtype::float32);
  const auto base = decoded(model), merged = decoded(box_ / "out"), sums = decoded(box_ / "wide");
  double kept = 0, change = 0, error = 0, squares = 0;
  for (const auto& [name, target] : sums) {
    const auto& b = base.at(name);
    const auto& s = merged.at(name);
    if (b == target) {
      EXPECT_EQ(s, b) << name;
      continue;
    }
    for (std::size_t i = 0; i < target.size(); ++i) {
      const double d = static_cast<double>(target[i] - b[i]);
      kept += static_cast<double>(s[i] - b[i]) * d;
      change += d * d;
      error += std::pow(static_cast<double>(s[i] - target[i]), 2);
      squares += std::pow(static_cast<double>(b[i]), 2);
    }
  }
  EXPECT_NEAR(report.shares.kept, kept / change, 1e-4);
  EXPECT_NEAR(report.shares.error, std::sqrt(error / squares), 1e-4 * std::sqrt(error / squares));
  EXPECT_NEAR(report.shares.relative_change, std::sqrt(change / squares), 1e-4);
  EXPECT_GT(report.shares.kept, kKeptLimit);
  EXPECT_TRUE(read_json(box_ / "out" / "config.json").contains("quantization_config"));
  EXPECT_THAT(verify_merge(box_ / "out", {}).problems, IsEmpty());
}

TEST_F(MergeTest, a_change_below_half_a_step_is_lost_and_told) {
  const fs::path model = golden("deepseek_v3_tiny") / "model";
  make_adapter(box_ / "small", read_model_spec(model), {"experts"}, 1e-6);
  const MergeReport lost = merge(model, box_ / "small", "lost");
  EXPECT_EQ(lost.below_limit, lost.adapted);
  EXPECT_LT(lost.least_kept, 0.2);
  EXPECT_THAT(lost.notes, testing::Contains(HasSubstr("kept less than 80 % of their change")));
  const MergeReport all = merge(model, box_ / "small", "all", MergeDtype::float32);
  EXPECT_EQ(all.below_limit, 0);
  EXPECT_NEAR(all.shares.kept, 1, 1e-2);
}

TEST_F(Int4Merge, unquantised_names_are_those_of_plain_weights) {
  const fs::path model = int4_model("deepseek_v3_tiny");
  make_adapter(box_ / "adapter", read_model_spec(model), {"experts"}, 0.5);
  merge(model, box_ / "adapter", "bf16", MergeDtype::bfloat16);
  for (const auto& [name, tensor] : load_folder(box_ / "bf16")) {
    EXPECT_THAT(name, testing::Not(HasSubstr("weight_")));
    EXPECT_NE(tensor.dtype, Dtype::i32);
  }
  EXPECT_FALSE(read_json(box_ / "bf16" / "config.json").contains("quantization_config"));
  EXPECT_EQ(load_folder(box_ / "bf16").size(),
            load_folder(golden("deepseek_v3_tiny") / "model").size());
}

// ------------------------------------------------------------------ resuming

TEST_F(MergeTest, what_was_stopped_goes_on_to_the_same_bytes) {
  const fs::path model = golden("deepseek_v3_fp8_tiny") / "model";
  make_adapter(box_ / "adapter", read_model_spec(model), {"attention", "experts"}, 0.3);
  merge(model, box_ / "adapter", "whole");
  MergeOptions options = one_adapter(box_ / "adapter");
  options.threads = 1;
  std::atomic<int> asked = 0;
  options.stop = [&] { return ++asked > 20; };  // pieces
  const Error stopped = error_of([&] { merge_adapters(model, box_ / "out", options); });
  EXPECT_EQ(stopped.fault(), Fault::stopped);
  EXPECT_FALSE(fs::exists(box_ / "out"));
  const fs::path begun = box_ / ".out.tailor-merge";
  ASSERT_TRUE(fs::exists(begun / "merge.journal"));
  // As a crash leaves it: the last line cut, and bytes of what the journal does not name wrong.
  const std::string journal = read_text(begun / "merge.journal");
  const std::size_t lines =
      static_cast<std::size_t>(std::count(journal.begin(), journal.end(), '\n'));
  std::size_t keep = 0;
  for (std::size_t i = 0; i < (lines + 1) / 2; ++i) keep = journal.find('\n', keep) + 1;
  write_atomically(begun / "merge.journal", journal.substr(0, keep) + "{\"job\": 3");
  options.stop = nullptr;
  const MergeReport report = merge_adapters(model, box_ / "out", options);
  EXPECT_EQ(report.jobs_before, static_cast<std::int64_t>((lines + 1) / 2) - 1);
  EXPECT_EQ(merged_files(box_ / "out"), merged_files(box_ / "whole"));
  Json ours = read_json(box_ / "out" / kReceiptName),
       theirs = read_json(box_ / "whole" / kReceiptName);
  ours.erase("run");
  theirs.erase("run");
  EXPECT_EQ(ours, theirs);
  EXPECT_FALSE(fs::exists(begun));
  // A third call finds it whole.
  EXPECT_TRUE(merge_adapters(model, box_ / "out", options).was_complete);
}

TEST_F(MergeTest, a_begun_merge_of_something_else_is_left_alone) {
  const fs::path model = golden("llama_tiny") / "model";
  const fs::path adapter = golden("llama_tiny") / "lora/adapter_final";
  MergeOptions options = one_adapter(adapter);
  options.stop = [] { return true; };
  EXPECT_EQ(error_of([&] { merge_adapters(model, box_ / "out", options); }).fault(),
            Fault::stopped);
  const auto before = merged_files(box_ / ".out.tailor-merge");
  const Error error = error_of([&] {
    merge_adapters(model, box_ / "out", one_adapter(golden("llama_tiny") / "lora/adapter_init"));
  });
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_THAT(error.parts().what, HasSubstr("another merge was begun here"));
  EXPECT_EQ(merged_files(box_ / ".out.tailor-merge"), before);
}

TEST_F(MergeTest, the_bytes_do_not_depend_on_threads_or_memory) {
  const fs::path model = golden("llama4_maverick_tiny") / "model";
  const fs::path adapter = golden("llama4_maverick_tiny") / "lora/adapter_final";
  merge(model, adapter, "many");
  MergeOptions options = one_adapter(adapter);
  options.threads = 1;
  merge_adapters(model, box_ / "one", options);
  EXPECT_EQ(merged_files(box_ / "one"), merged_files(box_ / "many"));
}

// ------------------------------------------------------------------ receipts

TEST_F(MergeTest, verify_finds_what_was_changed) {
  const fs::path model = golden("llama4_maverick_tiny") / "model";
  const fs::path adapter = golden("llama4_maverick_tiny") / "lora/adapter_final";
  merge(model, adapter, "out");
  VerifyMergeOptions with;
  with.base = model;
  with.adapters = {adapter};
  EXPECT_THAT(verify_merge(box_ / "out", with).problems, IsEmpty());
  with.base = golden("llama4_scout_tiny") / "model";
  with.adapters = {golden("llama4_maverick_tiny") / "lora/adapter_init"};
  EXPECT_FALSE(verify_merge(box_ / "out", with).problems.empty());

  fs::path shard;
  for (const auto& entry : fs::directory_iterator(box_ / "out")) {
    if (entry.path().extension() == ".safetensors") shard = entry.path();
  }
  std::string text = read_text(shard);
  text[text.size() - 3] = static_cast<char>(text[text.size() - 3] ^ 1);
  write_atomically(shard, text);
  EXPECT_THAT(verify_merge(box_ / "out", {}).problems,
              ElementsAre(HasSubstr("is not as it was written")));
  fs::resize_file(shard, 1000);
  EXPECT_THAT(verify_merge(box_ / "out", {}).problems, ElementsAre(HasSubstr("cut off")));
  fs::remove(shard);
  write_atomically(box_ / "out" / "config.json", "{}");
  EXPECT_EQ(verify_merge(box_ / "out", {}).problems.size(), 2U);
  EXPECT_EQ(error_of([&] { verify_merge(model, {}); }).fault(), Fault::bad_file);
}

// ------------------------------------------------------------------ bad input

TEST_F(MergeTest, refuses_what_would_destroy_or_mislead) {
  const fs::path model = golden("llama_tiny") / "model";
  const fs::path adapter = golden("llama_tiny") / "lora/adapter_final";
  // The base itself.
  const fs::path copy = copy_of("llama_tiny");
  const auto before = merged_files(copy);
  Error error = error_of([&] { merge_adapters(copy, copy / "", one_adapter(adapter)); });
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_THAT(error.parts().what, HasSubstr("over the base"));
  EXPECT_EQ(merged_files(copy), before);
  // A folder that holds something.
  make_folders(box_ / "full");
  write_atomically(box_ / "full" / "notes.txt", "mine");
  error = error_of([&] { merge_adapters(model, box_ / "full", one_adapter(adapter)); });
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_THAT(error.parts().what, HasSubstr("not empty"));
  EXPECT_EQ(read_text(box_ / "full" / "notes.txt"), "mine");
  // An empty one is taken.
  make_folders(box_ / "empty");
  merge_adapters(model, box_ / "empty", one_adapter(adapter));
  // Another model's adapter.
  error = error_of([&] {
    merge_adapters(golden("deepseek_v3_tiny") / "model", box_ / "x", one_adapter(adapter));
  });
  EXPECT_EQ(error.fault(), Fault::bad_file);
  // Too little memory, and how much is enough.
  MergeOptions little = one_adapter(adapter);
  little.memory_bytes_max = 1 << 20;
  error = error_of([&] { merge_adapters(model, box_ / "x", little); });
  EXPECT_EQ(error.fault(), Fault::does_not_fit);
  EXPECT_THAT(error.parts().mend, HasSubstr("MiB or more"));
  EXPECT_FALSE(fs::exists(box_ / "x"));
  EXPECT_FALSE(fs::exists(box_ / ".x.tailor-merge"));
}

TEST_F(MergeTest, asks_which_base_where_training_saw_other_numbers) {
  const fs::path model = golden("llama4_maverick_tiny") / "model";
  const ModelSpec spec = read_model_spec(model);
  const std::string known = fingerprint(Checkpoint::open(model), spec);
  make_adapter(box_ / "adapter", spec, {"experts"}, 0.05, 1, {}, known);
  MergeOptions options = one_adapter(box_ / "adapter");
  merge_adapters(model, box_ / "plain", options);
  write_base_record(box_ / "adapter", {"int4", "as_is"});
  const Error asked = error_of([&] { merge_adapters(model, box_ / "x", options); });
  EXPECT_EQ(asked.fault(), Fault::usage);
  EXPECT_THAT(asked.parts().what, HasSubstr("experts in int4, the rest as published"));
  options.onto = MergeOptions::Onto::original;
  merge_adapters(model, box_ / "original", options);
  EXPECT_EQ(merged_files(box_ / "original"), merged_files(box_ / "plain"));
  const Json receipt = read_json(box_ / "original" / kReceiptName);
  EXPECT_EQ(receipt["onto"], "original");
  EXPECT_EQ(receipt["adapters"][0]["trained_on"]["fingerprint"], known);
  EXPECT_EQ(receipt["base"]["fingerprint"], known);

  make_adapter(box_ / "foreign", spec, {"experts"}, 0.05, 1, {}, std::string(64, 'a'));
  const Error wrong =
      error_of([&] { merge_adapters(model, box_ / "x", one_adapter(box_ / "foreign")); });
  EXPECT_EQ(wrong.fault(), Fault::bad_file);
  EXPECT_THAT(wrong.parts().what, HasSubstr("trained on another base"));
  EXPECT_FALSE(fs::exists(box_ / "x"));
}

TEST_F(MergeTest, refuses_nan_in_the_base_and_paths_that_lead_out) {
  const fs::path model = copy_of("llama_tiny");
  const fs::path adapter = golden("llama_tiny") / "lora/adapter_final";
  const Checkpoint checkpoint = Checkpoint::open(model);
  const Checkpoint::Tensor& tensor = checkpoint.find("model.layers.0.self_attn.q_proj.weight");
  std::string text = read_text(checkpoint.shard_path(tensor));
  const float nan = std::nanf("");
  std::memcpy(text.data() + tensor.info.offset + 4 * 70, &nan, sizeof nan);
  write_atomically(checkpoint.shard_path(tensor), text);
  Error error = error_of([&] { merge_adapters(model, box_ / "x", one_adapter(adapter)); });
  EXPECT_EQ(error.fault(), Fault::bad_file);
  EXPECT_THAT(error.parts().where, HasSubstr("q_proj.weight"));
  EXPECT_THAT(error.parts().where, HasSubstr("row 1, column 6"));
  EXPECT_FALSE(fs::exists(box_ / "x"));

  const fs::path led_out = copy_of("qwen2_tiny");
  Json index = read_json(led_out / "model.safetensors.index.json");
  for (auto& [name, file] : index["weight_map"].items()) {
    file = "../" + file.get<std::string>();
    break;
  }
  write_atomically(led_out / "model.safetensors.index.json", index.dump());
  error = error_of([&] {
    merge_adapters(led_out, box_ / "y", one_adapter(golden("qwen2_tiny") / "lora/adapter_final"));
  });
  EXPECT_EQ(error.fault(), Fault::bad_file);
}

// ------------------------------------------------------------------ the sums

TEST(LowRank, every_level_gives_the_same_bits) {
  const LowRankLevels levels = runnable_low_rank_levels();
  constexpr std::int64_t kRows = 7, kColumns = 83, kTerms = 5;
  std::vector<float> base(kRows * kColumns), vectors(kTerms * kColumns),
      coefficients(kRows * kTerms);
  std::uint32_t state = 5;
  const auto draw = [&](std::vector<float>& values) {
    for (float& value : values) {
      state = state * 1664525U + 1013904223U;
      value = static_cast<float>(state >> 8U) * 0x1p-24F - 0.5F;
    }
  };
  draw(base);
  draw(vectors);
  draw(coefficients);
  std::vector<const float*> pointers;
  for (std::int64_t t = 0; t < kTerms; ++t) pointers.push_back(vectors.data() + t * kColumns);
  std::vector<std::uint16_t> narrow_base;
  for (const float value : base) narrow_base.push_back(bf16_from_float(value));
  for (const bool from_bf16 : {false, true}) {
    for (const bool to_bf16 : {false, true}) {
      std::vector<std::byte> wanted;
      for (int level = 0; level < levels.count; ++level) {
        std::vector<std::byte> out(kRows * kColumns * 4);
        RowsToMerge work;
        work.base = from_bf16 ? static_cast<const void*>(narrow_base.data()) : base.data();
        work.base_number = from_bf16 ? RowsToMerge::Number::bf16 : RowsToMerge::Number::f32;
        work.out_number = to_bf16 ? RowsToMerge::Number::bf16 : RowsToMerge::Number::f32;
        work.out = out.data();
        work.rows = kRows;
        work.columns = kColumns;
        work.terms = kTerms;
        work.coefficients = coefficients.data();
        work.vectors = pointers.data();
        MergeSums sums;
        levels.levels[level].kernels->merge(work, &sums);
        // The plain truth, one number after another.
        double kept = 0;
        for (std::int64_t i = 0; i < kRows * kColumns; ++i) {
          float delta = 0;
          for (std::int64_t t = 0; t < kTerms; ++t) {
            const float product =
                coefficients[static_cast<std::size_t>(i / kColumns * kTerms + t)] *
                vectors[static_cast<std::size_t>(t * kColumns + i % kColumns)];
            delta = delta + product;
          }
          const float b = from_bf16 ? bf16_to_float(narrow_base[static_cast<std::size_t>(i)])
                                    : base[static_cast<std::size_t>(i)];
          float stored = b + delta;
          if (to_bf16) {
            const std::uint16_t bits = bf16_from_float(stored);
            std::uint16_t found = 0;
            std::memcpy(&found, out.data() + 2 * i, sizeof found);
            ASSERT_EQ(found, bits) << levels.levels[level].name << " " << i;
            stored = bf16_to_float(bits);
          } else {
            float found = 0;
            std::memcpy(&found, out.data() + 4 * i, sizeof found);
            ASSERT_EQ(found, stored) << levels.levels[level].name << " " << i;
          }
          kept += static_cast<double>(stored - b) * static_cast<double>(delta);
        }
        EXPECT_NEAR(sums.kept, kept, 1e-4 * std::fabs(kept));
        if (level == 0) wanted = out;
        EXPECT_EQ(out, wanted);
      }
    }
  }
}

}  // namespace
}  // namespace tailor
