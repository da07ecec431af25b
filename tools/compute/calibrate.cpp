#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <limits>
#include <optional>
#include <string>
#include <thread>

#include "base/clock.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"
#include "recipes/model_facts.h"
#include "recipes/step_cost.h"
#include "tools/compute/setup.h"
#include "tools/compute_verbs.h"
#include "tools/planning.h"
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

struct CpuTimes {
  double busy = 0, all = 0;  ///< of all cores together, in the kernel's ticks
};
CpuTimes cpu_times() {
  std::ifstream stat("/proc/stat");
  std::string label;
  double user = 0, nice = 0, system = 0, idle = 0, io = 0;
  stat >> label >> user >> nice >> system >> idle >> io;
  return {user + nice + system, user + nice + system + idle + io};
}

/// Share of the machine's cores that others keep busy just now.
double busy_share() {
  const CpuTimes before = cpu_times();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const CpuTimes after = cpu_times();
  return after.all > before.all ? (after.busy - before.busy) / (after.all - before.all) : 0;
}

/// What was measured before, where the machine was quiet then.
bool quiet_before() {
  const std::optional<MachineCalibration> before = MachineCalibration::read();
  return before && before->busy_share <= kBusyShare;
}

}  // namespace

int run_calibrate(const CalibrateArguments& arguments) {
  const double busy_before = busy_share();
  const bool json = arguments.json;
  const int threads = set_threads(0);
  const double product_bf16 = product_gflops(at::kBFloat16),
               product_f32 = product_gflops(at::kFloat);
  const double step_bf16 = step_gflops(at::kBFloat16), step_f32 = step_gflops(at::kFloat);
  const double busy = std::max(busy_before, busy_share());
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
