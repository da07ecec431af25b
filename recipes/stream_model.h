#pragma once

#include <optional>
#include <string>
#include <vector>

#include "recipes/machine.h"
#include "recipes/model_facts.h"
#include "recipes/recipe.h"
#include "recipes/step_cost.h"

namespace tailor {

/// The arithmetic of a step that streams its frozen experts to GPUs: bytes on a device, bytes on
/// the host, seconds a step, and the step size from which computing hides the stream. Pure
/// functions of four small structs; docs/planning.md has the formulas. Bytes, seconds and FLOP
/// throughout.

/// Where the trainer's step departs from the oracle, the analytic model these formulas are checked
/// against. With everything off the figures are the oracle's.
struct StepSchedule {
  bool whole_tiles_cross = true;    ///< every streamed tile is read on each pass, touched or not
  bool whole_tile_slots = true;     ///< ring slots hold a tile with its header, 4 KiB-aligned
  bool routers_bfloat16 = true;     ///< not in the format of what stands around them
  bool short_micro_batch = true;    ///< a micro-batch is never larger than the step
  bool loss_positions = true;       ///< the head meets only tokens that carry loss
  bool head_may_stream = true;      ///< where the device is too small for it
  bool host_memory_limit = true;    ///< experts that do not fit into RAM come from disk
  bool kept_inputs_on_disk = true;  ///< base.activations: disk costs the disk's time
  bool paged_state = true;          ///< lora.expert_state: disk takes no RAM, and the disk's time
  bool kv_b_by_name = true;         ///< latent attention's kv_b_proj has factors only where named
  bool padding_left_out = true;     ///< only a step's tokens are computed, not its positions
  static StepSchedule oracle() {
    return {false, false, false, false, false, false, false, false, false, false, false};
  }
};

/// A model in a recipe's formats and ranks.
struct Geometry {
  ModelFacts model;
  LoraCounts lora;
  BaseBytes base;
  TokenFlops flops;  ///< of one token, computed again in the backward pass
};
/// The recipe as a schedule understands it: the oracle puts factors on every attention projection.
Recipe scheduled_recipe(const Recipe& recipe, const StepSchedule& schedule);
Geometry stream_geometry(const Recipe& recipe, const ModelFacts& model,
                         const StepSchedule& schedule, double loss_share);

/// The devices a run takes and what feeds them; rates in bytes a second.
struct Node {
  double ranks = 1;
  double peak_flops = 0, flops_per_second = 0;  ///< one device: dense bf16, and what a step reaches
  double device_bytes = 0;                      ///< one device's memory
  double device_rate = 0;                       ///< of that memory: 0.8 of the peak
  double to_device_rate = 0, from_device_rate = 0;  ///< one device's link
  double between_devices_rate = 0;                  ///< each device, all-gather; 0: none
  double disk_rate = 0;                             ///< all devices together
};
Node stream_node(const Machine& machine, int ranks);

struct StepOptions {
  double tokens = 0;                                  ///< a step, all ranks
  double micro_tokens = 0;                            ///< through a block together
  ActivationHome kept_inputs = ActivationHome::host;  ///< device, host or disk
  bool stream_head = false;
  int ring_slots = 16;                      ///< tiles on the device, on their way or in use
  std::optional<double> resident_fraction;  ///< of the experts, on the device; null: what fits
  std::optional<double> host_tile_bytes;    ///< of experts in RAM, all ranks; null: all of them
  bool state_on_disk = false;               ///< factors, gradients and moments of routed experts
  StepSchedule schedule;
};

/// One thing that takes memory, and the sum it came from.
struct MemoryPart {
  std::string name;
  double bytes = 0;
  std::string working;
};

/// One rank's device, resident experts not among the parts.
struct GpuMemory {
  std::vector<MemoryPart> parts;
  double used = 0;               ///< sum of the parts
  double limit = 0;              ///< 97 % of the memory: the allocator's slack is the rest
  double expert_bytes = 0;       ///< a rank's share of all routed experts
  double resident_fraction = 1;  ///< of those
  double room() const { return limit - used; }
  double resident_bytes() const { return resident_fraction * expert_bytes; }
};
GpuMemory device_memory(const Geometry& geometry, const Node& node, const StepOptions& options);
/// Of one slot of the ring: a packed expert with its factors and their gradients.
double ring_slot_bytes(const Geometry& geometry, const StepSchedule& schedule);

struct HostMemory {
  std::vector<MemoryPart> parts;
  double used = 0;        ///< sum of the parts
  double tile_bytes = 0;  ///< of it, experts
};
HostMemory host_memory(const Geometry& geometry, const Node& node, const StepOptions& options);

/// How a step spends its seconds. In each of the two passes computing, copying, reading and
/// gathering overlap; the passes do not.
struct StreamEstimate {
  double tokens = 0;
  double link_forward = 0, link_backward = 0;  ///< host to device; kept inputs and factors too
  double disk_forward = 0, disk_backward = 0;  ///< disk to host
  double compute_forward = 0, compute_backward = 0;  ///< dequantising included
  double network_forward = 0, network_backward = 0;  ///< between devices
  double dequantise = 0;                             ///< of computing, both passes
  double exposed = 0;                                ///< what overlaps with nothing
  double stream_bytes = 0;       ///< frozen weights over the links, both passes, all ranks
  double resident_fraction = 1;  ///< of the experts, on the devices
  double peak_share = 0;         ///< of the devices' peak, recomputing counted as work
  double model_peak_share = 0;   ///< the same with 4 FLOP a parameter that a token meets

  double seconds() const;
  double tokens_per_second() const { return tokens / seconds(); }
  double compute() const { return compute_forward + compute_backward; }
  double link() const { return link_forward + link_backward; }
  double disk() const { return disk_forward + disk_backward; }
  double network() const { return network_forward + network_backward; }
  /// Of each pass the longer of copying and reading.
  double stream() const;
};
/// Share of the experts that at least one of `tokens` meets, routing taken as even.
double touched_share(const ModelFacts& model, double tokens);
/// Tokens spread evenly over the experts. Several ranks gather packed tiles from each other.
StreamEstimate estimate(const Geometry& geometry, const Node& node, const StepOptions& options);

/// The smallest step, to 32 tokens, in which computing takes as long as the stream; null when 4
/// million tokens do not suffice. An open residency is taken as at 32,768 tokens.
std::optional<double> crossover(const Geometry& geometry, const Node& node, StepOptions options);

}  // namespace tailor
