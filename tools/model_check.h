#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/model_spec.h"

namespace tailor {

/// How a checkpoint stores its routed experts.
enum class PublishedLayout { none, fused, one_by_one };

struct ExpectedTensor {
  std::string name;
  std::vector<std::int64_t> shape;
};
/// Every tensor a model of `spec` is read from, by its published name.
std::vector<ExpectedTensor> expected_tensors(const ModelSpec& spec, PublishedLayout layout);

PublishedLayout expert_layout(const ModelSpec& spec, const Checkpoint& checkpoint);

/// Compares names and shapes of all tensors with what `spec` asks for; reads no weights. Throws one
/// Error{bad_file} with everything that is missing or of another shape. Returns the tensors that
/// are there and not used.
std::vector<std::string> check_tensors(const ModelSpec& spec, const Checkpoint& checkpoint);

/// One kind of matrix that can carry LoRA factors.
struct LoraTarget {
  std::string group;   ///< name of lora.targets: attention, dense_mlp, ...
  std::string module;  ///< q_proj, experts.gate_up_proj, ...
  std::int64_t in = 0, out = 0;
  std::int64_t layers = 0;
  std::int64_t matrices = 0;  ///< over all layers and experts
};
std::vector<LoraTarget> lora_targets(const ModelSpec& spec);

}  // namespace tailor
