// What an adapter's files say about it, against products formed in full.

#include "adapters/inspect.h"

#include <gmock/gmock.h>

#include <cmath>

#include "adapters/peft_files.h"
#include "adapters_support.h"
#include "base/error.h"
#include "base/json.h"

namespace tailor {
namespace {

using namespace testing_support;
using testing::HasSubstr;

/// scale B A of every expert by the formula, one after the other.
std::vector<double> product(const AdaptedMatrix& matrix) {
  const LoadedFactors factors = matrix.load();
  std::vector<double> out;
  for (std::int64_t e = 0; e < matrix.experts; ++e) {
    for (std::int64_t o = 0; o < matrix.out; ++o) {
      for (std::int64_t i = 0; i < matrix.in; ++i) {
        double sum = 0;
        for (std::int64_t r = e * matrix.rank; r < (e + 1) * matrix.rank; ++r) {
          sum += static_cast<double>(factors.b[static_cast<std::size_t>(r * matrix.out + o)]) *
                 static_cast<double>(factors.a[static_cast<std::size_t>(r * matrix.in + i)]);
        }
        out.push_back(matrix.scale * sum);
      }
    }
  }
  return out;
}
double dot(const std::vector<double>& x, const std::vector<double>& y) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}
const AdaptedMatrix& find(const std::vector<AdaptedMatrix>& matrices, const std::string& module) {
  for (const AdaptedMatrix& matrix : matrices) {
    if (matrix.module == module) return matrix;
  }
  throw std::runtime_error("no " + module);
}

class Inspect : public FolderTest {
 protected:
  /// The Maverick fixture's trained adapter, its factors in one of vLLM's layouts.
  fs::path in_layout(const std::string& layout) const {
    const fs::path lora = golden("llama4_maverick_tiny/lora"), to = folder_ / layout;
    make_folders(to);
    fs::copy_file(lora / "adapter_final/adapter_config.json", to / "adapter_config.json");
    fs::copy_file(lora / layout / "adapter_model.safetensors", to / "adapter_model.safetensors");
    return to;
  }
};

const std::string kExperts = "model.layers.1.feed_forward.experts";

TEST_F(Inspect, finds_every_matrix_with_its_place_rank_and_scale) {
  const PeftFolder folder(golden("llama4_maverick_tiny/lora/adapter_final"));
  const auto matrices = matrices_as_stored(folder);
  EXPECT_EQ(matrices.size(), 32U);
  const AdaptedMatrix& q = find(matrices, "model.layers.2.self_attn.q_proj");
  EXPECT_EQ(q.layer, 2);
  EXPECT_EQ(q.target, "self_attn.q_proj");
  EXPECT_EQ(q.experts, 1);
  EXPECT_EQ(q.rank, 4);
  EXPECT_EQ(q.alpha, 8);
  EXPECT_EQ(q.scale, 2);
  const AdaptedMatrix& gate_up = find(matrices, kExperts + ".gate_up_proj");
  EXPECT_EQ(gate_up.experts, 8);
  EXPECT_EQ(gate_up.target, "feed_forward.experts.gate_up_proj");
  EXPECT_EQ(gate_up.rank, 4);
  EXPECT_EQ(gate_up.parameters, 8 * 4 * (64 + 96));
  std::int64_t parameters = 0;
  for (const AdaptedMatrix& matrix : matrices) parameters += matrix.parameters;
  EXPECT_EQ(parameters, 31104);
}

TEST_F(Inspect, norms_are_those_of_the_products) {
  for (const char* adapter :
       {"llama4_maverick_tiny/lora/adapter_final", "qwen2_tiny/lora/adapter_final",
        "deepseek_v3_tiny/lora/adapter_final"}) {
    const PeftFolder folder(golden(adapter));
    for (const AdaptedMatrix& matrix : matrices_as_stored(folder)) {
      const auto full = product(matrix);
      const ChangeOfMatrix change = change_of(matrix);
      EXPECT_NEAR(change.norm, std::sqrt(dot(full, full)), 1e-9 * change.norm) << matrix.module;
      EXPECT_EQ(change.experts_used, matrix.experts);
      EXPECT_GT(change.norm, 0);
    }
  }
}

TEST_F(Inspect, layouts_of_one_adapter_have_one_norm) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  const PeftFolder fused(golden("llama4_maverick_tiny/lora/adapter_final"));
  const PeftFolder one_by_one(in_layout("adapter_vllm_2d")), straight(in_layout("adapter_vllm_3d"));
  const auto a = matrices_as_stored(fused), b = matrices_as_stored(one_by_one),
             c = matrices_as_stored(straight);
  const double gate_up = change_of(find(a, kExperts + ".gate_up_proj")).norm;
  const double gate = change_of(find(b, kExperts + ".gate_proj")).norm;
  const double up = change_of(find(b, kExperts + ".up_proj")).norm;
  EXPECT_NEAR(std::hypot(gate, up), gate_up, 1e-6 * gate_up);
  EXPECT_NEAR(change_of(find(c, kExperts + ".gate_up_proj")).norm, gate_up, 1e-6 * gate_up);
  EXPECT_EQ(find(b, kExperts + ".gate_proj").experts, 8);
  // As the model has them they are the same matrices, and the same changes.
  const PeftReader read_a(golden("llama4_maverick_tiny/lora/adapter_final"), spec),
      read_b(folder_ / "adapter_vllm_2d", spec), read_c(folder_ / "adapter_vllm_3d", spec);
  for (const PeftReader* other : {&read_b, &read_c}) {
    const AdapterDifference difference =
        compare(matrices_of_model(read_a), matrices_of_model(*other), "FILE");
    EXPECT_EQ(difference.matrices.size(), 32U);
    EXPECT_TRUE(difference.only_here.empty() && difference.only_there.empty());
    EXPECT_LT(difference.relative, 1e-6);
    EXPECT_NEAR(difference.cosine, 1, 1e-9);
  }
  // As stored their sides differ, and that is an error, never a number.
  for (const auto* other : {&b, &c}) {
    try {
      compare(a, *other, "FILE");
      FAIL();
    } catch (const Error& error) {
      EXPECT_THAT(to_text(error), HasSubstr("the two adapters have other shapes at " + kExperts));
    }
  }
}

TEST_F(Inspect, two_adapters_are_compared_as_vectors) {
  const PeftFolder x(golden("deepseek_v3_tiny/lora/adapter_final")),
      y(golden("deepseek_v3_tiny/lora/adapter_init"));
  const auto here = matrices_as_stored(x), there = matrices_as_stored(y);
  const AdapterDifference difference = compare(here, there, "FILE");
  ASSERT_EQ(difference.matrices.size(), here.size());
  double xx = 0, yy = 0, xy = 0;
  for (std::size_t i = 0; i < here.size(); ++i) {
    const auto a = product(here[i]), b = product(there[i]);
    const double aa = dot(a, a), bb = dot(b, b), ab = dot(a, b);
    EXPECT_NEAR(difference.matrices[i].cosine, ab / std::sqrt(aa * bb), 1e-9);
    EXPECT_NEAR(difference.matrices[i].relative, std::sqrt((aa + bb - 2 * ab) / bb), 1e-9);
    xx += aa;
    yy += bb;
    xy += ab;
  }
  EXPECT_NEAR(difference.cosine, xy / std::sqrt(xx * yy), 1e-9);
  EXPECT_NEAR(difference.relative, std::sqrt((xx + yy - 2 * xy) / yy), 1e-9);
  EXPECT_LT(difference.cosine, 0.99);
  const AdapterDifference same = compare(here, here, "FILE");
  EXPECT_EQ(same.relative, 0);
  EXPECT_NEAR(same.cosine, 1, 1e-12);
}

TEST_F(Inspect, matrices_of_one_adapter_alone_count_in_the_whole) {
  const PeftFolder folder(golden("llama_tiny/lora/adapter_final"));
  const auto all = matrices_as_stored(folder);
  std::vector<AdaptedMatrix> half(all.begin(), all.begin() + 5);
  const AdapterDifference difference = compare(half, all, "FILE");
  EXPECT_EQ(difference.matrices.size(), 5U);
  EXPECT_EQ(difference.only_there.size(), all.size() - 5);
  double inside = 0, whole = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const double norm = change_of(all[i]).norm;
    whole += norm * norm;
    if (i < 5) inside += norm * norm;
  }
  EXPECT_NEAR(difference.relative, std::sqrt((whole - inside) / whole), 1e-9);
  EXPECT_EQ(compare(all, half, "FILE").only_here.size(), all.size() - 5);
}

TEST_F(Inspect, experts_without_a_change_are_not_counted) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  LoraOptions options;
  options.expert_rank = 2;
  options.targets = {"experts.down_proj", "q_proj"};
  options.chosen_experts = {{1, {2, 5}}, {3, {0}}};
  Adapter adapter = Adapter::create(spec, options, 3);
  std::fill(adapter.factors().begin(), adapter.factors().end(), 0.5F);
  write_peft_adapter(folder_, adapter, spec, {});
  const PeftFolder folder(folder_);
  const auto matrices = matrices_as_stored(folder);
  const AdaptedMatrix& down = find(matrices, kExperts + ".down_proj");
  EXPECT_EQ(down.rank, 2) << "of the config's pattern: alone in its module, the file has no E";
  EXPECT_EQ(change_of(down).experts_used, 2);
  EXPECT_EQ(change_of(find(matrices, "model.layers.3.feed_forward.experts.down_proj")).experts_used,
            1);
}

TEST_F(Inspect, says_what_is_wrong_with_ranks_and_numbers) {
  const fs::path folder = in_layout("adapter_vllm_3d");
  const auto refusal = [&]() -> std::string {
    try {
      const PeftFolder files(folder);
      for (const AdaptedMatrix& matrix : matrices_as_stored(files)) change_of(matrix);
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::bad_file);
      return to_text(error);
    }
    return "no error";
  };
  EXPECT_EQ(refusal(), "no error");
  Json config = read_json(folder / "adapter_config.json");
  config["rank_pattern"] = {{"experts.gate_up_proj", 3}};
  write_atomically(folder / "adapter_config.json", config.dump());
  EXPECT_THAT(refusal(), HasSubstr("factors of shape [32, 64] and [96, 32] are no pair of rank 3"));
}

TEST(Bars, one_character_a_layer) {
  EXPECT_EQ(bars({-1, 0, 0.1, 1, 4, 8, 7.01}), "·0▁▁▄██");
  EXPECT_EQ(bars({0, 0}), "00");
  EXPECT_EQ(bars({-1}), "·");
  EXPECT_EQ(bars({}), "");
}

}  // namespace
}  // namespace tailor
