#include "recipes/stream_model.h"

#include <algorithm>
#include <cmath>

#include "base/units.h"
#include "recipes/choices.h"
#include "recipes/plan_text.h"

namespace tailor {
namespace {

constexpr double kGb = 1e9;
constexpr double kDeviceShare = 0.97;
constexpr double kMemoryEfficiency = 0.8;
constexpr double kPagedBytes =
    20;  // kTrainBytes with a second bf16 buffer that rides with the tile
constexpr double kSlotFactorBytes = 6;  // bf16 factor, float32 gradient
constexpr double kHeadChunkRows = 1024;
constexpr double kHeadRunBytes = 16 << 20;  // rows of the vocabulary that stream together
constexpr double kKeptWindowLayers = 4;
constexpr std::int64_t kTileAlignment = 4096;
constexpr double kTileHeaderBytes = 4096;
constexpr double kBackwardSweeps = 5.0 / 3;  // gate and up again, then all three transposed
constexpr double kExposedSeconds = 0.25;     // first tile, last gradients, the optimizer's tail

/// Collects parts, leaving out what takes nothing.
struct Parts {
  std::vector<MemoryPart> parts;
  double sum = 0;
  void add(std::string name, double bytes, std::string working) {
    if (!(bytes > 0)) return;
    parts.push_back({std::move(name), bytes, std::move(working)});
    sum += bytes;
  }
};

double expert_rows(const ModelFacts& model, double tokens) {
  return std::max(1.0, tokens * as_double(model.top_k) / as_double(model.experts)) * 2;
}

}  // namespace

Recipe scheduled_recipe(const Recipe& recipe, const StepSchedule& schedule) {
  Recipe out = recipe;
  if (!schedule.kv_b_by_name && out.lora.targets.attention)
    out.lora.targets.modules.emplace_back("kv_b_proj");
  return out;
}

Geometry stream_geometry(const Recipe& given, const ModelFacts& model, const StepSchedule& schedule,
                         double loss_share) {
  const Recipe recipe = scheduled_recipe(given, schedule);
  return {model, count_lora(recipe, model),
          base_bytes(recipe, model,
                     schedule.routers_bfloat16 ? RouterForm::bfloat16 : RouterForm::packed),
          token_flops(recipe, model, false, schedule.loss_positions ? loss_share : 1)};
}

Node stream_node(const Machine& machine, int ranks) {
  Node node;
  node.ranks = ranks;
  node.peak_flops = machine.peak_flops;
  node.flops_per_second = machine.peak_flops * machine.efficiency;
  node.device_bytes = machine.device_bytes;
  node.device_rate = machine.device_bytes_per_second * kMemoryEfficiency;
  node.to_device_rate = machine.to_device_bytes_per_second;
  node.from_device_rate = machine.from_device_bytes_per_second;
  node.between_devices_rate = machine.between_devices_bytes_per_second;
  node.disk_rate = machine.disk_bytes_per_second;
  return node;
}

double ring_slot_bytes(const Geometry& geometry, const StepSchedule& schedule) {
  double packed = geometry.base.expert;
  if (schedule.whole_tile_slots)
    packed =
        as_double(align_up(std::llround(std::ceil(packed + kTileHeaderBytes)), kTileAlignment));
  return packed + as_double(geometry.lora.per_expert) * kSlotFactorBytes;
}

double touched_share(const ModelFacts& model, double tokens) {
  if (model.experts == 0) return 0;
  return 1 - std::pow(1 - 1 / as_double(model.experts), tokens * as_double(model.top_k));
}

GpuMemory device_memory(const Geometry& geometry, const Node& node, const StepOptions& options) {
  const ModelFacts& model = geometry.model;
  const BaseBytes& base = geometry.base;
  const double ranks = node.ranks, tokens = options.tokens / ranks;
  const double hidden = as_double(model.hidden);
  Parts out;
  out.add("context", kGb * (ranks > 1 ? 2 : 1),
          "CUDA, its libraries" + std::string(ranks > 1 ? ", NCCL" : ""));
  const double gathered = ranks > 1
                              ? 4 * as_double(model.attention_parameters() +
                                              model.shared_experts * model.expert_parameters())
                              : 0;
  out.add("weights outside experts", base.other / ranks + gathered,
          "attention, dense MLPs, shared experts and routers: " + gb(base.other) +
              (ranks > 1 ? " / " + short_text(ranks) + " ranks + two gathered layers" : ""));
  if (options.stream_head) {
    out.add("vocabulary ring", 2 * std::min(base.head, kHeadRunBytes),
            "2 runs of the head, which waits on the host");
  } else {
    out.add("vocabulary head", base.head / ranks, "bf16; embedding rows are read from the host");
  }
  out.add("factors outside experts", as_double(geometry.lora.other()) * kTrainBytes / ranks,
          whole(as_double(geometry.lora.other())) +
              " parameters x 18 B: float32 value, gradient, two moments, bf16 copy");
  if (model.experts > 0) {
    out.add("expert ring", options.ring_slots * ring_slot_bytes(geometry, options.schedule),
            std::to_string(options.ring_slots) + " slots x (" + gb(base.expert) +
                " packed + factors and gradients)");
    out.add("dequantised experts", 2 * as_double(model.expert_parameters()) * 2,
            "2 experts in bf16");
    out.add("routed rows pool", tokens * as_double(model.top_k) * hidden * 4,
            "gather and scatter, bf16");
    out.add("expert workspace",
            expert_rows(model, options.tokens) *
                as_double(3 * model.expert_width + 2 * model.hidden) * 4,
            "twice the mean rows of an expert");
  }
  out.add("residual stream", tokens * hidden * 4,
          whole(tokens) + " tokens x D x (value + gradient) bf16");
  const double micro = options.schedule.short_micro_batch
                           ? std::min(options.micro_tokens, std::max(1.0, tokens))
                           : options.micro_tokens;
  out.add("micro-batch workspace", micro * workspace_width(model) * 2,
          whole(micro) + " tokens through one block");
  out.add("head chunk", kHeadChunkRows * as_double(model.vocab) * 6,
          whole(kHeadChunkRows) + " rows of logits, float32 and bf16");
  const bool on_device = options.kept_inputs == ActivationHome::device;
  out.add("kept layer inputs",
          tokens * hidden * 2 * (on_device ? as_double(model.layers) : kKeptWindowLayers),
          on_device ? "all layers, bf16"
                    : "a window of 4 layers; the others wait on the " +
                          std::string(choice_word(options.kept_inputs)));
  GpuMemory memory;
  memory.parts = std::move(out.parts);
  memory.used = out.sum;
  memory.limit = node.device_bytes * kDeviceShare;
  memory.expert_bytes = base.routed / ranks;
  if (memory.expert_bytes > 0) {
    memory.resident_fraction = options.resident_fraction.value_or(
        std::clamp(memory.room() / memory.expert_bytes, 0.0, 1.0));
  }
  return memory;
}

HostMemory host_memory(const Geometry& geometry, const Node& node, const StepOptions& options) {
  const ModelFacts& model = geometry.model;
  const BaseBytes& base = geometry.base;
  HostMemory memory;
  memory.tile_bytes = std::min(options.host_tile_bytes.value_or(base.routed), base.routed);
  Parts out;
  out.add("process and pinned staging", 8 * kGb * node.ranks / 4 + 4 * kGb,
          "program, libraries, pinned slots");
  out.add("embedding", base.embedding > 0 ? base.embedding : base.head, "rows are read by index");
  if (options.stream_head) out.add("vocabulary head", base.head, "streams in runs of its rows");
  const bool paged = options.state_on_disk && options.schedule.paged_state;
  const double layer =
      model.moe_layers > 0 ? as_double(geometry.lora.experts) / as_double(model.moe_layers) : 0;
  if (paged) {
    out.add("expert factors in use",
            std::min(2.0, as_double(model.moe_layers)) * layer * kPagedBytes,
            "a window of 2 layers x 20 B; the others wait on the disk");
  } else {
    out.add("expert factors and optimizer", as_double(geometry.lora.experts) * kPagedBytes,
            whole(as_double(geometry.lora.experts)) + " parameters x 20 B");
  }
  if (options.kept_inputs == ActivationHome::host) {
    out.add("kept layer inputs", options.tokens * as_double(model.layers * model.hidden) * 2,
            whole(options.tokens) + " tokens x " + whole(as_double(model.layers)) +
                " layers x D x 2 B");
  }
  out.add("experts in RAM", memory.tile_bytes,
          memory.tile_bytes < base.routed
              ? gb(base.routed - memory.tile_bytes) + " more come from disk"
              : "all of them, packed");
  memory.parts = std::move(out.parts);
  memory.used = out.sum;
  return memory;
}

double StreamEstimate::seconds() const {
  return std::max({link_forward, disk_forward, compute_forward, network_forward}) +
         std::max({link_backward, disk_backward, compute_backward, network_backward}) + exposed;
}

double StreamEstimate::stream() const {
  return std::max(link_forward, disk_forward) + std::max(link_backward, disk_backward);
}

StreamEstimate estimate(const Geometry& geometry, const Node& node, const StepOptions& options) {
  const ModelFacts& model = geometry.model;
  const BaseBytes& base = geometry.base;
  const StepSchedule& schedule = options.schedule;
  const double ranks = node.ranks, tokens = options.tokens / ranks;
  const double rate = node.flops_per_second;
  const TokenFlops& flops = geometry.flops;

  StreamEstimate out;
  out.tokens = options.tokens;
  out.resident_fraction = options.resident_fraction
                              ? *options.resident_fraction
                              : device_memory(geometry, node, options).resident_fraction;
  const double touched = touched_share(model, options.tokens);
  const double crossing = schedule.whole_tiles_cross && model.experts > 0 ? 1 : touched;
  const double streamed = base.routed * (1 - out.resident_fraction) * crossing;    // all ranks
  const double factors = as_double(geometry.lora.experts) * 2 * crossing / ranks;  // bf16
  const double gradients = as_double(geometry.lora.experts) * 4 * touched / ranks;
  const double head = options.stream_head ? base.head : 0;  // its read falls to the backward
  const double kept = tokens * as_double(model.layers * model.hidden) * 2;
  const double kept_crosses = options.kept_inputs == ActivationHome::device ? 0 : kept;

  out.stream_bytes = 2 * streamed + head;
  const double read =
      options.host_tile_bytes ? std::max(0.0, streamed - *options.host_tile_bytes * crossing) : 0;
  const bool kept_read =
      schedule.kept_inputs_on_disk && options.kept_inputs == ActivationHome::disk;
  out.disk_forward = out.disk_backward = (read + (kept_read ? kept * ranks : 0)) / node.disk_rate;
  if (options.state_on_disk && schedule.paged_state) {
    // The update, with value and moments both ways, the copy out and the gradient in, runs beside
    // the forward pass; the norm and the backward pass read the gradient and the copy, and write
    // the gradient.
    const double experts = as_double(geometry.lora.experts);
    const double backward = 4 + 4 + 2;
    out.disk_forward += experts * (paged_state(2).traffic - backward) / node.disk_rate;
    out.disk_backward += experts * backward / node.disk_rate;
  }
  out.link_forward = std::max((streamed / ranks + factors) / node.to_device_rate,
                              kept_crosses / node.from_device_rate);
  // Backward the kept inputs come back, and the float32 gradients of the experts' factors leave.
  out.link_backward =
      std::max((streamed / ranks + factors + kept_crosses + head / ranks) / node.to_device_rate,
               gradients / node.from_device_rate);

  // Every rank dequantises all experts it gets: packed tiles are gathered, tokens stay.
  const double routed = as_double(model.routed_parameters()) * touched;
  const double dequantise = (base.routed * touched + routed * 2) / node.device_rate;  // a pass
  const double read_once = routed * 2 / node.device_rate;  // the scratch, by one GEMM sweep
  out.dequantise = 2 * dequantise;
  out.compute_forward = flops.forward_other * tokens / rate +
                        std::max(flops.forward_expert * tokens / rate, read_once) + dequantise;
  out.compute_backward =
      flops.backward_other * tokens / rate +
      std::max(flops.backward_expert * tokens / rate, kBackwardSweeps * read_once) + dequantise;
  if (ranks > 1 && node.between_devices_rate > 0) {
    const double share = (ranks - 1) / ranks / node.between_devices_rate;
    out.network_forward = base.routed * crossing * share;
    out.network_backward = out.network_forward + head * share;
  }
  out.exposed = kExposedSeconds;
  const double flop_seconds = tokens / out.seconds() / node.peak_flops;
  out.peak_share = flops.total() * flop_seconds;
  out.model_peak_share = 4 * as_double(model.active_parameters()) * flop_seconds;
  return out;
}

std::optional<double> crossover(const Geometry& geometry, const Node& node, StepOptions options) {
  if (!options.resident_fraction) {
    options.tokens = 32'768;
    options.resident_fraction = device_memory(geometry, node, options).resident_fraction;
  }
  constexpr double kLargest = 1 << 22;
  double low = 64, high = kLargest;
  while (high - low > 32) {
    options.tokens = std::floor((low + high) / 2);
    const StreamEstimate step = estimate(geometry, node, options);
    (step.compute() >= step.stream() ? high : low) = options.tokens;
  }
  return high < kLargest ? std::optional(high) : std::nullopt;
}

}  // namespace tailor
