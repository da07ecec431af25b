#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"

namespace tailor {

enum class Family { llama, llama4 };

/// Rotary embedding as config.json asks for it; both spellings are read: `rope_parameters`
/// (transformers 5) and `rope_theta` + `rope_scaling` (transformers 4, published checkpoints).
struct RopeSpec {
  enum class Kind { plain, llama3 };
  Kind kind = Kind::plain;
  double theta = 10000;
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4;  ///< llama3
  double original_positions = 8192;                              ///< llama3
  bool pairs = false;  ///< rotate neighbours (2i, 2i+1), as Llama 4; else halves (i, i + d/2)
};

struct LayerSpec {
  bool moe = false;
  bool rope = true;
  std::int64_t attention_chunk = 0;  ///< tokens; 0: full attention
};

/// What a decoder of ours is made of, from config.json. Letters as in docs/notation.md.
struct ModelSpec {
  Family family = Family::llama;
  std::string architecture;  ///< "Llama4ForCausalLM"
  std::int64_t hidden = 0;   ///< D
  std::int64_t heads = 0;    ///< H
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t vocab = 0;              ///< V
  std::int64_t dense_width = 0;        ///< width of dense MLPs
  std::int64_t expert_width = 0;       ///< F; also the shared expert's
  std::int64_t experts = 0;            ///< E; 0: dense model
  std::int64_t experts_per_token = 0;  ///< K
  std::int64_t positions_max = 0;
  double norm_eps = 1e-5;
  bool tied_head = false;
  bool attention_bias = false;
  bool qk_norm = false;      ///< weight-less RMS norm of q and k on rotary layers
  bool temperature = false;  ///< Llama 4: q scaled by position on layers without rotary
  double temperature_floor = 8192, temperature_scale = 0.1;
  RopeSpec rope;
  std::vector<LayerSpec> layers;

  std::int64_t layer_count() const { return static_cast<std::int64_t>(layers.size()); }
  std::int64_t moe_layer_count() const;
  std::int64_t query_width() const { return heads * head_dim; }
  std::int64_t kv_width() const { return kv_heads * head_dim; }
  /// All parameters of the text model, and those a token meets (K experts a layer).
  std::int64_t parameters() const;
  std::int64_t active_parameters() const;
};

/// Throws Error{bad_file}: architecture not supported (lists those that are), missing or impossible
/// sizes, options Tailor does not implement (each refused by name, never ignored).
ModelSpec model_spec_from_config(const Json& config, const std::string& where);
ModelSpec read_model_spec(const fs::path& model_folder);

}  // namespace tailor
