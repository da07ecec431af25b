#include "tools/compute/measure_step.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <map>
#include <set>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/text.h"
#include "data/checkpoint/checkpoint.h"
#include "data/store/store.h"
#include "data/store/synthetic.h"
#include "recipes/plan_text.h"
#include "recipes/step_cost.h"
#include "tools/compute/make_adapter.h"
#include "tools/compute/others_busy.h"
#include "tools/compute/probe_batches.h"
#include "tools/compute/resident_copy.h"
#include "tools/compute/setup.h"
#include "tools/compute/timed_weights.h"
#include "tools/interrupt.h"
#include "tools/paths.h"
#include "tools/planning.h"
#include "trainer/trainer.h"

namespace tailor {
namespace {

constexpr double kStoreBytesMax = 3e9;
constexpr double kTimedSeconds = 5;  ///< of steps of one kind; three at least, whatever they take
constexpr int kTimedSteps = 8, kTimedStepsMin = 3;
constexpr double kStepSecondsMax = 10;  ///< of a step that is measured, as planned

/// A folder of this process's own, removed at the end, and those that killed ones left behind.
struct Scratch {
  static constexpr std::string_view kName = ".measuring.";
  fs::path path = cache_folder() / "steps" / (std::string(kName) + std::to_string(::getpid()));
  Scratch() {
    make_folders(path);
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(path.parent_path(), error)) {
      const std::string name = entry.path().filename().string();
      if (!name.starts_with(kName)) continue;
      const long process = std::strtol(name.c_str() + kName.size(), nullptr, 10);
      std::error_code ignored;
      if (process > 0 && ::kill(static_cast<pid_t>(process), 0) != 0 && errno == ESRCH)
        fs::remove_all(entry.path(), ignored);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::error_code error;
    fs::remove_all(path, error);
  }
};

/// The formats of the recipe's base; what is published in a packed form stays in it.
StoreFormats formats_of(const Recipe& recipe, const ModelFacts& model) {
  BaseRecipe base = recipe.base;
  for (BaseFormat* format : {&base.format, &base.non_expert_format}) {
    if (*format == BaseFormat::as_is) *format = model.published;
  }
  return store_formats(base);
}

/// Which layers are measured, and how much of a step.
struct Choice {
  std::vector<std::int64_t> layers;
  std::int64_t micro_batches = 0;
  double store_bytes = 0;
};

Choice choose(const ResolvedRecipe& resolved, const ModelSpec& spec, const Plan& plan) {
  const Recipe& recipe = resolved.file.recipe;
  const BaseBytes base = base_bytes(recipe, resolved.facts);
  const std::int64_t moe = spec.moe_layer_count(), all = spec.layer_count();
  const double expert_layer = moe > 0 ? base.routed / as_double(moe) : 0;
  const std::int64_t kinds = moe > 0 && moe < all ? 2 : 1;
  const auto bytes = [&](const std::vector<std::int64_t>& layers) {
    double sum = base.head + base.embedding;
    for (const std::int64_t layer : layers) {
      sum += base.other / as_double(all) +
             (spec.layers[static_cast<std::size_t>(layer)].moe ? expert_layer : 0);
    }
    return sum;
  };
  const double a_layer = *plan.seconds_per_step.value / as_double(all);
  const double layers_in_time = kTimedSeconds / (kTimedStepsMin * std::max(1e-9, a_layer));
  std::int64_t count = std::clamp<std::int64_t>(
      static_cast<std::int64_t>(std::min(layers_in_time, 1e9)), kinds, all);
  Choice out;
  out.layers = choose_layers(spec, std::to_string(count));
  while (count > kinds && bytes(out.layers) > kStoreBytesMax) {
    --count;
    out.layers = choose_layers(spec, std::to_string(count));
  }
  out.store_bytes = bytes(out.layers);
  if (out.store_bytes > kStoreBytesMax) {
    throw Error(Fault::does_not_fit,
                {"one layer of each kind, embedding and head have " + gb(out.store_bytes) +
                     ", more than the " + gb(kStoreBytesMax) + " that are measured in some seconds",
                 recipe.base_model,
                 "Plan without --probe: `tailor calibrate` without a recipe measures this machine, "
                 "and a few steps of the run itself tell the rest."});
  }
  const std::int64_t rows = recipe.global_batch_rows();
  const std::int64_t micro_batches = (rows + recipe.training.micro_batch_size - 1) /
                                     std::max<std::int64_t>(1, recipe.training.micro_batch_size);
  const double share = std::min(1.0, kStepSecondsMax / (a_layer * as_double(count)));
  out.micro_batches =
      std::max<std::int64_t>(1, static_cast<std::int64_t>(as_double(micro_batches) * share));
  return out;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// A step taken apart, for a mean batch: medians over the steps, each for its tokens.
struct StepParts {
  std::vector<double> forward, backward;  ///< of each layer
  double head = 0, update = 0;
  double pass_bytes = 0, process_bytes = 0, kernel_bytes = 0;
};

/// How a process grows with the numbers of rows that it meets.
class ProcessGrowth {
 public:
  /// After a timed step: what it holds beyond what is accounted for.
  void step(const Batch& batch, double bytes) {
    add_row_counts(batch, met_);
    if (!first_) first_ = {bytes, std::ssize(met_)};
    last_ = {bytes, std::ssize(met_)};
  }
  double at_first() const { return first_ ? first_->first : 0; }
  double a_count() const {
    if (!first_ || last_.second == first_->second) return 0;
    return std::max(0.0, last_.first - first_->first) / as_double(last_.second - first_->second);
  }

 private:
  std::set<std::int64_t> met_;
  std::optional<std::pair<double, std::int64_t>> first_;
  std::pair<double, std::int64_t> last_;
};

class Measurement {
 public:
  explicit Measurement(const ResolvedRecipe& resolved)
      : resolved_(resolved), recipe_(resolved.file.recipe) {
    refuse_unsupported(recipe_);
    if (recipe_.machine.profile) {
      throw Error(Fault::usage, {"steps are measured on this machine, the recipe is planned for " +
                                     *recipe_.machine.profile,
                                 "machine.profile", "Set machine.profile=auto."});
    }
    threads_ = set_threads(recipe_.compute.threads.value_or(0));
    dtype_ = recipe_.compute.dtype == ComputeType::bfloat16 ? at::kBFloat16 : at::kFloat;
    data_ = recall_data(recipe_);
    plan_ = plan_recipe(resolved, data_, Measure::never).plan;
    if (!plan_.fits) throw does_not_fit(plan_);
  }

  MeasuredStep run() {
    const Json config =
        read_json(model_config_path(recipe_.base_model, recipes_folder() / "models"));
    spec_ = model_spec_from_config(config, recipe_.base_model);
    choice_ = choose(resolved_, spec_, plan_);
    log_info("measuring steps of " + std::to_string(choice_.layers.size()) + " of the model's " +
             std::to_string(spec_.layer_count()) + " layers, random weights (" +
             gb(choice_.store_bytes) + "), for some seconds");
    synthesise(config);
    store_ = std::make_shared<const Store>(Store::open(scratch_.path / "store"));
    open_batches();
    MeasuredStep out;
    const OthersBusy others;
    const StepParts parts = resident_step();
    disk_bytes_per_second_ = reading_rate();
    if (*plan_.stream_bytes_per_step.value > 0) out.stream = streamed_step(parts);
    out.busy_share = others.share();
    fill(out, parts);
    return out;
  }

 private:
  void synthesise(const Json& config) const {
    SynthesisOptions options;
    options.formats = formats_of(recipe_, resolved_.facts);
    options.threads = threads_;
    options.stop = [this] { return interrupt_.asked(); };
    synthesise_store(config, choice_.layers, scratch_.path / "store", options);
  }

  void open_batches() {
    std::shared_ptr<const TokenStore> store;
    if (data_) {
      const PrepareReport data = prepare_recipe_data(recipe_);
      release_free_memory();
      store = std::make_shared<const TokenStore>(TokenStore::open(data.train.store));
      counts_ = row_counts(recipe_, store,
                           data.validation ? std::make_shared<const TokenStore>(
                                                 TokenStore::open(data.validation->store))
                                           : nullptr);
    }
    batches_.emplace(recipe_, spec_.vocab, kTimedSteps, store, choice_.micro_batches);
  }

  /// Chosen experts of the layers that are measured, by their places there.
  ChosenByLayer chosen() const {
    if (!recipe_.lora.experts || spec_.experts == 0) return std::nullopt;
    Recipe copy = recipe_;
    std::vector<std::string> notes;
    const auto selection = apply_selection(copy, resolved_.facts.routed, notes);
    const ChosenByLayer all = selection->by_layer();
    ChosenByLayer out = std::map<int, std::vector<std::int32_t>>();
    for (std::size_t i = 0; i < choice_.layers.size(); ++i) {
      if (const auto found = all->find(static_cast<int>(choice_.layers[i])); found != all->end())
        out->emplace(static_cast<int>(i), found->second);
    }
    return out;
  }

  /// What belongs to a run beside its weights.
  struct Trained {
    Trained(const Measurement& of, std::unique_ptr<TimedWeights> weights)
        : timed(*weights), decoder(Decoder::create(std::move(weights), of.dtype_)) {
      const bool paged = of.plan_.expert_state == StateHome::disk;
      if (paged) experts.folder = of.scratch_.path;
      if (of.plan_.activations == ActivationHome::disk) decoder->keep_in({of.scratch_.path});
      adapter.emplace(Adapter::create(timed.spec(), lora_options(of.recipe_.lora, of.chosen()),
                                      static_cast<std::uint64_t>(of.recipe_.seed), experts));
      optimizer.emplace(*adapter, AdamWOptions{}, experts);
      TrainerOptions options;
      options.schedule.learning_rate = 1e-6;
      options.schedule.steps = 1'000'000;
      options.dropout = of.recipe_.lora.dropout;
      options.seed = static_cast<std::uint64_t>(of.recipe_.seed);
      options.keep = of.plan_.keep_activations ? Activations::kept : Activations::recomputed;
      if (paged) options.paged_experts = experts;
      trainer.emplace(*decoder, *adapter, *optimizer, *of.batches_, options);
    }
    TimedWeights& timed;
    std::unique_ptr<Decoder> decoder;
    ArenaHome experts;
    std::optional<Adapter> adapter;
    std::optional<AdamW> optimizer;
    std::optional<Trainer> trainer;
  };

  /// Steps until they took long enough, the first left out: pages are touched and kernels compiled.
  template <class Use>
  void steps(Trained& trained, const Use& use) const {
    double timed = 0;
    for (int step = 0; step <= kTimedSteps; ++step) {
      if (step > kTimedStepsMin && timed > kTimedSeconds) break;
      if (interrupt_.asked()) {
        throw Error(Fault::stopped, {"interrupted", "measuring steps",
                                     "Nothing is kept. Run the same command again."});
      }
      const double began = seconds_now();
      const StepRecord record = trained.trainer->step(step, true);
      const double seconds = seconds_now() - began;
      if (step == 0) continue;
      timed += seconds;
      use(record, seconds);
    }
  }

  StepParts resident_step() const {
    std::unique_ptr<FrozenWeights> weights = StoreWeights::open(store_, dtype_, StreamOptions{});
    if (!wants_store(recipe_, plan_))
      weights = resident_copy(static_cast<StoreWeights&>(*weights), dtype_);
    Trained trained(*this, std::make_unique<TimedWeights>(std::move(weights)));
    const std::size_t layers = choice_.layers.size();
    std::vector<std::vector<double>> forward(layers), backward(layers);
    std::vector<double> head, update;
    ProcessGrowth growth;
    const double parameters = as_double(trained.adapter->parameter_count());
    const double factors = trained.experts.on_disk() ? 0 : parameters * kTrainBytes;
    steps(trained, [&](const StepRecord& record, double seconds) {
      growth.step(batches_->batch_at(record.step - 1, 0, 1),
                  as_double(resident_bytes().value_or(0)) -
                      as_double(trained.timed.memory_bytes()) -
                      as_double(trained.decoder->pass_bytes_peak()) - factors);
      const TimedWeights::Passes& passes = trained.timed.passes();
      const double tokens = batches_->mean_tokens() / as_double(record.tokens);
      const double loss = batches_->mean_trained_tokens() / as_double(record.trained_tokens);
      for (std::size_t l = 0; l < layers; ++l) {
        forward[l].push_back(passes.forward[l] * tokens);
        backward[l].push_back(passes.backward[l] * tokens);
      }
      head.push_back(passes.embedding * tokens + passes.head * loss);
      update.push_back(seconds - passes.all());
    });
    StepParts out;
    for (std::size_t l = 0; l < layers; ++l) {
      out.forward.push_back(median(forward[l]));
      out.backward.push_back(median(backward[l]));
    }
    out.head = median(head);
    out.update = median(update);
    out.pass_bytes = as_double(trained.decoder->pass_bytes_peak());
    out.process_bytes = growth.at_first();
    out.kernel_bytes = growth.a_count();
    return out;
  }

  /// Of all the tiles of a pass, read and not used.
  double reading_rate() const {
    StreamOptions options;
    options.device_bytes = options.host_bytes = 0;
    const auto weights = StoreWeights::open(store_, dtype_, options);
    double best = 0;
    for (int round = 0; round < 2; ++round) {
      const std::int64_t before = weights->counters().streamed_bytes;
      const double began = seconds_now();
      weights->read_through(FrozenWeights::Pass::train_kept);
      const double seconds = seconds_now() - began;
      best = std::max(best, as_double(weights->counters().streamed_bytes - before) / seconds);
    }
    return best;
  }

  /// The share of the weights that the plan keeps in memory, of what is measured.
  StreamOptions budgets() const {
    const double share = as_double(plan_.device_tile_bytes) /
                         std::max(1.0, base_bytes(recipe_, resolved_.facts).all());
    StreamOptions out;
    out.host_bytes = 0;
    out.device_bytes = std::llround(share * as_double(store_->layout().bytes()));
    return out;
  }

  std::unique_ptr<StoreWeights> open_streamed() const {
    try {
      return StoreWeights::open(store_, dtype_, budgets());
    } catch (const Error& error) {  // not even one tile
      if (error.fault() != Fault::does_not_fit) throw;
      StreamOptions none;
      none.device_bytes = none.host_bytes = 0;
      return StoreWeights::open(store_, dtype_, none);
    }
  }

  MeasuredStep::Stream streamed_step(const StepParts& parts) const {
    auto weights = open_streamed();
    const double head = as_double(weights->facts().streamed.head);
    Trained trained(*this, std::make_unique<TimedWeights>(std::move(weights)));
    std::vector<double> seconds;
    double bytes = 0;
    steps(trained, [&](const StepRecord& record, double) {
      seconds.push_back(trained.timed.passes().all() * batches_->mean_tokens() /
                        as_double(record.tokens));
      bytes = as_double(record.stream_bytes);
    });
    const double backward = (bytes - head) / 2;
    const auto sum = [](const std::vector<double>& values) {
      double total = 0;
      for (const double value : values) total += value;
      return total;
    };
    return {median(seconds),
            std::max(sum(parts.forward) + parts.head, (backward + head) / disk_bytes_per_second_) +
                std::max(sum(parts.backward), backward / disk_bytes_per_second_)};
  }

  /// Chunked attention tells layers apart where rows are long enough for it.
  std::string kind_of(const LayerSpec& layer) const {
    const bool chunked =
        layer.attention_chunk > 0 && layer.attention_chunk < recipe_.data.sequence_len;
    return std::string(layer.moe ? "mixture" : "dense") + (chunked ? " (chunked)" : "");
  }

  void fill(MeasuredStep& out, const StepParts& parts) const {
    out.date = utc_text(RealClock().unix_ms());
    out.threads = threads_;
    out.tokens = batches_->mean_tokens();
    out.trained_tokens = batches_->mean_trained_tokens();
    const TokenFlops flops = token_flops(recipe_, resolved_.facts, plan_.keep_activations);
    out.layer_flops_per_token = flops.total() - 2 * flops.head;
    out.parameters =
        as_double(count_lora(recipe_, model_facts(store_->spec(), recipe_.base_model)).total());
    const StoreFormats formats = formats_of(recipe_, resolved_.facts);
    out.dequantising =
        formats.experts.kind != WeightKind::bf16 || formats.others.kind != WeightKind::bf16;
    add_layers(out, parts);
    out.head_seconds = parts.head;
    out.update_seconds = parts.update;
    out.disk_bytes_per_second = disk_bytes_per_second_;
    out.pass_bytes = parts.pass_bytes;
    out.tokens_max = batches_->most_tokens();
    out.kept = plan_.keep_activations;
    out.in_memory = plan_.activations != ActivationHome::disk;
    out.process_bytes = parts.process_bytes;
    out.kernel_bytes = parts.kernel_bytes;
    out.row_counts = counts_.after;
    out.evaluation_row_counts = counts_.evaluation;
  }

  /// Means over the layers of a kind. The first layer's backward pass is shorter, its input's
  /// gradient is not wanted; of several of its kind it does not stand for those not measured.
  void add_layers(MeasuredStep& out, const StepParts& parts) const {
    std::map<std::string, std::vector<std::size_t>> measured;
    std::map<std::string, std::int64_t> in_model;
    for (const LayerSpec& layer : spec_.layers) ++in_model[kind_of(layer)];
    for (std::size_t i = 0; i < choice_.layers.size(); ++i) {
      measured[kind_of(spec_.layers[static_cast<std::size_t>(choice_.layers[i])])].push_back(i);
    }
    for (const auto& [kind, count] : in_model) {
      std::vector<std::size_t> layers = measured[kind];
      const auto found = std::ssize(layers);
      // A kind of which none is measured (a few layers of many kinds) takes after all others.
      if (layers.empty()) {
        for (std::size_t i = 0; i < choice_.layers.size(); ++i) layers.push_back(i);
      }
      if (found != count && layers.size() > 1 && layers.front() == 0) layers.erase(layers.begin());
      MeasuredStep::Layers entry{kind, found, count, 0, 0};
      for (const std::size_t i : layers) {
        entry.forward_seconds += parts.forward[i] / static_cast<double>(layers.size());
        entry.backward_seconds += parts.backward[i] / static_cast<double>(layers.size());
      }
      out.layers.push_back(std::move(entry));
    }
  }

  const ResolvedRecipe& resolved_;
  const Recipe& recipe_;
  int threads_ = 0;
  at::ScalarType dtype_ = at::kFloat;
  std::optional<DataStats> data_;
  Plan plan_;
  ModelSpec spec_;
  Choice choice_;
  Interrupt interrupt_;
  Scratch scratch_;
  std::shared_ptr<const Store> store_;
  std::optional<ProbeBatches> batches_;
  RowCounts counts_;
  double disk_bytes_per_second_ = 0;
};

}  // namespace

MeasuredStep measure_recipe_step(const ResolvedRecipe& resolved) {
  return Measurement(resolved).run();
}

}  // namespace tailor
