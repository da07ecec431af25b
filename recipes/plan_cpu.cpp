#include <algorithm>
#include <cmath>

#include "base/units.h"
#include "data/store/layout.h"
#include "recipes/plan_text.h"
#include "recipes/planner.h"
#include "recipes/ring.h"

namespace tailor {
namespace {

using Home = MemoryItem::Home;

constexpr double kGb = 1e9;

}  // namespace

/// What the backward pass wants back from every layer, beside its input.
double Planner::kept_bytes(double value_bytes) const {
  const double attention = as_double(model_.attention_kept);
  const double dense = attention + 2 * as_double(model_.dense_width);
  const double moe =
      attention + 2 * as_double(model_.shared_width() + model_.top_k * model_.expert_width);
  return tokens_ * value_bytes *
         (as_double(model_.dense_layers) * dense + as_double(model_.moe_layers) * moe);
}

bool Planner::dequantised(BaseFormat format) const {
  if (format == BaseFormat::as_is) format = model_.published;
  return format != BaseFormat::bf16 && format != BaseFormat::as_is;
}

double Planner::scratch_parameters() const {
  std::int64_t largest = 0;
  if (model_.experts > 0 && dequantised(recipe_.base.format)) largest = model_.expert_parameters();
  if (dequantised(recipe_.base.non_expert_format)) {
    largest = std::max({largest, model_.attention_parameters(),
                        model_.dense_layers > 0 ? model_.dense_mlp_parameters() : 0,
                        model_.shared_experts * model_.expert_parameters()});
  }
  return as_double(largest);
}

double Planner::dequantise_bytes(double value_bytes) const {
  double bytes = 0;
  if (dequantised(recipe_.base.format)) {
    bytes += touched_share(model_, tokens_) *
             (base_.routed + as_double(model_.routed_parameters()) * value_bytes);
  }
  if (dequantised(recipe_.base.non_expert_format))
    bytes += base_.other + as_double(model_.other_parameters()) * value_bytes;
  return bytes;
}

void Planner::run_cpu() {
  const double value_bytes = recipe_.compute.dtype == ComputeType::float32 ? 4 : 2;
  // Recomputing costs a third more arithmetic, so it is worth it only where memory is short.
  constexpr double kShareForActivations = 0.25;
  const KeepActivations choice = recipe_.compute.keep_activations;
  const bool keep = choice == KeepActivations::all ||
                    (choice == KeepActivations::automatic &&
                     kept_bytes(value_bytes) <= kShareForActivations * machine_.host_bytes);
  plan.keep_activations = keep;
  plan.activations = recipe_.base.activations == ActivationHome::disk ? ActivationHome::disk
                                                                      : ActivationHome::host;
  plan.expert_state = recipe_.lora.expert_state == StateHome::disk && lora_.experts > 0
                          ? StateHome::disk
                          : StateHome::memory;
  add_cpu_memory(keep, value_bytes);
  const bool may_page = recipe_.lora.expert_state == StateHome::automatic && lora_.experts > 0;
  if (!plan.misfits.empty() && may_page) {
    plan.items.clear();
    plan.misfits.clear();
    plan.expert_state = StateHome::disk;
    add_cpu_memory(keep, value_bytes);
  }
  add_cpu_time(keep, value_bytes);
}

/// What is trained: in RAM, or a window of it that is paged.
void Planner::add_cpu_factors(double value_bytes) {
  const bool paged = plan.expert_state == StateHome::disk;
  const double in_memory = as_double(paged ? lora_.other() : lora_.total());
  item(Home::host, "factors", in_memory * (value_bytes == 2 ? kTrainBytes : 16),
       whole(in_memory) + " parameters x " + (value_bytes == 2 ? "18" : "16") +
           " B: float32 value, gradient, two moments" + (value_bytes == 2 ? ", bf16 copy" : ""));
  if (paged) {
    const double layer = as_double(lora_.experts) / as_double(model_.moe_layers);
    constexpr double kUpdateWindows = 4 * 4 * 4 * 1048576.0;
    item(Home::host, "expert factors in use",
         layer * (2 * value_bytes + 4) + std::min(kUpdateWindows, as_double(lora_.experts) * 16),
         "of two layers the copies, of one the gradients, " + whole(layer) +
             " parameters each; 4 windows of 4 MiB of each arena in the update");
  }
}

/// What passes take, where it was measured for this kind of step: of one rank, whose activations
/// stay in memory. The layers that were not measured keep as much as the formula says.
bool Planner::add_measured_activations(bool keep, double value_bytes) {
  if (!extras_.calibration || !extras_.calibration->step || ranks_ > 1) return false;
  const MeasuredStep& step = *extras_.calibration->step;
  if (step.kept != keep || !step.in_memory || plan.activations == ActivationHome::disk)
    return false;
  const double of_token = as_double(model_.layers * model_.hidden) * value_bytes +
                          (keep ? kept_bytes(value_bytes) / tokens_ : 0);
  const double missing = of_token * step.tokens_max *
                         (1 - as_double(step.measured_layers()) / as_double(step.model_layers()));
  item(Home::host, "activations and scratch",
       (step.pass_bytes + missing) * tokens_ / step.tokens_max,
       gb(step.pass_bytes) + " measured for " + whole(step.tokens_max) + " tokens" +
           (missing > 0 ? ", " + gb(missing) + " kept by the other layers" : "") + ", for " +
           whole(tokens_) + " of full rows");
  return true;
}

/// What the layers keep, in RAM or a window of it that is paged, and what they work in.
void Planner::add_cpu_activations(bool keep, double value_bytes) {
  const double layers = as_double(model_.layers);
  const double micro =
      std::min(as_double(recipe_.training.micro_batch_size * recipe_.data.sequence_len),
               std::max(1.0, tokens_ / ranks_));
  const double inputs = tokens_ * layers * as_double(model_.hidden) * value_bytes;
  const double rest = keep ? kept_bytes(value_bytes) : 0;
  if (plan.activations == ActivationHome::host) {
    item(Home::host, "kept layer inputs", inputs,
         whole(tokens_) + " tokens x " + whole(layers) + " layers x D x " +
             short_text(value_bytes) + " B");
    item(Home::host, "kept activations", rest,
         "q, k and v or their latents, attention's result, the stream after it, gate and up, all "
         "layers");
  } else {
    kept_on_disk_ = inputs + rest;
    item(Home::host, "kept layer inputs in use", kept_on_disk_ * std::min(1.0, 3 / layers),
         "a window of 3 layers; the others wait on the disk");
  }
  item(Home::host, "residual stream", tokens_ * as_double(model_.hidden) * 2 * 4,
       "value and gradient, float32");
  if (model_.experts > 0) {
    item(Home::host, "routed rows pool",
         tokens_ * as_double(model_.top_k) *
             as_double(4 * model_.hidden + 4 * model_.expert_width) * value_bytes,
         "rows sorted by expert with gate, up and their product");
  }
  const double expanded = 2 * as_double(model_.attention_expanded);  // and its gradient
  item(Home::host, "micro-batch workspace",
       micro * (workspace_width(model_) + expanded) * 4 * ranks_,
       whole(micro) + " tokens through one block");
  const double head_rows = std::min(
      as_double(head_chunk_rows(model_.vocab, static_cast<std::int64_t>(value_bytes))), tokens_);
  const double trained = tokens_ * fill_ * loss_share_;
  item(Home::host, "head chunk",
       head_rows * as_double(model_.vocab) * value_bytes * ranks_ +
           trained * as_double(model_.hidden) * (4 * value_bytes + 4),
       "logits of " + whole(head_rows) + " tokens, which become their weights, and five rows for " +
           "each of the " + whole(trained) + " that carry loss");
  item(Home::host, "dequantise scratch", scratch_parameters() * value_bytes * ranks_,
       "the largest piece of a layer that is packed, its values");
}

void Planner::add_cpu_memory(bool keep, double value_bytes) {
  if (extras_.calibration && extras_.calibration->step) {
    const MeasuredStep& step = *extras_.calibration->step;
    const double steps = job_steps().value.value_or(1e9);
    item(Home::host, "process", step.process_bytes * ranks_,
         "program, LibTorch and its buffers, measured; each rank");
    item(Home::host, "compiled kernels", step.kernels_after(steps) * ranks_,
         gb(step.kernel_bytes) +
             " for every number of rows in a micro-batch of the run's steps and "
             "evaluation, measured; each rank");
  } else {
    // What the demo run's peak of 1.57 GB held beyond the items below.
    item(Home::host, "process", 0.36 * kGb * ranks_,
         "program, LibTorch and what the tokenizer leaves behind, each rank");
  }
  add_cpu_factors(value_bytes);
  if (!add_measured_activations(keep, value_bytes)) add_cpu_activations(keep, value_bytes);
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
  // Where not all fits, rows of the embedding are read by index, and the rest streams.
  const double tiles = weights - base_.embedding;
  // Experts' slots beyond the first are paid for from the budget, as StoreWeights does it.
  const BudgetShare share =
      share_budget(std::llround(budget / ranks_), std::llround(weights / ranks_),
                   std::llround(base_.expert * as_double(model_.experts) / ranks_));
  rank_ring_bytes_ = share.ring_bytes;
  const double resident = budget >= weights
                              ? weights
                              : std::min(tiles, static_cast<double>(share.resident_bytes) * ranks_);
  streamed_bytes_ = budget >= weights ? 0 : tiles - resident;
  // Tiles of layers stay first, since they are wanted twice a step.
  streamed_head_bytes_ = std::min(streamed_bytes_, base_.head);
  plan.resident_fraction = tiles > 0 ? 1 - streamed_bytes_ / tiles : 1;
  item(Home::host, "weights", resident,
       streamed_bytes_ > 0 ? gb(streamed_bytes_) +
                                 " more come from disk, the head once a step, the rest on each pass"
                           : "all of the frozen model");
  add_cpu_ring();
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
}

void Planner::add_cpu_ring() {
  const double run =
      std::min(1.0, as_double(kVocabularyRunElements) /
                        as_double(std::max<std::int64_t>(1, model_.head_parameters())));
  const double head = base_.head * run;
  const double experts =
      model_.experts == 0
          ? 0
          : base_.expert * as_double(experts_per_tile(static_cast<std::int64_t>(base_.expert),
                                                      model_.experts));
  const double other = base_.other / std::max(1.0, as_double(model_.other_parameters()));
  const double layer =
      other * (as_double(model_.attention_parameters()) +
               as_double(std::max(model_.dense_layers > 0 ? model_.dense_mlp_parameters() : 0,
                                  model_.shared_experts * model_.expert_parameters())));
  if (ranks_ > 1) {
    item(Home::host, "gathered tiles",
         ranks_ * ((experts + head) * as_double(kGatherSlots) + layer * as_double(kLayerSlots)),
         "whole tiles, each rank: " + std::to_string(kGatherSlots) + " slots of " + gb(experts) +
             " for experts and of " + gb(head) + " for the head, " + std::to_string(kLayerSlots) +
             " of " + gb(layer) + " for the rest of a layer");
  }
  if (streamed_bytes_ <= 0) return;
  // Of several ranks each reads its part of a tile. Tiles are read in order, and of the rest of a
  // layer two lie ahead at most: slots beyond the experts of three layers are never written to.
  const std::int64_t of_layer =
      model_.experts == 0
          ? 0
          : div_ceil(model_.experts,
                     experts_per_tile(static_cast<std::int64_t>(base_.expert), model_.experts));
  const std::int64_t expert_slots =
      std::min(ring_slots(static_cast<std::int64_t>(experts / ranks_), rank_ring_bytes_),
               (kLayerSlots + 1) * of_layer);
  const std::int64_t head_slots =
      ring_slots(static_cast<std::int64_t>(head / ranks_), kHeadRingBytes);
  plan.ring_bytes = std::llround(experts * as_double(expert_slots) + head * as_double(head_slots) +
                                 layer * as_double(kLayerSlots));
  item(Home::host, "ring", as_double(plan.ring_bytes),
       (ranks_ > 1 ? "parts of tiles, over all ranks: " : std::string()) +
           (experts > 0
                ? std::to_string(expert_slots) + " slots of " + gb(experts) + " for experts, "
                : std::string()) +
           std::to_string(head_slots) + " of " + gb(head) + " for the head, " +
           std::to_string(kLayerSlots) + " of " + gb(layer) + " for the rest of a layer");
}

/// Without a measurement of the recipe's own layers: all arithmetic at one speed.
Planner::CpuStep Planner::cpu_step_of(const TokenFlops& flops, double value_bytes) const {
  const bool measured = extras_.calibration.has_value() && extras_.calibration->gflops > 0;
  const double profile = value_bytes == 4 ? machine_.gflops_float32 : machine_.gflops_bfloat16;
  const double threads_share =
      recipe_.compute.threads
          ? std::min(1.0, *recipe_.compute.threads * ranks_ / std::max(1, machine_.cores))
          : 1.0;
  const double gflops =
      std::max(1e-3, measured ? extras_.calibration->gflops : profile * threads_share);
  const double computed = tokens_ * fill_;  // there is no padding in a step
  const double seconds = flops.total() * computed / (gflops * 1e9);
  const double unpacked = dequantise_bytes(value_bytes);
  const double a_pass = unpacked / machine_.memory_bytes_per_second;
  CpuStep out;
  out.unpacking = 2 * a_pass;
  const double layers = (flops.forward_other + flops.forward_expert) / (gflops * 1e9);
  const double head = flops.head / (gflops * 1e9);
  out.forward = (layers + 2 * head) * computed + a_pass;
  out.backward = seconds - (layers + 2 * head) * computed + a_pass;
  out.forward_per_token = layers + head;
  out.working =
      short_text(flops.total() / 1e9) + " GFLOP x " + whole(computed) + " tokens / " +
      short_text(gflops) + " GFLOP/s = " + short_text(seconds) +
      (out.unpacking > 0
           ? " + dequantise 2 passes x " + gb(unpacked) + " packed and unpacked / " +
                 gb(machine_.memory_bytes_per_second) + "/s = " + short_text(out.unpacking)
           : "");
  out.source = measured ? extras_.calibration->source : machine_.gflops_source;
  return out;
}

/// The parts that were measured, for this recipe's tokens, arithmetic and factors. For the recipe
/// that was measured the factors are 1 but for rows of another length than those of the first
/// steps; they differ where advice plans a changed recipe.
Planner::CpuStep Planner::cpu_step_as_measured(const MeasuredStep& measured,
                                               const TokenFlops& flops, double value_bytes) const {
  const double computed = tokens_ * fill_;
  const double layers = computed / measured.tokens * (flops.total() - 2 * flops.head) /
                        measured.layer_flops_per_token;
  const double head = computed * loss_share_ / measured.trained_tokens * measured.head_seconds;
  const double unpacked = measured.dequantising ? 0 : dequantise_bytes(value_bytes);
  const double a_pass = unpacked / machine_.memory_bytes_per_second;
  CpuStep out;
  out.unpacking = 2 * a_pass;
  out.forward = layers * measured.forward_seconds() + head + a_pass;
  out.backward = layers * measured.backward_seconds() + a_pass;
  out.update = measured.update_seconds * as_double(lora_.total()) / measured.parameters;
  out.over = streamed_bytes_ > 0 && measured.stream ? measured.stream->over() : 1;
  out.forward_per_token = (layers * measured.forward_seconds() + head / 2) / computed;
  for (const MeasuredStep::Layers& kind : measured.layers) {
    out.working += (out.working.empty() ? "(" : " + ") + whole(as_double(kind.in_model)) + " " +
                   kind.kind + " x (" + short_text(kind.forward_seconds) + " + " +
                   short_text(kind.backward_seconds) + ")";
  }
  out.working += ")" + (layers == 1 ? std::string() : " x " + number_text(layers, 4)) + " + head " +
                 short_text(head) + " + update " + short_text(out.update) +
                 (out.unpacking > 0 ? " + dequantise " + short_text(out.unpacking) : "");
  out.source = measured.source();
  return out;
}

void Planner::add_cpu_time(bool keep, double value_bytes) {
  const TokenFlops flops = token_flops(recipe_, model_, keep, loss_share_);
  plan.flops_per_token = {
      flops.total(), "FLOP",
      "forward " + short_text((flops.forward_other + flops.forward_expert) / 1e9) + " + backward " +
          short_text((flops.backward_other + flops.backward_expert) / 1e9) + " GFLOP" +
          (keep ? "" : ", recompute included") +
          (loss_share_ < 1 ? ", the head for " + short_text(100 * loss_share_) + " % of the tokens"
                           : "")};
  const bool as_measured = extras_.calibration && extras_.calibration->step;
  const CpuStep step = as_measured
                           ? cpu_step_as_measured(*extras_.calibration->step, flops, value_bytes)
                           : cpu_step_of(flops, value_bytes);
  forward_seconds_per_token_ = step.forward_per_token;
  const double passes = step.forward + step.backward;
  const double weights = base_.all();
  const double from_disk = 2 * streamed_bytes_ - streamed_head_bytes_;
  const double read_forward = streamed_bytes_ / machine_.disk_bytes_per_second;
  const double read_backward =
      (streamed_bytes_ - streamed_head_bytes_) / machine_.disk_bytes_per_second;
  const double reading = read_forward + read_backward;
  add_scratch(value_bytes, kept_on_disk_);
  const double scratch = *plan.scratch_bytes_per_step.value / machine_.disk_bytes_per_second;
  const double disk = reading + scratch;
  plan.stream_bytes_per_step = {from_disk, "bytes",
                                from_disk > 0 ? gb(streamed_bytes_) + " forward + " +
                                                    gb(streamed_bytes_ - streamed_head_bytes_) +
                                                    " backward, without the head, from disk"
                                              : "all weights are in RAM"};
  if (as_measured) {
    // A pass waits for its own reading: what the other pass has to spare does not help it.
    const double forward = std::max(step.forward, read_forward);
    const double backward = std::max(step.backward, read_backward + scratch);
    plan.seconds_per_step = {
        (forward + backward) * step.over + step.update, "seconds",
        step.working +
            (disk > 0 ? "; of a pass the longer: forward " + short_text(step.forward) + ", disk " +
                            short_text(read_forward) + "; backward " + short_text(step.backward) +
                            ", disk " + short_text(read_backward + scratch) +
                            (step.over != 1 ? "; both x " + number_text(step.over, 4) +
                                                  ", measured, for reading beside computing"
                                            : "")
                      : "") +
            "; " + step.source};
  } else {
    plan.seconds_per_step = {
        std::max(passes, disk), "seconds",
        "max(" + step.working + ", disk " + short_text(disk) + "); " + step.source};
  }
  plan.bound = disk > passes ? Bound::disk : Bound::compute;
  plan.bound_working =
      "a step: compute " + short_text(passes - step.unpacking + step.update) + " s, " +
      (step.unpacking > 0 ? "dequantise " + short_text(step.unpacking) + " s, " : "") + "disk " +
      short_text(disk) + " s";
  const double per_token = (passes - step.unpacking) / (tokens_ * fill_);
  if (from_disk > 0) {
    plan.crossover_tokens_per_step = {
        std::max(1.0, std::ceil((reading - step.unpacking) / per_token)), "tokens",
        short_text(reading) + " s of reading" +
            (step.unpacking > 0 ? " - " + short_text(step.unpacking) + " s of dequantising" : "") +
            " / " + short_text(per_token * 1e3) + " ms a token"};
  } else {
    plan.crossover_tokens_per_step = {std::nullopt, "tokens", "nothing is streamed"};
  }
  load_bytes_ = weights - streamed_bytes_;
  const bool measured = as_measured || (extras_.calibration && extras_.calibration->gflops > 0);
  if (measured && extras_.calibration->disturbed) {
    plan.warnings.push_back(
        "CPU speed was measured while others used this machine: run `tailor calibrate` again");
  }
  if (!measured) plan.warnings.push_back("CPU speed is assumed (" + machine_.gflops_source + ")");
}

}  // namespace tailor
