#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <optional>
#include <string>

#include "base/clock.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"
#include "recipes/model_facts.h"
#include "recipes/plan_text.h"
#include "recipes/step_cost.h"
#include "tools/compute/measure_step.h"
#include "tools/compute/others_busy.h"
#include "tools/compute/setup.h"
#include "tools/compute_verbs.h"
#include "tools/planning.h"
#include "tools/step_memo.h"
#include "trainer/models/decoder.h"

namespace tailor {
namespace {

/// Best of several rounds of [1024, 1024] x [1024, 2048], in GFLOP/s.
double product_gflops(at::ScalarType dtype) {
  constexpr std::int64_t M = 1024, N = 2048, K = 1024;
  const at::Tensor a = at::ones({M, K}, dtype), b = at::ones({N, K}, dtype);
  at::Tensor c = at::empty({M, N}, dtype);
  at::mm_out(c, a, b.t());
  double best = 0;
  for (int round = 0; round < 12; ++round) {
    const double began = seconds_now();
    at::mm_out(c, a, b.t());
    best = std::max(best, 2e-9 * static_cast<double>(M * N * K) / (seconds_now() - began));
  }
  return best;
}

/// A dense decoder of three layers as small as people try things on. Larger ones spend less of
/// their time outside matrix products, so what is measured on it is what a run reaches at least.
ModelSpec small_spec() {
  ModelSpec spec;
  spec.architecture = "LlamaForCausalLM";
  spec.hidden = 576;
  spec.heads = 9;
  spec.kv_heads = 3;
  spec.head_dim = 64;
  spec.vocab = 4096;
  spec.dense_width = 1536;
  spec.positions_max = 2048;
  spec.layers.resize(3);
  return spec;
}

ModelWeights random_weights(const ModelSpec& spec, at::ScalarType dtype) {
  const auto matrix = [&](std::int64_t out, std::int64_t in) {
    return at::randn({out, in}, at::kFloat).mul_(0.02).to(dtype);
  };
  const std::int64_t D = spec.hidden, Q = spec.query_width(), F = spec.dense_width;
  const at::Tensor ones_D = at::ones({D}, dtype);
  ModelWeights weights{matrix(spec.vocab, D), matrix(spec.vocab, D), ones_D, {}};
  for (std::size_t l = 0; l < spec.layers.size(); ++l) {
    LayerWeights layer;
    layer.input_norm_D = layer.post_norm_D = ones_D;
    layer.qkv_OD = matrix(Q + 2 * spec.kv_width(), D);
    layer.o_DO = matrix(D, Q);
    layer.gate_up_OD = matrix(2 * F, D);
    layer.down_DF = matrix(D, F);
    weights.layers.push_back(std::move(layer));
  }
  return weights;
}

/// What a training step reaches, in GFLOP/s of token_flops(): the best of some steps of 1,024
/// tokens, forward and backward, rank 8 on every matrix.
double step_gflops(at::ScalarType dtype) {
  constexpr std::int64_t kTokens = 1024, kDocument = 128;
  Recipe recipe;
  recipe.lora.targets = {};
  recipe.lora.targets.attention = recipe.lora.targets.dense_mlp = true;
  recipe.data.sequence_len = kDocument;
  const ModelSpec spec = small_spec();
  const double flops =
      static_cast<double>(kTokens) * token_flops(recipe, model_facts(spec, "small"), true).total();

  LoraOptions lora;
  lora.targets = {"attention", "dense_mlp"};
  const Adapter adapter = Adapter::create(spec, lora, 1);
  const auto decoder = Decoder::create(resident_weights(spec, random_weights(spec, dtype)), dtype);
  decoder->set_adapter(&adapter);
  std::vector<std::int32_t> ids, position, target, document_start;
  for (std::int32_t t = 0; t < kTokens; ++t) {
    if (t % kDocument == 0) document_start.push_back(t);
    ids.push_back(t * 7 % static_cast<std::int32_t>(spec.vocab));
    position.push_back(t % static_cast<std::int32_t>(kDocument));
    target.push_back(t * 11 % static_cast<std::int32_t>(spec.vocab));
  }
  document_start.push_back(kTokens);
  const std::vector<std::int32_t> micro_batch_start = {0, kTokens};
  const TokenInput input{ids, position, target, document_start, micro_batch_start, {}};
  TrainPass pass;
  pass.gradient_scale = 1.0 / kTokens;
  const at::Tensor gradients = at::zeros({adapter.parameter_count()}, at::kFloat);
  double best = std::numeric_limits<double>::infinity();
  for (int step = 0; step < 4; ++step) {  // the first warms up: kernels are compiled, pages touched
    const double began = seconds_now();
    decoder->forward_backward(input, pass, gradients);
    if (step > 0) best = std::min(best, seconds_now() - began);
  }
  return 1e-9 * flops / best;
}

/// What was measured before, where the machine was quiet then.
bool quiet_before() {
  const std::optional<MachineCalibration> before = MachineCalibration::read();
  return before && before->busy_share <= kBusyShare;
}

int calibrate_recipe(const CalibrateArguments& arguments) {
  const ResolvedRecipe resolved = resolve_recipe(arguments.recipe, arguments.overrides);
  const Recipe& recipe = resolved.file.recipe;
  const MeasuredStep step = measure_recipe_step(resolved);
  const bool busy = step.busy_share > kBusyShare;
  if (!remember_step(recipe, resolved.facts, step)) {
    log_warning("others kept the machine busy: what was measured on a quiet machine stays (" +
                step_memo_path(recipe, resolved.facts).string() + ")");
  }
  if (arguments.json) {
    std::printf("%s\n", to_json(step).dump().c_str());
    return 0;
  }
  std::printf("%s%s\n", step.source().c_str(),
              busy ? "; others kept the machine busy: measure again later" : "");
  std::printf("a step of %s tokens: layers %s forward, %s backward, head %s, update %s\n",
              whole(step.tokens).c_str(), seconds_text(step.forward_seconds()).c_str(),
              seconds_text(step.backward_seconds()).c_str(),
              seconds_text(step.head_seconds).c_str(), seconds_text(step.update_seconds).c_str());
  std::printf("the disk reads %s/s%s\n", gb(step.disk_bytes_per_second).c_str(),
              step.stream
                  ? (", and a step that reads takes " + number_text(step.stream->over(), 3) +
                     " times the longer of computing and reading")
                        .c_str()
                  : "");
  return 0;
}

}  // namespace

int run_calibrate(const CalibrateArguments& arguments) {
  if (!arguments.recipe.empty()) return calibrate_recipe(arguments);
  const bool json = arguments.json;
  const int threads = set_threads(0);
  const OthersBusy others;
  const double product_bf16 = product_gflops(at::kBFloat16),
               product_f32 = product_gflops(at::kFloat);
  const double step_bf16 = step_gflops(at::kBFloat16), step_f32 = step_gflops(at::kFloat);
  const double busy = others.share();
  const Json out = {{"gflops_bfloat16", step_bf16},
                    {"gflops_float32", step_f32},
                    {"matmul_gflops_bfloat16", product_bf16},
                    {"matmul_gflops_float32", product_f32},
                    {"threads", threads},
                    {"busy_share", busy},
                    {"measured", utc_text(RealClock().unix_ms())}};
  make_folders(cache_folder());
  if (busy > kBusyShare && quiet_before()) {
    log_warning("others kept the machine busy: " + MachineCalibration::path().string() +
                " stays as it was measured on a quiet machine");
  } else {
    write_atomically(MachineCalibration::path(), out.dump(2) + "\n");
  }
  if (json) {
    std::printf("%s\n", out.dump().c_str());
    return 0;
  }
  const auto line = [](const char* dtype, double step, double product) {
    std::printf("%s: training steps %s GFLOP/s, bare matrix products %s GFLOP/s\n", dtype,
                number_text(step, 3).c_str(), number_text(product, 3).c_str());
  };
  std::printf("with %d threads%s\n", threads,
              busy > kBusyShare ? ", while others kept the machine busy: measure again later" : "");
  line("bfloat16", step_bf16, product_bf16);
  line("float32", step_f32, product_f32);
  return 0;
}

}  // namespace tailor
