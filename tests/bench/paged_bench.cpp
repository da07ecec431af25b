// What paging the state of routed experts costs and saves: steps of a synthetic Llama 4 decoder,
// small but for the factors of its many experts, with the state in memory or on disk.
//
//     bench_paged memory|disk [steps] [rank] [tokens] [scratch folder]
//
// One line a step, then the peak of resident memory and what each kind of it has at the end.

#include <ATen/Parallel.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/random.h"
#include "tests/support/process_memory.h"
#include "trainer/trainer.h"

namespace tailor {
namespace {

/// 12 layers, every other one of 128 experts.
ModelSpec wide_spec() {
  ModelSpec spec;
  spec.family = Family::llama4;
  spec.architecture = "Llama4ForCausalLM";
  spec.hidden = 256;
  spec.heads = 4;
  spec.kv_heads = 2;
  spec.head_dim = 64;
  spec.vocab = 1024;
  spec.dense_width = 512;
  spec.expert_width = 128;
  spec.experts = 128;
  spec.experts_per_token = 1;
  spec.positions_max = 4096;
  spec.rope.pairs = true;
  spec.layers.resize(12);
  for (std::size_t l = 1; l < spec.layers.size(); l += 2) spec.layers[l].moe = true;
  return spec;
}

ModelWeights random_weights(const ModelSpec& spec) {
  const auto random = [](at::IntArrayRef shape) {
    return at::randn(shape, at::kFloat).mul_(0.02).to(at::kBFloat16);
  };
  const std::int64_t D = spec.hidden, Q = spec.query_width(), E = spec.experts;
  const at::Tensor ones_D = at::ones({D}, at::kBFloat16);
  ModelWeights weights{random({spec.vocab, D}), random({spec.vocab, D}), ones_D, {}};
  for (const LayerSpec& kind : spec.layers) {
    LayerWeights layer;
    const std::int64_t F = kind.moe ? spec.expert_width : spec.dense_width;
    layer.input_norm_D = layer.post_norm_D = ones_D;
    layer.qkv_OD = random({Q + 2 * spec.kv_width(), D});
    layer.o_DO = random({D, Q});
    layer.gate_up_OD = random({2 * F, D});
    layer.down_DF = random({D, F});
    if (kind.moe) {
      layer.router_ED = random({E, D});
      layer.experts_gate_up_EDO = random({E, D, 2 * F});
      layer.experts_down_EFD = random({E, F, D});
    }
    weights.layers.push_back(std::move(layer));
  }
  return weights;
}

/// Rows of 128 random tokens, four a micro-batch.
class RandomRows final : public TokenSource {
 public:
  RandomRows(std::int64_t vocab, std::int64_t tokens) : vocab_(vocab), tokens_(tokens) {}
  Batch batch_at(std::int64_t step, int /*rank*/, int /*ranks*/) const override {
    constexpr std::int64_t kRow = 128, kMicroBatch = 4 * kRow;
    Batch batch;
    for (std::int64_t t = 0; t < tokens_; ++t) {
      if (t % kRow == 0) batch.document_start.push_back(static_cast<std::int32_t>(t));
      if (t % kMicroBatch == 0) batch.micro_batch_start.push_back(static_cast<std::int32_t>(t));
      batch.ids.push_back(id(step, t));
      batch.position.push_back(static_cast<std::int32_t>(t % kRow));
      batch.target.push_back(t % kRow + 1 < kRow ? id(step, t + 1) : -1);
      batch.trained_tokens += batch.target.back() >= 0 ? 1 : 0;
      batch.token_id.push_back(static_cast<std::uint64_t>(t));
    }
    batch.document_start.push_back(static_cast<std::int32_t>(tokens_));
    batch.micro_batch_start.push_back(static_cast<std::int32_t>(tokens_));
    return batch;
  }
  std::int64_t rows() const override { return tokens_ / 128; }
  std::int64_t rows_per_step() const override { return rows(); }
  std::int64_t sequence_len() const override { return 128; }

 private:
  std::int32_t id(std::int64_t step, std::int64_t t) const {
    return static_cast<std::int32_t>(random_bits(1, RandomStream::sample,
                                                 static_cast<std::uint64_t>(step),
                                                 static_cast<std::uint64_t>(t)) %
                                     static_cast<std::uint64_t>(vocab_));
  }
  std::int64_t vocab_, tokens_;
};

int run(const std::vector<std::string>& arguments) {
  const auto argument = [&](std::size_t i, std::int64_t value) {
    return arguments.size() > i ? std::stoll(arguments[i]) : value;
  };
  if (arguments.empty() || (arguments[0] != "memory" && arguments[0] != "disk")) {
    std::cerr << "usage: bench_paged memory|disk [steps] [rank] [tokens] [scratch folder]\n";
    return 2;
  }
  ArenaHome home;
  if (arguments[0] == "disk") home.folder = arguments.size() > 4 ? arguments[4] : ".";
  const std::int64_t steps = argument(1, 4), rank = argument(2, 144), tokens = argument(3, 2048);
  at::manual_seed(1);
  const ModelSpec spec = wide_spec();
  const auto decoder = Decoder::create(resident_weights(spec, random_weights(spec)), at::kBFloat16);
  LoraOptions lora;
  lora.expert_rank = rank;
  lora.targets = {"attention", "dense_mlp", "shared_expert", "experts"};
  Adapter adapter = Adapter::create(spec, lora, 1, home);
  AdamW optimizer(adapter, {}, home);
  const RandomRows rows(spec.vocab, tokens);
  TrainerOptions options;
  options.schedule = {ScheduleKind::constant, 1e-4, 0, steps};
  options.keep = Activations::recomputed;
  if (home.on_disk()) options.paged_experts = home;
  std::printf("%lld factors, state of %.2f GB, begun with %.2f GB\n",
              static_cast<long long>(adapter.parameter_count()),
              18e-9 * static_cast<double>(adapter.parameter_count()),
              1e-9 * static_cast<double>(testing_support::resident_bytes_peak()));
  {
    Trainer trainer(*decoder, adapter, optimizer, rows, options);
    const double began = seconds_now();
    for (std::int64_t s = 0; s < steps; ++s) {
      const StepRecord record = trainer.step(s);
      std::printf("step %lld loss %.17g norm %.17g seconds %.3f\n",
                  static_cast<long long>(record.step), record.loss, record.grad_norm,
                  record.seconds);
    }
    trainer.flush();
    std::printf("%.3f seconds a step, the last update included\n",
                (seconds_now() - began) / static_cast<double>(steps));
  }
  std::printf("peak %.3f GB\n", 1e-9 * static_cast<double>(testing_support::resident_bytes_peak()));
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("Rss")) std::printf("%s\n", line.c_str());
  }
  const auto factors = adapter.factors();
  double sum = 0;
  for (const float factor : factors) sum += factor;
  std::printf("sum of the factors %.17g\n", sum);
  return 0;
}

}  // namespace
}  // namespace tailor

int main(int count, char** values) {
  try {
    return tailor::run({values + 1, values + count});
  } catch (const tailor::Error& error) {
    std::cerr << tailor::to_text(error);
    return error.exit_code();
  }
}
