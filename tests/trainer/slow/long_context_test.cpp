// 16,384 positions with YaRN beside transformers and PEFT, which compute them when the test runs:
// the numbers are too many to be kept.

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>

#include "adapters/peft_files.h"
#include "base/json.h"
#include "tests/support/fixture.h"

namespace tailor {
namespace {

using namespace testing_support;

// tests/golden/README.md
constexpr double kLogitsAbsolute = 2e-5, kLossRelative = 1e-5, kGradientRelative = 1e-4;

class LongContext : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) / ("tailor_long_context_" + std::to_string(::getpid()));
    const std::string command = std::string(TAILOR_PYTHON) +
                                " " TAILOR_SOURCE_DIR "/tests/oracle/make_long_context.py " +
                                folder_.string();
    ASSERT_EQ(std::system(command.c_str()), 0) << command;
  }
  void TearDown() override { fs::remove_all(folder_); }

  /// Logits [T, V] with the adapter, of a model whose rope_parameters have `key` changed.
  at::Tensor logits_with(const char* key, const Json& value, const Tokens& tokens) const {
    Json config = read_json(folder_ / "model/config.json");
    config["rope_parameters"][key] = value;
    const ModelSpec spec = model_spec_from_config(config, "config.json");
    const Checkpoint checkpoint = Checkpoint::open(folder_ / "model");
    const auto decoder = Decoder::create(
        resident_weights(spec, load_weights(checkpoint, spec, at::kFloat)), at::kFloat);
    const Adapter adapter = read_peft_adapter(folder_ / "adapter", spec);
    decoder->set_adapter(&adapter);
    return decoder->trace(tokens.input()).logits_TV;
  }

  fs::path folder_;
};

double worst(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

TEST_F(LongContext, yarn_at_16k_equals_transformers_by_position_and_factor) {
  const TinyModel model = load_tiny(folder_ / "model", at::kFloat);
  const RopeSpec& rope = model.spec.rope;
  ASSERT_EQ(rope.kind, RopeSpec::Kind::yarn);
  ASSERT_NE(rope.attention_factor, 1) << "mscale and mscale_all_dim differ";
  const auto expected = load_tensors(folder_ / "expected.safetensors");
  const Tokens tokens = fixture_tokens(folder_, {0});
  ASSERT_EQ(tokens.ids.size(), 16384U);
  ASSERT_EQ(static_cast<double>(tokens.ids.size()), rope.factor * rope.original_positions);

  const Adapter adapter = read_peft_adapter(folder_ / "adapter", model.spec);
  model.decoder->set_adapter(&adapter);
  const at::Tensor logits = model.decoder->trace(tokens.input()).logits_TV;
  const at::Tensor apart = (logits - expected.at("logits")).abs().amax(1);
  EXPECT_LE(apart.max().item<double>(), kLogitsAbsolute)
      << "at position " << apart.argmax().item<std::int64_t>();

  at::Tensor gradients = at::zeros({adapter.parameter_count()});
  TrainPass pass;
  pass.gradient_scale = 1 / static_cast<double>(tokens.trained);
  pass.keep = Activations::recomputed;
  const LossResult loss = model.decoder->forward_backward(tokens.input(), pass, gradients);
  const at::Tensor want = expected.at("losses");
  ASSERT_EQ(loss.losses.size(), static_cast<std::size_t>(want.numel()));
  double loss_worst = 0;
  for (std::int64_t t = 0; t < want.numel(); ++t) {
    const double wanted = want[t].item<double>();
    loss_worst = std::max(loss_worst, std::abs(loss.losses[static_cast<std::size_t>(t)] - wanted));
  }
  EXPECT_LE(loss_worst, 2 * kLogitsAbsolute);
  EXPECT_NEAR(loss.loss_sum / static_cast<double>(loss.tokens) / want.mean().item<double>(), 1,
              kLossRelative);

  Adapter copy = read_peft_adapter(folder_ / "adapter", model.spec);
  std::copy_n(gradients.data_ptr<float>(), gradients.numel(), copy.factors().begin());
  write_peft_adapter(folder_ / "gradients", copy, model.spec, {"base", ""});
  double gradient_worst = 0;
  int compared = 0;
  for (const auto& [name, got] : load_tensors(folder_ / "gradients/adapter_model.safetensors")) {
    ASSERT_TRUE(expected.contains("gradient." + name)) << name;
    const double relative = relative_norm(got, expected.at("gradient." + name));
    EXPECT_LE(relative, kGradientRelative) << name;
    gradient_worst = std::max(gradient_worst, relative);
    ++compared;
  }
  EXPECT_EQ(compared, 2 * 5 * 2) << "A and B of five projections in two layers";
  std::printf("largest differences: logits %.1e, a position's loss %.1e, a gradient %.1e\n",
              apart.max().item<double>(), loss_worst, gradient_worst);

  // What is compared depends on each of the numbers that YaRN is made of, and far more than that.
  for (const auto& [key, value] :
       {std::pair{"mscale", Json(0.6)}, std::pair{"mscale_all_dim", Json(1.0)},
        std::pair{"factor", Json(5.0)}, std::pair{"beta_fast", Json(8)},
        std::pair{"beta_slow", Json(4)}, std::pair{"original_max_position_embeddings", Json(1024)},
        std::pair{"rope_type", Json("default")}}) {
    EXPECT_GT(worst(logits_with(key, value, tokens), logits), 100 * kLogitsAbsolute) << key;
  }
}

}  // namespace
}  // namespace tailor
