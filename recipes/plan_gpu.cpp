#include <algorithm>
#include <cmath>
#include <utility>

#include "recipes/choices.h"
#include "recipes/plan_text.h"
#include "recipes/planner.h"

namespace tailor {
namespace {

using Home = MemoryItem::Home;

std::string pass_text(double compute, double link, double disk, double network) {
  std::string out = "max(compute " + short_text(compute) + ", link " + short_text(link);
  if (disk > 0) out += ", disk " + short_text(disk);
  if (network > 0) out += ", network " + short_text(network);
  return out + ")";
}

}  // namespace

void Planner::run_gpu() {
  if (ranks_ > machine_.devices) {
    throw Error(Fault::usage, {"machine.ranks is " + std::to_string(recipe_.machine.ranks) + ", " +
                                   machine_.name + " has " + std::to_string(machine_.devices) +
                                   (machine_.devices == 1 ? " device" : " devices"),
                               "machine.ranks",
                               "Set machine.ranks: " + std::to_string(machine_.devices) +
                                   ", or name a larger machine.profile."});
  }
  const GpuStep step =
      gpu_step(extras_.oracle_assumptions ? StepSchedule::oracle() : StepSchedule{});
  add_gpu_memory(step);
  add_gpu_time(step);
  add_crossover(step);
  if (!extras_.oracle_assumptions) add_differences(step);
  // What stays on disk is not loaded; the oracle loads the experts and nothing else.
  const double beyond = base_.routed - step.device.resident_bytes() * ranks_ - step.host.tile_bytes;
  load_bytes_ =
      extras_.oracle_assumptions ? step.geometry.base.routed : base_.all() - std::max(0.0, beyond);
  if (model_.experts > 0 && plan.bound != Bound::compute) {
    plan.warnings.push_back("the step waits for weights (" + std::string(bound_name(plan.bound)) +
                            "): more tokens a step cost little time; raise "
                            "training.gradient_accumulation_steps");
  }
  plan.warnings.push_back("GPU times are modelled, not measured on this machine");
}

Planner::GpuStep Planner::gpu_step(const StepSchedule& schedule) const {
  const Node node = stream_node(machine_, recipe_.machine.ranks);
  GpuStep step;
  step.geometry = stream_geometry(recipe_, model_, schedule, loss_share_);
  const BaseBytes& base = step.geometry.base;
  StepOptions& options = step.options;
  options.schedule = schedule;
  options.tokens = tokens_;
  options.micro_tokens = as_double(recipe_.training.micro_batch_size * recipe_.data.sequence_len);
  options.kept_inputs = recipe_.base.activations == ActivationHome::automatic
                            ? ActivationHome::host
                            : recipe_.base.activations;
  if (recipe_.base.device_memory && base.routed > 0) {
    options.resident_fraction =
        std::min(1.0, as_double(*recipe_.base.device_memory) / (base.routed / ranks_));
  }
  options.state_on_disk = recipe_.lora.expert_state == StateHome::disk && lora_.experts > 0;
  step.device = device_memory(step.geometry, node, options);
  if (schedule.head_may_stream && step.device.room() < 0) {
    StepOptions streamed = options;
    streamed.stream_head = true;
    const GpuMemory smaller = device_memory(step.geometry, node, streamed);
    if (smaller.room() >= 0) {
      options = streamed;
      step.device = smaller;
    }
  }
  const double host_limit = machine_.host_bytes * kHostShare;
  if (recipe_.lora.expert_state == StateHome::automatic && lora_.experts > 0 &&
      schedule.paged_state) {
    StepOptions least = options;
    least.host_tile_bytes = as_double(recipe_.base.host_memory.value_or(0));
    options.state_on_disk = host_memory(step.geometry, node, least).used > host_limit;
  }
  if (recipe_.base.host_memory) {
    options.host_tile_bytes = as_double(*recipe_.base.host_memory);
  } else if (schedule.host_memory_limit) {
    StepOptions empty = options;
    empty.host_tile_bytes = 0;
    options.host_tile_bytes =
        std::max(0.0, host_limit - host_memory(step.geometry, node, empty).used);
    step.experts_beyond_ram = *options.host_tile_bytes < base.routed;
  }
  if (options.host_tile_bytes && *options.host_tile_bytes >= base.routed)
    options.host_tile_bytes.reset();
  step.host = host_memory(step.geometry, node, options);
  StepOptions timed = options;
  if (schedule.padding_left_out && fill_ < 1) {  // memory is planned for full rows
    timed.tokens *= fill_;
    timed.resident_fraction = step.device.resident_fraction;
  }
  step.time = estimate(step.geometry, node, timed);
  return step;
}

void Planner::add_gpu_memory(const GpuStep& step) {
  const GpuMemory& device = step.device;
  plan.activations = step.options.kept_inputs;
  plan.expert_state = step.options.state_on_disk && step.options.schedule.paged_state
                          ? StateHome::disk
                          : StateHome::memory;
  plan.stream_head = step.options.stream_head;
  kept_on_disk_ = plan.activations == ActivationHome::disk
                      ? tokens_ * as_double(model_.layers * model_.hidden) * 2
                      : 0;
  add_scratch(2, kept_on_disk_);
  plan.resident_fraction = device.resident_fraction;
  if (model_.experts > 0) {
    plan.ring_bytes = std::llround(step.options.ring_slots *
                                   ring_slot_bytes(step.geometry, step.options.schedule));
  }
  items(Home::device, device.parts);
  const double tiles = device.resident_bytes();
  item(Home::device, "resident experts", tiles,
       short_text(plan.resident_fraction * 100) + "% of " + gb(device.expert_bytes));
  plan.device_tile_bytes = std::llround(tiles);
  plan.device_bytes_peak = {sum(Home::device), "bytes", sum_text(Home::device)};
  // What fills the room exactly may be above it by a rounding.
  if (sum(Home::device) > device.limit + 1) {
    const bool by_budget = recipe_.base.device_memory && device.room() >= 0;
    plan.misfits.push_back(
        {"device memory: " + gb(sum(Home::device)) + " needed, " + gb(device.limit) +
             " usable of " + gb(machine_.device_bytes) + " (" + machine_.name + ")",
         by_budget ? "Set base.device_memory: " +
                         std::to_string(static_cast<std::int64_t>(device.room())) + ", or auto."
                   : advice(Home::device)});
  }
  // Host: what does not stay on the device, as far as it fits or is asked for; the rest is on disk.
  items(Home::host, step.host.parts);
  plan.host_tile_bytes = std::llround(step.host.tile_bytes);
  plan.host_bytes_peak = {sum(Home::host), "bytes", sum_text(Home::host)};
  const double host_limit = machine_.host_bytes * kHostShare;
  if (sum(Home::host) > host_limit + 1) {
    plan.misfits.push_back(
        {"host memory: " + gb(sum(Home::host)) + " needed, " + gb(host_limit) + " usable of " +
             gb(machine_.host_bytes) + " (" + machine_.name + ")",
         recipe_.base.host_memory ? "Set base.host_memory: auto." : advice(Home::host)});
  }
}

void Planner::add_gpu_time(const GpuStep& step) {
  const StreamEstimate& time = step.time;
  const TokenFlops& flops = step.geometry.flops;
  const double head_share = flops.head / (2 * as_double(model_.head_parameters()));
  plan.flops_per_token = {
      flops.total(), "FLOP",
      "forward " + short_text((flops.forward_other + flops.forward_expert) / 1e9) +
          " + backward with recompute " +
          short_text((flops.backward_other + flops.backward_expert) / 1e9) + " GFLOP" +
          (head_share < 1 ? ", the head for " + short_text(100 * head_share) + " % of the tokens"
                          : "")};
  plan.stream_bytes_per_step = {time.stream_bytes, "bytes",
                                "2 passes x " + gb(time.stream_bytes / 2) +
                                    " of experts not resident on a device" +
                                    (plan.stream_head ? " and of the vocabulary head" : "")};
  plan.seconds_per_step = {time.seconds(), "seconds",
                           "forward " +
                               pass_text(time.compute_forward, time.link_forward, time.disk_forward,
                                         time.network_forward) +
                               " + backward " +
                               pass_text(time.compute_backward, time.link_backward,
                                         time.disk_backward, time.network_backward) +
                               " + " + short_text(time.exposed) +
                               " s not overlapped; modelled, efficiency " +
                               short_text(machine_.efficiency) + ": " +
                               short_text(100 * time.peak_share) + " % of the peak over the step"};
  // Compute covers the stream as a whole or not; then the slower of link and disk is the brake.
  plan.bound = time.network() > std::max(time.compute(), time.stream()) ? Bound::network
               : time.compute() >= time.stream()                        ? Bound::compute
               : time.disk() > time.link()                              ? Bound::disk
                                                                        : Bound::link;
  plan.bound_working = "a step: compute " + short_text(time.compute()) + " s (" +
                       short_text(time.dequantise) + " s of it dequantising), link " +
                       short_text(time.link()) + " s, disk " + short_text(time.disk()) +
                       " s, network " + short_text(time.network()) + " s";
  forward_seconds_per_token_ =
      std::max({time.compute_forward, time.link_forward, time.disk_forward, time.network_forward}) /
      time.tokens;
}

void Planner::add_crossover(const GpuStep& step) {
  // Factors and kept inputs cross the link all the same, and the oracle counts them.
  if (step.time.stream_bytes == 0 && !extras_.oracle_assumptions) {
    plan.crossover_tokens_per_step = {std::nullopt, "tokens", "nothing is streamed"};
    return;
  }
  const std::optional<double> tokens =
      crossover(step.geometry, stream_node(machine_, recipe_.machine.ranks), step.options);
  plan.crossover_tokens_per_step = {
      tokens, "tokens",
      !tokens ? "no step below 4 million tokens hides the stream"
      : step.options.resident_fraction
          ? "from there on computing takes as long as the stream"
          : "from there on computing takes as long as the stream, with as many experts resident as "
            "at 32,768 tokens"};
}

void Planner::add_differences(const GpuStep& ours) {
  const StepOptions& options = ours.options;
  const auto differ = [&](const char* name, bool StepSchedule::*term, const std::string& unit,
                          const auto& measure, std::string working) {
    StepSchedule without = options.schedule;
    without.*term = false;
    plan.differences.push_back(
        {name, measure(ours) - measure(gpu_step(without)), unit, std::move(working)});
  };
  const auto seconds = [](const GpuStep& step) { return step.time.seconds(); };
  const auto device = [](const GpuStep& step) { return step.device.used; };
  if (model_.experts > 0) {
    differ("untouched experts", &StepSchedule::whole_tiles_cross, "seconds", seconds,
           "every streamed tile crosses on both passes; the oracle leaves out the " +
               short_text(100 * (1 - touched_share(model_, tokens_))) + " % of experts that " +
               whole(tokens_) + " tokens do not meet");
    differ("ring of whole tiles", &StepSchedule::whole_tile_slots, "bytes", device,
           "a slot holds a tile of one expert with its 4 KiB header, 4 KiB-aligned; the oracle's "
           "holds an expert's packed bytes");
    differ("routers in bfloat16", &StepSchedule::routers_bfloat16, "bytes", device,
           whole(as_double(model_.moe_layers * model_.hidden * model_.experts)) +
               " parameters stay as published; the oracle packs them with what stands around them");
    plan.differences.push_back(
        {"placement", 0, "bytes",
         "resident tiles are spread evenly over a pass; the oracle's sums hold for any placement"});
  }
  if (count_lora(scheduled_recipe(recipe_, StepSchedule::oracle()), model_).attention !=
      lora_.attention) {
    differ("kv_b_proj without factors", &StepSchedule::kv_b_by_name, "bytes", device,
           "latent attention's kv_b_proj has factors only where lora.targets names it, since "
           "servers ignore them; the oracle puts factors on every projection");
  }
  if (options.micro_tokens > tokens_ / ranks_) {
    differ("short micro-batch", &StepSchedule::short_micro_batch, "bytes", device,
           "a rank's " + whole(tokens_ / ranks_) + " tokens are less than a micro-batch of " +
               whole(options.micro_tokens));
  }
  if (loss_share_ < 1) {
    differ("tokens that carry loss", &StepSchedule::loss_positions, "seconds", seconds,
           "the vocabulary head meets " + short_text(100 * loss_share_) +
               " % of the tokens, in the oracle all of them");
  }
  if (fill_ < 1) {
    differ("rows that are not full", &StepSchedule::padding_left_out, "seconds", seconds,
           "rows are " + short_text(100 * fill_) +
               " % full and padding is not computed; the oracle takes full rows");
  }
  if (options.stream_head) {
    differ(
        "streamed vocabulary head", &StepSchedule::head_may_stream, "seconds", seconds,
        "one read of " + gb(ours.geometry.base.head) + "; resident the device would not hold it");
  }
  if (ours.experts_beyond_ram) {
    differ("experts beyond RAM", &StepSchedule::host_memory_limit, "seconds", seconds,
           gb(ours.geometry.base.routed - ours.host.tile_bytes) +
               " come from disk; the oracle takes RAM as large enough");
  }
  if (options.kept_inputs == ActivationHome::disk) {
    differ("layer inputs on disk", &StepSchedule::kept_inputs_on_disk, "seconds", seconds,
           "written and read once a step; the oracle keeps them in RAM or on the device");
  }
  if (options.state_on_disk) {
    differ("expert state on disk", &StepSchedule::paged_state, "seconds", seconds,
           "factors, gradients and moments of routed experts pass over the disk in each step; the "
           "oracle keeps them in RAM");
  }
}

}  // namespace tailor
