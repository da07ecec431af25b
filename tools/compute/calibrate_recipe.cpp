#include "tools/compute/calibrate_recipe.h"

#include <ATen/ATen.h>
#include <unistd.h>

#include <algorithm>
#include <map>

#include "base/clock.h"
#include "base/log.h"
#include "base/text.h"
#include "data/checkpoint/checkpoint.h"
#include "data/store/store.h"
#include "data/store/synthetic.h"
#include "recipes/step_cost.h"
#include "tools/compute/make_adapter.h"
#include "tools/compute/setup.h"
#include "tools/paths.h"
#include "tools/planning.h"
#include "tools/recipe_inputs.h"
#include "trainer/stream/store_weights.h"
#include "trainer/trainer.h"

namespace tailor {
namespace {

constexpr double kStoreBytesMax = 2e9;
constexpr std::int64_t kMore = 6;  ///< layers of a kind beside the first
constexpr int kSteps = 5;          ///< timed, after one that warms up

struct Scratch {
  fs::path path = cache_folder() / ("calibrate." + std::to_string(::getpid()));
  Scratch() { make_folders(path); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::error_code error;
    fs::remove_all(path, error);
  }
};

/// The same batch in every step: documents of one length, cut into the recipe's micro-batches.
class SameBatch final : public TokenSource {
 public:
  SameBatch(const Recipe& recipe, std::int64_t tokens, std::int64_t document, std::int64_t vocab)
      : rows_(recipe.global_batch_rows()), sequence_(recipe.data.sequence_len) {
    const std::int64_t micros = std::max<std::int64_t>(1, rows_ / recipe.training.micro_batch_size);
    const std::int64_t per_micro = std::max<std::int64_t>(2, tokens / micros);
    batch_.rows = rows_;
    for (std::int64_t m = 0; m < micros; ++m) {
      batch_.micro_batch_start.push_back(static_cast<std::int32_t>(batch_.ids.size()));
      for (std::int64_t t = 0; t < per_micro; ++t) {
        const std::int64_t at = t % document;
        const std::int64_t row = t * recipe.training.micro_batch_size / per_micro;
        if (at == 0) batch_.document_start.push_back(static_cast<std::int32_t>(batch_.ids.size()));
        const auto place = static_cast<std::int64_t>(batch_.ids.size());
        batch_.ids.push_back(static_cast<std::int32_t>((place * 7919 + 13) % vocab));
        batch_.position.push_back(static_cast<std::int32_t>(at));
        batch_.target.push_back(static_cast<std::int32_t>((place * 104729 + 7) % vocab));
        batch_.token_id.push_back((static_cast<std::uint64_t>(row) << 32U) |
                                  static_cast<std::uint64_t>(t));
      }
    }
    const auto end = static_cast<std::int32_t>(batch_.ids.size());
    batch_.micro_batch_start.push_back(end);
    batch_.document_start.push_back(end);
    batch_.trained_tokens = end;
  }
  Batch batch_at(std::int64_t, int, int) const override { return batch_; }
  std::int64_t rows() const override { return rows_; }
  std::int64_t rows_per_step() const override { return rows_; }
  std::int64_t sequence_len() const override { return sequence_; }
  std::int64_t tokens() const { return batch_.tokens(); }

 private:
  Batch batch_;
  std::int64_t rows_, sequence_;
};

Json config_of(const std::string& base_model) {
  if (const auto shipped = shipped_config(base_model, recipes_folder() / "models")) {
    std::error_code error;
    if (!fs::exists(fs::path(base_model) / "config.json", error)) return read_json(*shipped);
  }
  return read_json(find_model_folder(base_model) / "config.json");
}

/// Steps of a model of `layers` of the recipe's: the median of their seconds.
double step_seconds(const ResolvedRecipe& resolved, const Json& config,
                    const std::vector<std::int64_t>& layers, const SameBatch& source, bool keep,
                    int threads, const fs::path& folder) {
  const Recipe& recipe = resolved.file.recipe;
  SynthesisOptions options;
  options.formats = store_formats(recipe.base);
  options.threads = threads;
  synthesise_store(config, layers, folder, options);
  const at::ScalarType dtype =
      recipe.compute.dtype == ComputeType::bfloat16 ? at::kBFloat16 : at::kFloat;
  const auto store = std::make_shared<const Store>(Store::open(folder));
  const ModelSpec spec = store->spec();
  const auto decoder = Decoder::create(StoreWeights::open(store, dtype, StreamOptions{}), dtype);
  LoraOptions lora = lora_options(recipe.lora);
  Adapter adapter = Adapter::create(spec, lora, 1);
  AdamW optimizer(adapter, AdamWOptions{});
  TrainerOptions training;
  training.schedule.learning_rate = 1e-6;
  training.schedule.steps = 1000;
  training.dropout = recipe.lora.dropout;
  training.keep = keep ? Activations::kept : Activations::recomputed;
  Trainer trainer(*decoder, adapter, optimizer, source, training);
  std::vector<double> seconds;
  for (int step = 0; step <= kSteps; ++step) {
    const StepRecord record = trainer.step(step);
    if (step > 0) seconds.push_back(record.seconds);
  }
  std::nth_element(seconds.begin(), seconds.begin() + kSteps / 2, seconds.end());
  return seconds[kSteps / 2];
}

}  // namespace

Json calibrate_recipe(const CalibrateArguments& arguments) {
  const ResolvedRecipe resolved = resolve_recipe(arguments.recipe, arguments.overrides);
  const Recipe& recipe = resolved.file.recipe;
  const int threads = set_threads(recipe.compute.threads.value_or(0));
  const Plan plan = plan_recipe(resolved, std::nullopt, Measure::never).plan;
  const Json config = config_of(recipe.base_model);
  const ModelSpec spec = model_spec_from_config(config, recipe.base_model);

  // One layer of each kind, then more of those that the model has more of.
  std::vector<std::int64_t> first;
  std::map<bool, std::vector<std::int64_t>> of_kind;
  for (std::int64_t l = 0; l < spec.layer_count(); ++l)
    of_kind[spec.layers[static_cast<std::size_t>(l)].moe].push_back(l);
  for (const auto& [moe, layers] : of_kind) first.push_back(layers.front());
  const BaseBytes base = base_bytes(recipe, resolved.facts);
  const double largest = static_cast<double>(first.size() + kMore) *
                             (resolved.facts.moe_layers > 0
                                  ? base.routed / static_cast<double>(resolved.facts.moe_layers)
                                  : base.other / static_cast<double>(resolved.facts.layers)) +
                         base.head + base.embedding;
  if (largest > kStoreBytesMax) {
    throw Error(Fault::does_not_fit,
                {"a few layers of this model have " + bytes_text(std::llround(largest)) +
                     ", too much to measure in some seconds",
                 recipe.base_model,
                 "Run `tailor calibrate` without a recipe, or `tailor plan` without --probe."});
  }
  const std::int64_t full = recipe.tokens_per_step();
  const std::int64_t tokens = arguments.tokens > 0 ? std::min(arguments.tokens, full) : full;
  const std::int64_t document = arguments.document_tokens > 0
                                    ? std::min(arguments.document_tokens, recipe.data.sequence_len)
                                    : recipe.data.sequence_len;
  const SameBatch source(recipe, tokens, document, spec.vocab);

  const Scratch scratch;
  int stores = 0;
  const auto measured = [&](std::vector<std::int64_t> layers) {
    std::sort(layers.begin(), layers.end());
    const fs::path folder = scratch.path / std::to_string(stores++);
    const double seconds =
        step_seconds(resolved, config, layers, source, plan.keep_activations, threads, folder);
    std::error_code error;
    fs::remove_all(folder, error);
    return seconds;
  };
  const double least = measured(first);
  double step = least;
  std::int64_t measured_layers = static_cast<std::int64_t>(first.size());
  for (const auto& [moe, layers] : of_kind) {
    const auto others = static_cast<std::int64_t>(layers.size()) - 1;
    if (others == 0) continue;
    const std::int64_t more = std::min(kMore, others);
    std::vector<std::int64_t> longer = first;
    longer.insert(longer.end(), layers.begin() + 1, layers.begin() + 1 + more);
    const double each = std::max(0.0, measured(longer) - least) / static_cast<double>(more);
    step += each * static_cast<double>(others);
    measured_layers += more;
  }
  const double flops = token_flops(recipe, resolved.facts, plan.keep_activations).total();
  const auto computed = static_cast<double>(source.tokens());
  return {{"gflops", 1e-9 * flops * computed / step},
          {"step_seconds", step},
          {"tokens", source.tokens()},
          {"document_tokens", document},
          {"layers_measured", measured_layers},
          {"threads", threads},
          {"source", "steps of " + std::to_string(measured_layers) + " of the model's " +
                         std::to_string(spec.layer_count()) + " layers measured just now"}};
}

}  // namespace tailor
