#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "recipes/machine.h"
#include "recipes/model_facts.h"
#include "recipes/recipe.h"

namespace tailor {

/// Arithmetic of one token, split by phase and by who does it. The frozen base costs 2N forward, 2N
/// for the gradient of the input and 2N where it is computed again; LoRA adds 2n for its own
/// gradients. Recomputing an MLP skips its down projection (2/3 remain), because the backward pass
/// does not need that output.
struct TokenFlops {
  double forward_other = 0, forward_expert = 0, backward_other = 0, backward_expert = 0;
  double total() const { return forward_other + forward_expert + backward_other + backward_expert; }
};
/// `keep`: all activations are kept, nothing is computed again.
TokenFlops token_flops(const Recipe& recipe, const ModelFacts& model, bool keep);

/// Rows of the vocabulary head worked on at once on the CPU: logits of at most 64 MiB, so that
/// memory does not follow the vocabulary.
std::int64_t head_chunk_rows(std::int64_t vocab, std::int64_t element_bytes);

/// Sizes of the frozen model in the recipe's formats, in bytes.
struct BaseBytes {
  double expert = 0;               ///< one routed expert
  double routed = 0;               ///< all of them
  double other = 0;                ///< attention, dense MLPs, shared experts, routers
  double head = 0, embedding = 0;  ///< kept in the published form; embedding 0 when tied
  double all() const { return routed + other + head + embedding; }
};
BaseBytes base_bytes(const Recipe& recipe, const ModelFacts& model);

/// How a GPU step spends its time, in seconds; forward and backward overlap nothing of each other.
struct StepTime {
  double link_forward = 0, link_backward = 0;  ///< host to device, activations and factors too
  double disk_forward = 0, disk_backward = 0;  ///< disk to host
  double compute_forward = 0, compute_backward = 0;  ///< dequantising included
  double network_forward = 0, network_backward = 0;  ///< between devices
  double exposed = 0;       ///< what overlaps with nothing: start, optimizer's end
  double stream_bytes = 0;  ///< both passes, all ranks
  double seconds() const;
  double link() const { return link_forward + link_backward; }
  double disk() const { return disk_forward + disk_backward; }
  double compute() const { return compute_forward + compute_backward; }
  double network() const { return network_forward + network_backward; }
};

/// What decides a GPU step beside recipe, model and machine.
struct GpuChoice {
  double tokens = 0;              ///< a step, all ranks
  double resident_fraction = 0;   ///< of the routed experts
  double host_tile_bytes = -1;    ///< of experts held in RAM; < 0: all of them
  bool activations_cross = true;  ///< kept layer inputs go to the host and back
};
StepTime gpu_step_time(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
                       const GpuChoice& choice);

}  // namespace tailor
