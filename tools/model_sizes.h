#pragma once

#include <string>
#include <vector>

#include "recipes/model_facts.h"

namespace tailor {

/// Bytes of a model's matrices in one format, scales included; embedding and head stay in bf16 (or
/// as published), as a store keeps them.
struct FormatSizes {
  std::string format;  ///< as base.format spells it
  double expert = 0;   ///< one routed expert
  double layer = 0;    ///< the routed experts of one layer
  double experts = 0;  ///< all routed experts
  double other = 0;    ///< attention, dense MLPs, shared experts; routers in bf16
  double vocabulary = 0;
  double total() const { return experts + other + vocabulary; }
};
/// bf16, fp8, int4 (its widest group that divides, as base.group_size chooses) and nf4.
std::vector<FormatSizes> format_sizes(const ModelFacts& model);

/// Trainable parameters of one group of lora.targets, for every unit of rank.
struct AdapterSize {
  std::string target;
  std::int64_t parameters = 0;
};
/// The groups this model has, and kv_b_proj, which is in none. Gate and up of experts count an A
/// each, as servers hold them.
std::vector<AdapterSize> adapter_sizes(const ModelFacts& model);
/// Of routed experts as they are trained: gate and up share their A (adapters/lora.h).
std::int64_t trained_expert_parameters(const ModelFacts& model);

/// Both as `tailor model inspect` prints them.
std::string sizes_text(const ModelFacts& facts);

}  // namespace tailor
