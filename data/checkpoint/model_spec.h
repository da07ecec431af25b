#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"

namespace tailor {

enum class Family { llama, llama4, qwen2, deepseek_v3 };
/// "llama4", as a config's model_type begins.
const char* family_name(Family family);

/// Rotary embedding as config.json asks for it; both spellings are read: `rope_parameters`
/// (transformers 5) and `rope_theta` + `rope_scaling` (transformers 4, published checkpoints).
struct RopeSpec {
  enum class Kind { plain, llama3, yarn, longrope };
  Kind kind = Kind::plain;
  double theta = 10000;
  double factor = 1;                                 ///< llama3, yarn
  double low_freq_factor = 1, high_freq_factor = 4;  ///< llama3
  double original_positions = 8192;                  ///< llama3, yarn, longrope
  double beta_fast = 32, beta_slow = 1;              ///< yarn
  bool truncate = true;                              ///< yarn: whole dimensions bound the ramp
  std::vector<double> factors;                       ///< longrope: a factor for every pair
  double attention_factor = 1;                       ///< on cos and sin
  double mscale_all_dim = 0;                         ///< yarn; DeepSeek's softmax scale uses it
  bool pairs = false;  ///< rotate neighbours (2i, 2i+1), as Llama 4; else halves (i, i + d/2)
};

struct LayerSpec {
  bool moe = false;
  bool rope = true;
  std::int64_t attention_chunk = 0;  ///< tokens; 0: full attention
};

/// How a router's logits become choices and weights.
struct RouterSpec {
  /// llama4: the K largest logits, weight sigmoid(logit) on the expert's input.
  /// grouped_sigmoid: scores sigmoid(logit); the K largest score + bias within the best groups;
  /// weights from the scores without bias, on the expert's output (DeepSeek V3).
  enum class Kind { llama4, grouped_sigmoid };
  Kind kind = Kind::llama4;
  std::int64_t groups = 1, groups_kept = 1;
  bool normalise = false;  ///< weights of a token sum to `scale`
  double scale = 1;
};

/// Multi-head latent attention (DeepSeek V2, arXiv 2405.04434, section 2.1); kv_rank 0: none.
struct LatentSpec {
  std::int64_t q_rank = 0;     ///< 0: queries are projected from the input in one step
  std::int64_t kv_rank = 0;    ///< of the latent that keys and values are expanded from
  std::int64_t nope_dim = 0;   ///< of a head's query and key without rotary embedding
  std::int64_t rope_dim = 0;   ///< with; the key's is shared by all heads
  std::int64_t value_dim = 0;  ///< of a head's value
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
  std::int64_t expert_width = 0;       ///< F, of routed experts
  std::int64_t shared_width = 0;       ///< of the shared expert, or of all of them together
  std::int64_t experts = 0;            ///< E; 0: dense model
  std::int64_t experts_per_token = 0;  ///< K
  std::int64_t positions_max = 0;
  double norm_eps = 1e-5;
  bool tied_head = false;
  bool qkv_bias = false;     ///< biases of q, k and v (Qwen 2)
  bool qk_norm = false;      ///< weight-less RMS norm of q and k on rotary layers
  bool temperature = false;  ///< Llama 4: q scaled by position on layers without rotary
  double temperature_floor = 8192, temperature_scale = 0.1;
  RopeSpec rope;
  RouterSpec router;
  LatentSpec latent;
  std::int64_t prediction_layers = 0;  ///< multi-token-prediction layers behind the last: skipped
  std::vector<LayerSpec> layers;

  std::int64_t layer_count() const { return static_cast<std::int64_t>(layers.size()); }
  std::int64_t moe_layer_count() const;
  bool is_latent() const { return latent.kv_rank > 0; }
  std::int64_t query_width() const { return heads * head_dim; }
  std::int64_t kv_width() const { return kv_heads * head_dim; }
  /// Of attention's result before the output projection.
  std::int64_t attention_width() const {
    return is_latent() ? heads * latent.value_dim : query_width();
  }
  /// Outputs of the projection that shares its input with nothing before it: q, k, v; with latent
  /// attention q's latent (or q), the kv latent and the rotary key.
  std::int64_t qkv_width() const {
    if (!is_latent()) return query_width() + 2 * kv_width();
    return q_latent_width() + latent.kv_rank + latent.rope_dim;
  }
  std::int64_t q_latent_width() const { return latent.q_rank > 0 ? latent.q_rank : query_width(); }
  /// Of a head that the rotary embedding turns.
  std::int64_t rope_width() const { return is_latent() ? latent.rope_dim : head_dim; }
  double softmax_scale() const;  ///< on q k^T
  /// Kept of a token that generation has passed, per layer.
  std::int64_t cache_width() const {
    return is_latent() ? latent.kv_rank + latent.rope_dim : 2 * kv_width();
  }
  /// All parameters of the text model, and those a token meets (K experts a layer).
  std::int64_t parameters() const;
  std::int64_t active_parameters() const;
};

/// Throws Error{bad_file}: architecture not supported (lists those that are), missing or impossible
/// sizes, options Tailor does not implement (each refused by name, never ignored).
ModelSpec model_spec_from_config(const Json& config, const std::string& where);
ModelSpec read_model_spec(const fs::path& model_folder);

}  // namespace tailor
