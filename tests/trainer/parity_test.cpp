// Numbers from transformers and PEFT (tests/golden/README.md says how they were made and which
// tolerances hold). Every comparison leaves padding out.

#include <gtest/gtest.h>
#include <unistd.h>

#include "base/json.h"
#include "tests/support/fixture.h"
#include "trainer/optim/adamw.h"

namespace tailor {
namespace {

using namespace testing_support;

constexpr double kLossRelative = 1e-5, kLogitsAbsolute = 2e-5, kHiddenAbsolute = 5e-5;
constexpr double kGradientRelative = 1e-4, kTrajectoryLoss = 1e-5, kTrajectoryNorm = 1e-4;
constexpr double kFinalFactorRelative = 1e-3;

/// Rows of a fixture tensor [rows, width, ...] at the kept (non-padding) places.
at::Tensor kept_rows(const at::Tensor& tensor, const Tokens& tokens) {
  const at::Tensor flat = tensor.flatten(0, 1);
  return flat.index_select(0, at::tensor(tokens.kept, at::kLong));
}

double worst(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

struct ForwardCase {
  std::string model;     ///< folder with model/
  std::string expected;  ///< folder with batches and expected_forward
};

class ForwardParity : public testing::TestWithParam<ForwardCase> {};

TEST_P(ForwardParity, hidden_states_routing_logits_and_loss_equal_transformers) {
  TinyModel model = load_tiny(golden(GetParam().model) / "model", at::kFloat);
  const Tokens tokens = fixture_tokens(golden(GetParam().expected), {0});
  const auto expected = load_tensors(golden(GetParam().expected) / "expected_forward.safetensors");
  const Trace trace = model.decoder->trace(tokens.input());

  for (std::size_t i = 0; i < trace.hidden_TD.size(); ++i) {
    const at::Tensor want = kept_rows(expected.at("hidden." + std::to_string(i)), tokens);
    EXPECT_LE(worst(trace.hidden_TD[i], want), kHiddenAbsolute) << "hidden." << i;
  }
  EXPECT_EQ(trace.hidden_TD.size(), model.spec.layers.size() + 1);
  EXPECT_LE(worst(trace.logits_TV, kept_rows(expected.at("logits"), tokens)), kLogitsAbsolute);

  int routed = 0;
  for (const auto& [name, tensor] : expected) {
    if (!name.starts_with("route_index.") && !name.starts_with("route_weight.")) continue;
    const bool index = name.starts_with("route_index.");
    const std::string layer_text = name.substr(name.find("layers.") + 7);
    const auto layer = static_cast<std::size_t>(std::stoi(layer_text));
    const auto K = static_cast<std::size_t>(model.spec.experts_per_token);
    for (std::size_t t = 0; t < tokens.kept.size(); ++t) {
      // The fixture's choices are sorted by expert, ours by rank.
      std::vector<std::pair<std::int32_t, double>> chosen;
      for (std::size_t k = 0; k < K; ++k) {
        chosen.emplace_back(trace.expert[layer][t * K + k], trace.gate[layer][t * K + k]);
      }
      std::sort(chosen.begin(), chosen.end());
      const at::Tensor value = tensor[tokens.kept[t]].flatten();
      ASSERT_EQ(value.numel(), model.spec.experts_per_token);
      for (std::size_t k = 0; k < K; ++k) {
        const auto at = static_cast<std::int64_t>(k);
        if (index) {
          EXPECT_EQ(chosen[k].first, value[at].item<std::int64_t>()) << name << " " << t;
        } else {
          EXPECT_NEAR(chosen[k].second, value[at].item<double>(), 1e-5) << name << " " << t;
        }
      }
    }
    ++routed;
  }
  EXPECT_EQ(routed > 0, model.spec.moe_layer_count() > 0);

  const LossResult loss = model.decoder->evaluate(tokens.input());
  const double want = expected.at("loss").item<double>();
  EXPECT_NEAR(loss.loss_sum / static_cast<double>(loss.tokens) / want, 1, kLossRelative);
}

INSTANTIATE_TEST_SUITE_P(
    Models, ForwardParity,
    testing::Values(ForwardCase{"llama_tiny", "llama_tiny"},
                    ForwardCase{"qwen2_tiny", "qwen2_tiny"},
                    ForwardCase{"deepseek_v3_tiny", "deepseek_v3_tiny"},
                    ForwardCase{"llama4_maverick_tiny", "llama4_maverick_tiny"},
                    ForwardCase{"llama4_scout_tiny", "llama4_scout_tiny"},
                    ForwardCase{"llama4_conditional_tiny", "llama4_maverick_tiny"}),
    [](const auto& parameter) { return parameter.param.model; });

class TrainingParity : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const bool all = GetParam() == "deepseek_v3_tiny_all";
    model_folder_ = golden(GetParam() == "llama4_router_tiny" ? "llama4_maverick_tiny"
                           : all                              ? "deepseek_v3_tiny"
                                                              : GetParam());
    lora_folder_ = all ? model_folder_ / "lora_all" : golden(GetParam()) / "lora";
    model_ = load_tiny(model_folder_ / "model", at::kFloat);
    adapter_ =
        std::make_unique<Adapter>(read_peft_adapter(lora_folder_ / "adapter_init", model_.spec));
    gradients_ = at::zeros({adapter_->parameter_count()});
  }

  LossResult run(const Tokens& tokens, Activations keep = Activations::kept) {
    model_.decoder->set_adapter(adapter_.get());
    gradients_.zero_();
    TrainPass pass;
    pass.gradient_scale = 1 / static_cast<double>(tokens.trained);
    pass.keep = keep;
    return model_.decoder->forward_backward(tokens.input(), pass, gradients_);
  }

  std::span<float> gradients() {
    return {gradients_.data_ptr<float>(), static_cast<std::size_t>(gradients_.numel())};
  }

  /// Writes factors or gradients as a PEFT folder and compares tensor by tensor with `expected`.
  void expect_tensors(std::span<const float> values, const fs::path& expected, double limit) {
    Adapter copy = *adapter_;
    std::copy(values.begin(), values.end(), copy.factors().begin());
    const fs::path folder =
        fs::path(testing::TempDir()) / ("parity_" + GetParam() + std::to_string(::getpid()));
    write_peft_adapter(folder, copy, model_.spec, {"base", ""});
    const auto got = load_tensors(folder / "adapter_model.safetensors"),
               want = load_tensors(expected);
    ASSERT_EQ(got.size(), want.size());
    for (const auto& [name, tensor] : want) {
      ASSERT_TRUE(got.contains(name)) << name;
      ASSERT_EQ(got.at(name).sizes(), tensor.sizes()) << name;
      EXPECT_LE(relative_norm(got.at(name), tensor), limit) << name;
    }
    fs::remove_all(folder);
  }

  fs::path model_folder_, lora_folder_;
  TinyModel model_;
  std::unique_ptr<Adapter> adapter_;
  at::Tensor gradients_;
};

TEST_P(TrainingParity, first_step_gradient_of_every_factor_equals_peft) {
  run(fixture_tokens(model_folder_, {0}));
  expect_tensors(gradients(), lora_folder_ / "expected_grads_step0.safetensors", kGradientRelative);
}

TEST_P(TrainingParity, global_batch_gradient_does_not_depend_on_micro_batches) {
  Tokens four = fixture_tokens(model_folder_, {0, 1, 2, 3});
  for (const Activations keep : {Activations::kept, Activations::recomputed}) {
    run(four, keep);
    expect_tensors(gradients(), lora_folder_ / "expected_grads_global_batch.safetensors",
                   kGradientRelative);
  }
  Tokens one = four;  // the same tokens as a single micro-batch
  one.micro_batch_start = {0, static_cast<std::int32_t>(one.ids.size())};
  run(one);
  expect_tensors(gradients(), lora_folder_ / "expected_grads_global_batch.safetensors",
                 kGradientRelative);
}

TEST_P(TrainingParity, recomputing_activations_gives_the_same_bits) {
  const Tokens tokens = fixture_tokens(model_folder_, {0, 1, 2, 3});
  const LossResult kept = run(tokens, Activations::kept);
  const at::Tensor first = gradients_.clone();
  const LossResult recomputed = run(tokens, Activations::recomputed);
  EXPECT_EQ(kept.losses, recomputed.losses);
  EXPECT_TRUE(at::equal(first, gradients_));
}

TEST_P(TrainingParity, twelve_steps_follow_pefts_losses_norms_and_end_in_its_factors) {
  const Json expected = read_json(lora_folder_ / "expected.json");
  const JsonReader settings(expected.at("optimizer"), "optimizer");
  AdamWOptions options;
  options.beta1 = expected.at("optimizer").at("betas")[0];
  options.beta2 = expected.at("optimizer").at("betas")[1];
  options.epsilon = settings.number("eps");
  options.weight_decay = settings.number("weight_decay");
  AdamW optimizer(*adapter_, options);
  for (const Json& step : expected.at("trajectory")) {
    const LossResult loss =
        run(fixture_tokens(model_folder_, {step.at("batch").get<std::int64_t>()}));
    const double norm = gradient_norm(gradients());
    EXPECT_NEAR(loss.loss_sum / static_cast<double>(loss.tokens) / step.at("loss").get<double>(), 1,
                kTrajectoryLoss);
    EXPECT_NEAR(norm / step.at("grad_norm").get<double>(), 1, kTrajectoryNorm);
    optimizer.step(adapter_->factors(), gradients(), settings.number("lr"),
                   clip_factor(norm, settings.number("clip_grad_norm")));
  }
  expect_tensors(adapter_->factors(), lora_folder_ / "adapter_final/adapter_model.safetensors",
                 kFinalFactorRelative);
}

INSTANTIATE_TEST_SUITE_P(Models, TrainingParity,
                         testing::Values("llama_tiny", "qwen2_tiny", "llama4_maverick_tiny",
                                         "llama4_router_tiny", "deepseek_v3_tiny",
                                         "deepseek_v3_tiny_all"),
                         [](const auto& parameter) { return parameter.param; });

}  // namespace
}  // namespace tailor
