#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "data/checkpoint/model_spec.h"

namespace tailor {

/// What tells whether a choice of experts is of this model.
struct RoutedModel {
  std::string family;  ///< "llama4", "deepseek_v3": from the architecture's name
  std::int64_t layers = 0, hidden = 0;
  std::int64_t experts = 0, experts_per_token = 0, expert_width = 0;
  std::vector<std::int64_t> moe_layers;  ///< those with routed experts, from the first
  /// data/store/fingerprint.h's, which tells checkpoints of one shape apart; empty: not known.
  std::string fingerprint;
};
RoutedModel routed_model(const ModelSpec& spec);

/// Which routed experts get LoRA factors: the file that `tailor experts scan` writes and
/// lora.experts names. docs/formats/expert-selection.md has every key.
struct ExpertSelection {
  struct Layer {
    std::int64_t layer = 0;
    std::vector<std::int32_t> experts;  ///< ascending; may be empty
    double tokens_covered = 0;          ///< share of the layer's choices that falls on them
    double gate_covered = 0;            ///< share of its gate weight
  };
  std::string model_name;  ///< for people
  RoutedModel model;
  std::vector<Layer> layers;  ///< every layer with routed experts, from the first

  // How it came about; for people, and for nothing else.
  std::vector<std::string> data;
  std::string counted = "all";  ///< all tokens, or those that carry loss: "trained"
  std::int64_t tokens = 0;      ///< counted
  std::string by = "gate";      ///< gate or token
  std::string rule = "top_p";   ///< top_p, count, max_bytes or max_usd
  double value = 0;             ///< of the rule
  std::int64_t expert_rank = 0;
  std::int64_t bytes = 0;  ///< of the chosen experts' factors at that rank, float32

  std::int64_t expert_count() const;
  /// Share of all layers' choices that falls on chosen experts.
  double tokens_covered() const;
  /// By layer, as LoraOptions wants it.
  std::map<int, std::vector<std::int32_t>> by_layer() const;
};

/// The file's text, and back. read_selection() throws one Error{bad_file} with everything that is
/// wrong: unknown keys, experts out of range or twice, layers that are missing or have no routed
/// experts, no expert at all; Error{usage} when the file cannot be read.
std::string selection_text(const ExpertSelection& selection);
ExpertSelection read_selection(const fs::path& path);
/// `name` stands for the file in messages.
ExpertSelection parse_selection(std::string_view text, const std::string& name);

/// Throws Error{bad_file} unless the selection was made for `model`; fingerprints count where both
/// sides have one. `name`: the file.
void check_selection(const ExpertSelection& selection, const RoutedModel& model,
                     const std::string& name);

/// "0-3, 7, 9-10": ascending numbers as runs.
std::string runs_text(const std::vector<std::int32_t>& numbers);

}  // namespace tailor
