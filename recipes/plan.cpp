#include "recipes/plan.h"

#include <algorithm>
#include <cmath>

#include "base/text.h"
#include "base/units.h"
#include "recipes/choices.h"
#include "recipes/step_cost.h"

namespace tailor {
namespace {

using Home = MemoryItem::Home;

constexpr double kGb = 1e9;
constexpr double kDeviceShare = 0.97;  // of device memory: the allocator's slack is the rest
constexpr double kHostShare = 0.95;
constexpr double kTrainBytes = 18;  // float32 factor, gradient, two moments; bf16 copy
constexpr double kPagedBytes = 20;  // as above with a second bf16 buffer that rides with the tile
constexpr double kCheckpointBytes = 12;  // float32 factor and two moments
constexpr int kRingSlots = 16;
constexpr double kHeadChunk = 1024;  // rows of the vocabulary head worked on at once

double as_double(std::int64_t value) { return static_cast<double>(value); }

std::string gb(double bytes) { return bytes_text(std::llround(bytes)); }
std::string whole(double value) { return count_text(std::llround(value)); }
std::string short_text(double value) { return number_text(value, 3); }

/// The working state of make_plan(): inputs, and the sums shared by its parts.
class Planner {
 public:
  Planner(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
          const PlanExtras& extras)
      : recipe_(recipe),
        model_(model),
        machine_(machine),
        extras_(extras),
        lora_(count_lora(recipe, model)),
        base_(base_bytes(recipe, model)),
        ranks_(recipe.machine.ranks),
        tokens_(as_double(recipe.tokens_per_step())) {
    micro_tokens_ = std::min(as_double(recipe.training.micro_batch_size * recipe.data.sequence_len),
                             std::max(1.0, tokens_ / ranks_));
  }

  Plan plan;

  void run(const PriceBook& prices) {
    plan.tokens_per_step = {tokens_, "tokens",
                            whole(as_double(recipe_.global_batch_rows())) + " rows x " +
                                whole(as_double(recipe_.data.sequence_len)) + " tokens"};
    plan.trainable_parameters = {as_double(lora_.total()), "parameters",
                                 whole(as_double(lora_.other())) + " outside and " +
                                     whole(as_double(lora_.experts)) + " in routed experts"};
    const bool has_gpu = machine_.kind == Machine::Kind::cuda;
    if (recipe_.compute.device == (has_gpu ? DeviceChoice::cpu : DeviceChoice::cuda)) {
      throw Error(Fault::usage,
                  {"compute.device is " + std::string(choice_word(recipe_.compute.device)) + ", " +
                       machine_.name + " is a machine " + (has_gpu ? "with" : "without") + " GPUs",
                   "compute.device, machine.profile",
                   has_gpu ? "Set compute.device: auto, or machine.profile: cpu."
                           : "Set compute.device: auto, or name a machine.profile with GPUs."});
    }
    if (has_gpu) {
      run_gpu();
    } else {
      run_cpu();
    }
    add_disk();
    plan.tokens_per_second = {
        tokens_ / *plan.seconds_per_step.value, "tokens/s",
        whole(tokens_) + " tokens / " + short_text(*plan.seconds_per_step.value) + " s"};
    add_job(prices);
    plan.fits = plan.misfits.empty();
    plan.fits_working = plan.fits ? "device, host and disk hold what the items add up to"
                                  : plan.misfits.front().what;
  }

 private:
  void item(Home home, std::string name, double bytes, std::string working) {
    if (bytes > 0) plan.items.push_back({home, std::move(name), bytes, std::move(working)});
  }
  double sum(Home home) const {
    double total = 0;
    for (const MemoryItem& entry : plan.items) {
      if (entry.home == home) total += entry.bytes;
    }
    return total;
  }
  /// "20.1 GB: weights 12.1 GB + factors 3.0 GB + ..."
  std::string sum_text(Home home) const {
    std::vector<std::string> parts;
    for (const MemoryItem& entry : plan.items) {
      if (entry.home == home) parts.push_back(entry.name + " " + gb(entry.bytes));
    }
    return join(parts, " + ");
  }
  /// The largest item whose size a setting governs, as advice.
  std::string advice(Home home) const {
    const MemoryItem* largest = nullptr;
    for (const MemoryItem& entry : plan.items) {
      if (entry.home == home && (largest == nullptr || entry.bytes > largest->bytes))
        largest = &entry;
    }
    if (largest == nullptr) return "";
    const std::string start =
        "The largest part is " + largest->name + " with " + gb(largest->bytes) + ". ";
    const std::string& name = largest->name;
    const auto has = [&](std::string_view word) { return name.find(word) != std::string::npos; };
    if (has("workspace")) return start + "Lower training.micro_batch_size or data.sequence_len.";
    if (has("kept") || has("stream") || has("pool")) {
      return start + "Lower training.gradient_accumulation_steps, or set base.activations: disk.";
    }
    if (has("factors"))
      return start + "Lower lora.rank and lora.expert_rank, or target fewer modules.";
    if (has("head")) return start + "Use a device with more memory; the head is not streamed yet.";
    if (has("experts")) return start + "Set base.format: int4, or lower base.host_memory.";
    return start + "Set base.non_expert_format: int4, or use a larger device.";
  }

  // ------------------------------------------------------------------ GPUs
  void run_gpu() {
    if (ranks_ > machine_.devices) {
      throw Error(Fault::usage,
                  {"machine.ranks is " + std::to_string(recipe_.machine.ranks) + ", " +
                       machine_.name + " has " + std::to_string(machine_.devices) +
                       (machine_.devices == 1 ? " device" : " devices"),
                   "machine.ranks",
                   "Set machine.ranks: " + std::to_string(machine_.devices) +
                       ", or name a larger machine.profile."});
    }
    const double per_rank = tokens_ / ranks_;
    const double kept_all = per_rank * as_double(model_.layers * model_.hidden) * 2;
    ActivationHome home = recipe_.base.activations;
    if (home == ActivationHome::automatic) home = ActivationHome::host;
    plan.activations = home;

    item(Home::device, "context", kGb * (ranks_ > 1 ? 2 : 1),
         "CUDA, its libraries" + std::string(ranks_ > 1 ? ", NCCL" : ""));
    const double gathered = ranks_ > 1
                                ? 4 * as_double(model_.attention_parameters() +
                                                model_.shared_experts * model_.expert_parameters())
                                : 0;
    item(Home::device, "weights outside experts", base_.other / ranks_ + gathered,
         "attention, dense MLPs, shared experts and routers: " + gb(base_.other) +
             (ranks_ > 1 ? " / " + short_text(ranks_) + " ranks + two gathered layers" : ""));
    item(Home::device, "vocabulary head", base_.head / ranks_,
         "bf16; embedding rows are read from the host");
    item(Home::device, "factors outside experts", as_double(lora_.other()) * kTrainBytes / ranks_,
         whole(as_double(lora_.other())) +
             " parameters x 18 B: float32 value, gradient, two moments, bf16 copy");
    if (model_.experts > 0) {
      item(Home::device, "expert ring",
           kRingSlots * (base_.expert + as_double(lora_.per_expert) * 6),
           std::to_string(kRingSlots) + " slots x (" + gb(base_.expert) +
               " packed + factors and gradients)");
      item(Home::device, "dequantised experts", 2 * as_double(model_.expert_parameters()) * 2,
           "2 experts in bf16");
      item(Home::device, "routed rows pool", per_rank * as_double(model_.top_k * model_.hidden) * 4,
           "gather and scatter, bf16");
      const double rows =
          std::max(1.0, per_rank * as_double(model_.top_k) * ranks_ / as_double(model_.experts)) *
          2;
      item(Home::device, "expert workspace",
           rows * as_double(3 * model_.expert_width + 2 * model_.hidden) * 4,
           "twice the mean rows of an expert");
    }
    item(Home::device, "residual stream", per_rank * as_double(model_.hidden) * 4,
         whole(per_rank) + " tokens x D x (value + gradient) bf16");
    item(Home::device, "micro-batch workspace", workspace_bytes(2),
         whole(micro_tokens_) + " tokens through one block");
    item(Home::device, "head chunk", kHeadChunk * as_double(model_.vocab) * 6,
         "1,024 rows of logits, float32 and bf16");
    const bool on_device = home == ActivationHome::device;
    item(Home::device, "kept layer inputs",
         on_device ? kept_all : per_rank * as_double(model_.hidden) * 2 * 4,
         on_device
             ? "all layers, bf16"
             : "a window of 4 layers; the others wait on the " + std::string(choice_word(home)));

    const double used = sum(Home::device);
    const double limit = machine_.device_bytes * kDeviceShare;
    double tiles = 0;
    if (base_.routed > 0) {
      const double room = std::max(0.0, limit - used);
      const double wanted =
          recipe_.base.device_memory ? as_double(*recipe_.base.device_memory) : room;
      tiles = std::min(wanted, base_.routed / ranks_);
      plan.resident_fraction = tiles / (base_.routed / ranks_);
      item(Home::device, "resident experts", tiles,
           short_text(plan.resident_fraction * 100) + "% of " + gb(base_.routed / ranks_));
    }
    plan.device_tile_bytes = std::llround(tiles);
    plan.device_bytes_peak = {sum(Home::device), "bytes", sum_text(Home::device)};
    if (sum(Home::device) > limit) {
      const bool by_budget = recipe_.base.device_memory && used <= limit;
      plan.misfits.push_back(
          {"device memory: " + gb(sum(Home::device)) + " needed, " + gb(limit) + " usable of " +
               gb(machine_.device_bytes) + " (" + machine_.name + ")",
           by_budget ? "Set base.device_memory: " +
                           std::to_string(std::max(0LL, std::llround(limit - used))) + ", or auto."
                     : advice(Home::device)});
    }

    // Host: what does not stay on the device, as far as it fits or is asked for; the rest is on
    // disk.
    item(Home::host, "process and pinned staging", 8 * kGb * ranks_ / 4 + 4 * kGb,
         "program, libraries, pinned slots");
    item(Home::host, "embedding", base_.embedding > 0 ? base_.embedding : base_.head,
         "rows are read by index");
    item(Home::host, "expert factors and optimizer", as_double(lora_.experts) * kPagedBytes,
         whole(as_double(lora_.experts)) + " parameters x 20 B");
    if (home == ActivationHome::host) {
      item(Home::host, "kept layer inputs", kept_all * ranks_,
           whole(tokens_) + " tokens x " + whole(as_double(model_.layers)) + " layers x D x 2 B");
    }
    const double host_limit = machine_.host_bytes * kHostShare;
    const double host_room = std::max(0.0, host_limit - sum(Home::host));
    const double host_wanted =
        recipe_.base.host_memory ? as_double(*recipe_.base.host_memory) : host_room;
    const double host_tiles = std::min(host_wanted, base_.routed);
    item(Home::host, "experts in RAM", host_tiles,
         host_tiles < base_.routed ? gb(base_.routed - host_tiles) + " more come from disk"
                                   : "all of them, packed");
    plan.host_tile_bytes = std::llround(host_tiles);
    plan.host_bytes_peak = {sum(Home::host), "bytes", sum_text(Home::host)};
    if (sum(Home::host) > host_limit) {
      plan.misfits.push_back(
          {"host memory: " + gb(sum(Home::host)) + " needed, " + gb(host_limit) + " usable of " +
               gb(machine_.host_bytes) + " (" + machine_.name + ")",
           recipe_.base.host_memory ? "Set base.host_memory: auto." : advice(Home::host)});
    }

    GpuChoice choice;
    choice.tokens = tokens_;
    choice.resident_fraction = plan.resident_fraction;
    choice.host_tile_bytes = host_tiles < base_.routed ? host_tiles : -1;
    choice.activations_cross = !on_device;
    const StepTime time = gpu_step_time(recipe_, model_, machine_, choice);
    const TokenFlops flops = token_flops(recipe_, model_, false);
    plan.flops_per_token = {
        flops.total(), "FLOP",
        "forward " + short_text((flops.forward_other + flops.forward_expert) / 1e9) +
            " + backward with recompute " +
            short_text((flops.backward_other + flops.backward_expert) / 1e9) + " GFLOP"};
    plan.stream_bytes_per_step = {
        time.stream_bytes, "bytes",
        "2 passes x " + gb(time.stream_bytes / 2) + " of experts not resident on a device"};
    const auto pass = [](double compute, double link, double disk, double network) {
      std::string out = "max(compute " + short_text(compute) + ", link " + short_text(link);
      if (disk > 0) out += ", disk " + short_text(disk);
      if (network > 0) out += ", network " + short_text(network);
      return out + ")";
    };
    plan.seconds_per_step = {
        time.seconds(), "seconds",
        "forward " +
            pass(time.compute_forward, time.link_forward, time.disk_forward, time.network_forward) +
            " + backward " +
            pass(time.compute_backward, time.link_backward, time.disk_backward,
                 time.network_backward) +
            " + " + short_text(time.exposed) + " s not overlapped; modelled, efficiency " +
            short_text(machine_.efficiency)};
    const std::vector<std::pair<double, Bound>> parts = {{time.compute(), Bound::compute},
                                                         {time.link(), Bound::link},
                                                         {time.disk(), Bound::disk},
                                                         {time.network(), Bound::network}};
    plan.bound = std::max_element(parts.begin(), parts.end(), [](const auto& a, const auto& b) {
                   return a.first < b.first;
                 })->second;
    plan.bound_working = "a step: compute " + short_text(time.compute()) + " s, link " +
                         short_text(time.link()) + " s, disk " + short_text(time.disk()) +
                         " s, network " + short_text(time.network()) + " s";
    forward_seconds_per_token_ = std::max({time.compute_forward, time.link_forward,
                                           time.disk_forward, time.network_forward}) /
                                 tokens_;
    add_crossover(choice);
    load_seconds_ = base_.all() / machine_.disk_bytes_per_second;
    if (model_.experts > 0 && plan.bound != Bound::compute) {
      plan.warnings.push_back(
          "the step waits for weights (" + std::string(bound_name(plan.bound)) +
          "): more tokens a step cost little time; raise training.gradient_accumulation_steps");
    }
    plan.warnings.push_back("GPU times are modelled, not measured on this machine");
  }

  /// Smallest step at which computing hides the stream, residency kept as planned.
  void add_crossover(GpuChoice choice) {
    if (base_.routed == 0 || plan.resident_fraction >= 1) {
      plan.crossover_tokens_per_step = {std::nullopt, "tokens", "nothing is streamed"};
      return;
    }
    double low = 64, high = 1 << 22;
    const double largest = high;
    while (high - low > 32) {
      choice.tokens = std::floor((low + high) / 2);
      const StepTime time = gpu_step_time(recipe_, model_, machine_, choice);
      (time.compute() >= std::max(time.link(), time.disk()) ? high : low) = choice.tokens;
    }
    if (high >= largest) {
      plan.crossover_tokens_per_step = {std::nullopt, "tokens",
                                        "no step below 4 million tokens hides the stream"};
      return;
    }
    plan.crossover_tokens_per_step = {high, "tokens",
                                      "from there on computing takes as long as the stream"};
  }

  /// Widths of one block times micro-batch tokens.
  double workspace_bytes(double value_bytes) const {
    double widths = 0;
    for (const MatrixShape& shape : model_.attention) widths += as_double(shape.out) * 2;
    widths += 6 * as_double(std::max(model_.dense_layers > 0 ? model_.dense_width : 0,
                                     model_.shared_experts * model_.expert_width));
    return micro_tokens_ * (widths + 8 * as_double(model_.hidden)) * value_bytes;
  }

  /// What the backward pass wants back from every layer, beside its input.
  double kept_bytes(double value_bytes) const {
    double attention = as_double(model_.heads * model_.qk_dim);
    for (const MatrixShape& shape : model_.attention) attention += as_double(shape.out);
    const double dense = attention + 2 * as_double(model_.dense_width);
    const double moe =
        attention + 2 * as_double((model_.shared_experts + model_.top_k) * model_.expert_width);
    return tokens_ * value_bytes *
           (as_double(model_.dense_layers) * dense + as_double(model_.moe_layers) * moe);
  }

  // ------------------------------------------------------------------ CPU
  void run_cpu() {
    const double value = recipe_.compute.dtype == ComputeType::float32 ? 4 : 2;
    // Recomputing costs a third more arithmetic, so it is worth it only where memory is short.
    constexpr double kShareForActivations = 0.25;
    const KeepActivations choice = recipe_.compute.keep_activations;
    const bool keep = choice == KeepActivations::all ||
                      (choice == KeepActivations::automatic &&
                       kept_bytes(value) <= kShareForActivations * machine_.host_bytes);
    plan.keep_activations = keep;
    plan.activations = recipe_.base.activations == ActivationHome::disk ? ActivationHome::disk
                                                                        : ActivationHome::host;
    const double layers = as_double(model_.layers);

    // Measured on the demo run: what its peak of 1.57 GB holds beyond the items below.
    item(Home::host, "process", 0.36 * kGb * ranks_,
         "program, LibTorch and what the tokenizer leaves behind, each rank");
    item(Home::host, "factors", as_double(lora_.total()) * (value == 2 ? kTrainBytes : 16),
         whole(as_double(lora_.total())) + " parameters x " + (value == 2 ? "18" : "16") +
             " B: float32 value, gradient, two moments" + (value == 2 ? ", bf16 copy" : ""));
    if (plan.activations == ActivationHome::host) {
      item(Home::host, "kept layer inputs", tokens_ * layers * as_double(model_.hidden) * value,
           whole(tokens_) + " tokens x " + whole(layers) + " layers x D x " + short_text(value) +
               " B");
    }
    if (keep) {
      item(Home::host, "kept activations", kept_bytes(value),
           "q, k, v, attention's result, the stream after it, gate and up, all layers");
    }
    item(Home::host, "residual stream", tokens_ * as_double(model_.hidden) * 2 * 4,
         "value and gradient, float32");
    if (model_.experts > 0) {
      item(Home::host, "routed rows pool",
           tokens_ * as_double(model_.top_k) *
               as_double(4 * model_.hidden + 4 * model_.expert_width) * value,
           "rows sorted by expert with gate, up and their product");
    }
    item(Home::host, "micro-batch workspace", workspace_bytes(4) * ranks_,
         whole(micro_tokens_) + " tokens through one block");
    const double head_rows = std::min(
        as_double(head_chunk_rows(model_.vocab, static_cast<std::int64_t>(value))), tokens_);
    item(Home::host, "head chunk",
         head_rows * as_double(model_.vocab + 3 * model_.hidden) * value * ranks_,
         "logits of " + whole(head_rows) + " tokens, which become their gradient");

    const double weights = base_.all();
    const double limit = machine_.host_bytes * kHostShare;
    const double room = std::max(0.0, limit - sum(Home::host));
    double budget = room;
    if (recipe_.base.device_memory || recipe_.base.host_memory) {
      budget = as_double(recipe_.base.device_memory.value_or(0)) +
               as_double(recipe_.base.host_memory.value_or(0));
      if (!recipe_.base.device_memory || !recipe_.base.host_memory)
        budget = std::max(budget, std::min(room, weights));
    }
    const double resident = std::min(weights, budget);
    plan.resident_fraction = weights > 0 ? resident / weights : 1;
    item(Home::host, "weights", resident,
         resident < weights ? gb(weights - resident) + " more come from disk on each pass"
                            : "all of the frozen model");
    if (resident < weights) {
      const double tile = std::max(base_.expert, base_.other / std::max(1.0, layers));
      item(Home::host, "ring", 3 * tile, "3 slots of the largest tile");
    }
    plan.device_tile_bytes = std::llround(resident);
    plan.host_bytes_peak = {sum(Home::host), "bytes", sum_text(Home::host)};
    plan.device_bytes_peak = {0, "bytes", "the CPU is the device: see host_bytes_peak"};
    if (sum(Home::host) > limit) {
      const bool by_budget = sum(Home::host) - resident <= limit && resident > 0;
      plan.misfits.push_back(
          {"memory: " + gb(sum(Home::host)) + " needed, " + gb(limit) + " usable of " +
               gb(machine_.host_bytes) + " (" + machine_.name + ")",
           by_budget ? "Set base.device_memory and base.host_memory to auto: frozen weights that "
                       "do not fit are then streamed from disk."
                     : advice(Home::host)});
    }

    TokenFlops flops = token_flops(recipe_, model_, keep);
    // The head meets only the tokens that carry loss; how many those are, the data says.
    double loss_share = 1;
    if (extras_.data && extras_.data->rows > 0) {
      loss_share =
          std::min(1.0, static_cast<double>(extras_.data->trained_tokens) /
                            static_cast<double>(extras_.data->rows * recipe_.data.sequence_len));
      flops.backward_other -= 4 * static_cast<double>(model_.head_parameters()) * (1 - loss_share);
    }
    plan.flops_per_token = {
        flops.total(), "FLOP",
        "forward " + short_text((flops.forward_other + flops.forward_expert) / 1e9) +
            " + backward " + short_text((flops.backward_other + flops.backward_expert) / 1e9) +
            " GFLOP" + (keep ? "" : ", recompute included") +
            (loss_share < 1 ? ", the head for " + short_text(100 * loss_share) + " % of the tokens"
                            : "")};
    const bool measured = extras_.calibration.has_value() && extras_.calibration->gflops > 0;
    const double profile = value == 4 ? machine_.gflops_float32 : machine_.gflops_bfloat16;
    const double threads_share =
        recipe_.compute.threads
            ? std::min(1.0, *recipe_.compute.threads * ranks_ / std::max(1, machine_.cores))
            : 1.0;
    const double gflops =
        std::max(1e-3, measured ? extras_.calibration->gflops : profile * threads_share);
    const double compute = flops.total() * tokens_ / (gflops * 1e9);
    forward_seconds_per_token_ = (flops.forward_other + flops.forward_expert +
                                  2 * static_cast<double>(model_.head_parameters()) * loss_share) /
                                 (gflops * 1e9);
    const double from_disk = 2 * (weights - resident);
    const double disk = from_disk / machine_.disk_bytes_per_second;
    plan.stream_bytes_per_step = {from_disk, "bytes",
                                  from_disk > 0 ? "2 passes x " + gb(from_disk / 2) + " from disk"
                                                : "all weights are in RAM"};
    plan.seconds_per_step = {std::max(compute, disk), "seconds",
                             "max(" + short_text(flops.total() / 1e9) + " GFLOP x " +
                                 whole(tokens_) + " tokens / " + short_text(gflops) +
                                 " GFLOP/s = " + short_text(compute) + ", disk " +
                                 short_text(disk) + "); " +
                                 (measured ? extras_.calibration->source : machine_.gflops_source)};
    plan.bound = disk > compute ? Bound::disk : Bound::compute;
    plan.bound_working =
        "a step: compute " + short_text(compute) + " s, disk " + short_text(disk) + " s";
    const double per_token = flops.total() / (gflops * 1e9);
    if (from_disk > 0) {
      plan.crossover_tokens_per_step = {
          std::ceil(disk / per_token), "tokens",
          short_text(disk) + " s of reading / " + short_text(per_token * 1e3) + " ms a token"};
    } else {
      plan.crossover_tokens_per_step = {std::nullopt, "tokens", "nothing is streamed"};
    }
    load_seconds_ = weights / machine_.disk_bytes_per_second;
    if (measured && extras_.calibration->disturbed) {
      plan.warnings.push_back(
          "CPU speed was measured while others used this machine: run `tailor calibrate` again");
    }
    if (!measured) plan.warnings.push_back("CPU speed is assumed (" + machine_.gflops_source + ")");
  }

  // ------------------------------------------------------------------ both
  void add_disk() {
    const bool packed =
        !recipe_.base.store && (recipe_.base.format != BaseFormat::as_is ||
                                recipe_.base.non_expert_format != BaseFormat::as_is);
    if (packed) {
      item(Home::disk, "streaming store", base_.all(),
           "packed once into the cache as " + std::string(choice_word(recipe_.base.format)));
    }
    const double kept = as_double(std::min<std::int64_t>(recipe_.checkpoint.keep, 1'000'000)) + 1;
    item(Home::disk, "checkpoints", kept * as_double(lora_.total()) * kCheckpointBytes,
         short_text(kept) + " of " + whole(as_double(lora_.total())) +
             " parameters x 12 B (keep, and one being written)");
    item(Home::disk, "adapter", as_double(lora_.total()) * 4, "float32");
    if (plan.activations == ActivationHome::disk) {
      item(Home::disk, "kept layer inputs", tokens_ * as_double(model_.layers * model_.hidden) * 2,
           "all layers");
    }
    if (extras_.data) item(Home::disk, "token store", as_double(extras_.data->store_bytes), "");
    plan.disk_bytes = {sum(Home::disk), "bytes",
                       sum_text(Home::disk) + "; the model itself not counted"};
    if (machine_.disk_free_bytes && sum(Home::disk) > *machine_.disk_free_bytes) {
      plan.misfits.push_back(
          {"disk: " + gb(sum(Home::disk)) + " needed, " + gb(*machine_.disk_free_bytes) + " free",
           "Free space, lower checkpoint.keep, or set TAILOR_CACHE and output_dir to another "
           "disk."});
    }
  }

  /// Forward passes over the validation rows: every eval_every_steps and after the last step.
  Figure evaluation(double steps) const {
    const bool wanted = !recipe_.data.validation.empty() || recipe_.data.validation_split;
    if (!extras_.data || !wanted) {
      return {0.0, "seconds",
              wanted ? "evaluations, not counted before the data is tokenised" : "no evaluation"};
    }
    const double every = as_double(recipe_.training.eval_every_steps);
    const double times = every > 0 ? std::ceil(steps / every) : 1.0;
    const double tokens = as_double(extras_.data->validation_rows * recipe_.data.sequence_len);
    const double each = tokens * forward_seconds_per_token_;
    return {times * each, "seconds",
            whole(times) + (times == 1 ? " evaluation" : " evaluations") + " x " +
                short_text(each) + " s"};
  }

  void add_job(const PriceBook& prices) {
    const auto& max_steps = recipe_.training.max_steps;
    std::optional<double> steps;
    std::string working;
    if (extras_.data && extras_.data->rows > 0) {
      const double rows = as_double(extras_.data->rows) * as_double(recipe_.training.num_epochs);
      steps = std::ceil(rows / as_double(recipe_.global_batch_rows()));
      working = whole(as_double(extras_.data->rows)) + " rows x " +
                whole(as_double(recipe_.training.num_epochs)) + " epochs / " +
                whole(as_double(recipe_.global_batch_rows())) + " rows a step";
    }
    if (max_steps && (!steps || as_double(*max_steps) < *steps)) {
      steps = as_double(*max_steps);
      working = "training.max_steps";
    }
    const std::string unknown =
        "the data is not tokenised yet and training.max_steps is null; run `tailor data prepare`, "
        "or set it";
    if (!steps) {
      plan.steps = {std::nullopt, "steps", unknown};
      plan.hours = {std::nullopt, "hours", unknown};
      plan.gpu_hours = {std::nullopt, "device hours", unknown};
      plan.usd = {std::nullopt, "usd", unknown};
    } else {
      const Figure evaluations = evaluation(*steps);
      const double hours =
          (*steps * *plan.seconds_per_step.value + *evaluations.value + load_seconds_) / 3600;
      plan.steps = {*steps, "steps", working};
      plan.hours = {hours, "hours",
                    "(" + whole(*steps) + " steps x " + short_text(*plan.seconds_per_step.value) +
                        " s + " + evaluations.working + " + " + short_text(load_seconds_) +
                        " s to load) / 3600"};
      plan.gpu_hours = {
          hours * ranks_, "device hours",
          short_text(hours) + " h x " + whole(ranks_) + (ranks_ == 1 ? " rank" : " ranks")};
    }
    plan.price = quote(prices, recipe_.cost.price, machine_.sku, machine_.tier, extras_.at_unix_ms);
    if (!plan.price.usd_micros_per_device_hour) {
      plan.usd = {std::nullopt, "usd", plan.price.reason};
      return;
    }
    if (!steps) return;
    const double rate = as_double(*plan.price.usd_micros_per_device_hour) / 1e6;
    plan.usd = {*plan.gpu_hours.value * rate, "usd",
                short_text(*plan.gpu_hours.value) + " device hours x " +
                    usd_text(*plan.price.usd_micros_per_device_hour) + " (" + plan.price.id + ", " +
                    plan.price.kind + ")"};
    const auto& budget = recipe_.budget;
    if (budget.usd_micros && *plan.usd.value > as_double(*budget.usd_micros) / 1e6) {
      plan.warnings.push_back("the run is forecast to cost more than budget.usd " +
                              usd_text(*budget.usd_micros) + ": it will stop at a checkpoint");
    }
    if (budget.gpu_hours && *plan.gpu_hours.value > *budget.gpu_hours) {
      plan.warnings.push_back("the run is forecast to take more than budget.gpu_hours " +
                              short_text(*budget.gpu_hours) + ": it will stop at a checkpoint");
    }
  }

  const Recipe& recipe_;
  const ModelFacts& model_;
  const Machine& machine_;
  const PlanExtras& extras_;
  LoraCounts lora_;
  BaseBytes base_;
  double ranks_, tokens_, micro_tokens_ = 0, load_seconds_ = 0;
  double forward_seconds_per_token_ = 0;
};

Json figure_json(const Figure& figure) {
  Json value = nullptr;
  if (figure.value && std::isfinite(*figure.value)) {
    const bool counted = figure.unit == "bytes" || figure.unit == "tokens" ||
                         figure.unit == "steps" || figure.unit == "parameters";
    if (counted) {
      value = std::llround(*figure.value);
    } else {
      value = *figure.value;
    }
  }
  return {{"value", value}, {"unit", figure.unit}, {"working", figure.working}};
}

}  // namespace

std::string_view bound_name(Bound bound) {
  switch (bound) {
    case Bound::compute:
      return "compute";
    case Bound::link:
      return "link";
    case Bound::disk:
      return "disk";
    case Bound::network:
      return "network";
  }
  return "?";
}

Plan make_plan(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
               const PriceBook& prices, const PlanExtras& extras) {
  Planner planner(recipe, model, machine, extras);
  planner.run(prices);
  return std::move(planner.plan);
}

Json plan_json(const Plan& plan) {
  Json out;
  out["fits"] = {{"value", plan.fits}, {"unit", "boolean"}, {"working", plan.fits_working}};
  out["device_bytes_peak"] = figure_json(plan.device_bytes_peak);
  out["host_bytes_peak"] = figure_json(plan.host_bytes_peak);
  out["disk_bytes"] = figure_json(plan.disk_bytes);
  out["stream_bytes_per_step"] = figure_json(plan.stream_bytes_per_step);
  out["tokens_per_step"] = figure_json(plan.tokens_per_step);
  out["seconds_per_step"] = figure_json(plan.seconds_per_step);
  out["tokens_per_second"] = figure_json(plan.tokens_per_second);
  out["crossover_tokens_per_step"] = figure_json(plan.crossover_tokens_per_step);
  out["steps"] = figure_json(plan.steps);
  out["hours"] = figure_json(plan.hours);
  out["gpu_hours"] = figure_json(plan.gpu_hours);
  out["usd"] = figure_json(plan.usd);
  out["bound"] = {
      {"value", bound_name(plan.bound)}, {"unit", "resource"}, {"working", plan.bound_working}};
  out["flops_per_token"] = figure_json(plan.flops_per_token);
  out["trainable_parameters"] = figure_json(plan.trainable_parameters);
  out["resident_fraction"] = plan.resident_fraction;
  out["price"] = {{"id", plan.price.id}, {"kind", plan.price.kind}, {"source", plan.price.source}};
  Json items = Json::array();
  for (const MemoryItem& item : plan.items) {
    const char* home = item.home == Home::device ? "device"
                       : item.home == Home::host ? "host"
                                                 : "disk";
    items.push_back({{"home", home},
                     {"name", item.name},
                     {"bytes", std::llround(item.bytes)},
                     {"working", item.working}});
  }
  out["items"] = std::move(items);
  Json misfits = Json::array();
  for (const Plan::Misfit& misfit : plan.misfits)
    misfits.push_back({{"what", misfit.what}, {"mend", misfit.mend}});
  out["misfits"] = std::move(misfits);
  out["warnings"] = plan.warnings;
  return out;
}

Error does_not_fit(const Plan& plan) {
  TAILOR_CHECK(!plan.misfits.empty());
  const Plan::Misfit& first = plan.misfits.front();
  std::string where;
  for (std::size_t i = 1; i < plan.misfits.size(); ++i) {
    if (i > 1) where += "\n";
    where += "also " + plan.misfits[i].what;
  }
  return {Fault::does_not_fit, {first.what, where, first.mend}};
}

}  // namespace tailor
