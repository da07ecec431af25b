#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "data/checkpoint/model_spec.h"
#include "recipes/expert_selection.h"
#include "recipes/recipe.h"

namespace tailor {

/// A linear layer's weight: [out, in].
struct MatrixShape {
  std::int64_t out = 0, in = 0;
  std::int64_t parameters() const { return out * in; }
};

/// A matrix that can carry LoRA factors; of routed experts all of a layer's.
struct FactorMatrix {
  std::string group, name, path;  ///< see TargetNames
  bool routed = false;
  std::int64_t out = 0, in = 0;
  std::int64_t parts = 1;  ///< matrices that `out` is made of: gate and up are two
  /// Of rank 1, each part with an A of its own.
  std::int64_t parameters() const { return out + parts * in; }
};

/// What the plan knows of a model: counts and widths, no weights. Vectors (norms, biases of q, k
/// and v, a router's correction) are left out; they are below a ten-thousandth of the whole.
struct ModelFacts {
  std::string name;
  std::int64_t layers = 0, hidden = 0, vocab = 0, heads = 0;
  std::int64_t qk_dim = 0, v_dim = 0;        ///< a head's width in scores and in values
  std::vector<MatrixShape> attention;        ///< projections of one layer
  std::vector<std::string> attention_names;  ///< q_proj, ... as long as `attention`
  /// Numbers that a layer's attention keeps of a token for its backward: q, k and v, or with latent
  /// attention the latents and the rotary key, which are expanded again; its result; the stream
  /// after it.
  std::int64_t attention_kept = 0;
  /// With latent attention: what a token of a micro-batch expands to beside the projections'
  /// outputs, every head's keys and the result that o_proj reads, which is wider than the stream.
  std::int64_t attention_expanded = 0;
  std::int64_t moe_layers = 0, experts = 0, top_k = 0, expert_width = 0;
  std::int64_t shared_experts = 0;  ///< a MoE layer, each of expert_width; they act as one MLP
  std::int64_t dense_layers = 0, dense_width = 0;
  bool tied_head = false;
  BaseFormat published =
      BaseFormat::bf16;               ///< what as_is means; float32 checkpoints count as bf16 x 2
  double published_bytes = 2;         ///< a parameter, when `published` is bf16: 2, or 4
  RoutedModel routed;                 ///< what an expert selection is held against
  std::vector<FactorMatrix> factors;  ///< layer by layer

  ModelTraits traits() const { return {static_cast<int>(experts), static_cast<int>(top_k)}; }
  std::int64_t attention_parameters() const;  ///< one layer
  std::int64_t expert_parameters() const { return 3 * hidden * expert_width; }
  std::int64_t shared_width() const { return shared_experts * expert_width; }
  std::int64_t dense_mlp_parameters() const { return 3 * hidden * dense_width; }
  std::int64_t routed_parameters() const { return moe_layers * experts * expert_parameters(); }
  std::int64_t head_parameters() const { return vocab * hidden; }
  /// All but routed experts, embedding and head.
  std::int64_t other_parameters() const;
  std::int64_t total_parameters() const;
  /// Matrix parameters a token meets, the head included, the embedding's lookup not.
  std::int64_t active_parameters() const;
};

/// Trainable parameters of a recipe's factors; by where they live. expert_rank must be resolved.
/// Gate and up of an expert count an A each, as servers hold them. A matrix has factors where
/// training puts them: target_means() says so to both.
struct LoraCounts {
  std::int64_t attention = 0, dense_mlp = 0, shared_expert = 0, router = 0;
  std::int64_t per_expert = 0;   ///< one routed expert; the mean, rounded up, where layers differ
  std::int64_t experts = 0;      ///< the routed experts that are trained
  std::int64_t all_experts = 0;  ///< as many as an adapter's file has, zero for the others
  std::int64_t other() const { return attention + dense_mlp + shared_expert + router; }
  std::int64_t total() const { return other() + experts; }
};
LoraCounts count_lora(const Recipe& recipe, const ModelFacts& model);

/// Bytes of one matrix in `format`; as_is is the model's published form. int4: 4-bit codes padded
/// to eight a row and a bf16 scale a group. nf4: as bitsandbytes writes it, blocks of 64, double
/// quantised. fp8: e4m3 and a float scale a block of 128 x 128.
double matrix_bytes(const ModelFacts& model, const MatrixShape& shape, BaseFormat format,
                    std::optional<int> group_size);

/// Facts of a spec; `published` is bf16, since a spec does not say how weights are stored.
ModelFacts model_facts(const ModelSpec& spec, const std::string& name);
/// Facts of a whole config.json, its stored form included.
ModelFacts model_facts(const Json& config, const std::string& where, const std::string& name);

/// The published config that comes with Tailor for a repository "a/b": a--b.json in
/// `models_folder`. Nothing for others.
std::optional<fs::path> shipped_config(const std::string& repository,
                                       const fs::path& models_folder);

/// The config.json of `base_model`: of a folder or a repository in the local Hugging Face cache,
/// else a published one shipped in `models_folder` (recipes/models), where "a/b" is a--b.json.
/// Throws Error{usage} when it is in none of them.
fs::path model_config_path(const std::string& base_model, const fs::path& models_folder);
/// Facts from it.
ModelFacts read_model_facts(const std::string& base_model, const fs::path& models_folder);

}  // namespace tailor
