#pragma once

#include <string>
#include <string_view>

namespace tailor {

/// What a matrix that can carry LoRA factors is called.
struct TargetNames {
  std::string_view group;  ///< of lora.targets: "attention"; "kv_b_proj" is in none
  std::string_view name;   ///< "q_proj", "experts.gate_up_proj"
  std::string_view path;   ///< "model.layers.0.self_attn.q_proj"
  bool routed = false;     ///< of routed experts
};

/// Whether an entry of lora.targets means a matrix: its group, `all`, its name, its path or, as
/// PEFT matches target_modules, the path's end from a dot on. Routed experts are meant only by what
/// says experts: `gate_proj` is every plain MLP's, since PEFT has experts among target_parameters.
inline bool target_means(std::string_view target, const TargetNames& matrix) {
  if (target == "all") return matrix.group != "kv_b_proj";
  if (target == matrix.group || target == matrix.name || target == matrix.path) return true;
  const std::string_view path = matrix.path;
  return !matrix.routed && path.size() > target.size() + 1 && path.ends_with(target) &&
         path[path.size() - target.size() - 1] == '.';
}

}  // namespace tailor
