#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/model_spec.h"

namespace tailor {

/// What a frozen matrix is in its layer. A vector is a matrix of one row.
enum class MatrixRole : std::uint32_t {
  embedding = 1,
  head = 2,
  final_norm = 3,
  input_norm = 10,
  q = 11,
  k = 12,
  v = 13,
  o = 14,
  q_bias = 15,
  k_bias = 16,
  v_bias = 17,
  q_a = 30,  ///< latent attention: queries' latent, its norm, and what expands it
  q_a_norm = 31,
  q_b = 32,
  kv_a = 33,  ///< latent of keys and values, and the rotary key
  kv_a_norm = 34,
  kv_b = 35,
  post_norm = 20,
  router = 21,
  gate = 22,
  up = 23,
  down = 24,
  router_bias = 25,  ///< on the scores by which experts are chosen; always float32
};
const char* role_name(MatrixRole role);
/// Of one dimension: a norm's weights, a bias. A router of one expert is a matrix all the same.
bool is_vector_role(MatrixRole role);

/// "model.layers.0.self_attn.q_proj.weight" -> "model.layers.0.self_attn.q_proj"
std::string module_of(const std::string& tensor);

/// One matrix [rows, columns] of outputs by inputs, and the published tensor that holds it.
struct PublishedMatrix {
  MatrixRole role;
  std::int64_t rows, columns;
  std::string name;  ///< of the tensor
  /// How the matrix lies in it. plain: the tensor is the matrix. fused: the tensor holds all
  /// experts, as [experts, columns, width], inputs first (Llama 4), and the matrix is columns
  /// [first, first + rows) of the width; or, `outputs_first`, as [experts, width, columns]
  /// (transformers' DeepSeek V3), and it is rows [first, first + rows).
  bool fused = false;
  std::int64_t expert = 0, first = 0, width = 0;
  bool outputs_first = false;

  bool is_vector() const { return is_vector_role(role); }
  /// The last part of module_of(name), "q_proj".
  std::string module_name() const;
  /// The tensor's shape, of a fused one for `experts`.
  std::vector<std::int64_t> tensor_shape(std::int64_t experts) const;
  /// Rows of the tensor before the matrix's first, where rows lie one after the other.
  std::int64_t first_row() const { return fused && outputs_first ? expert * width + first : 0; }
};

/// The published matrices of one part of a model, by the names of its family. `experts_fused`: the
/// checkpoint holds all experts of a layer in one tensor.
std::vector<PublishedMatrix> attention_matrices(const ModelSpec& spec, std::int64_t layer);
/// Those of them that are no vectors, queries' first: what can carry LoRA factors.
std::vector<PublishedMatrix> attention_projections(const ModelSpec& spec, std::int64_t layer);
/// The norm before it, the router, and the dense MLP or shared expert.
std::vector<PublishedMatrix> feed_forward_matrices(const ModelSpec& spec, std::int64_t layer);
std::vector<PublishedMatrix> expert_matrices(const ModelSpec& spec, std::int64_t layer,
                                             std::int64_t expert, bool experts_fused);
PublishedMatrix embedding_matrix(const ModelSpec& spec);
/// Of a tied model too: the embedding's tensor then.
PublishedMatrix head_matrix(const ModelSpec& spec);
PublishedMatrix final_norm_matrix(const ModelSpec& spec);

/// Whether `has(name)` says that the checkpoint's experts are fused.
template <class Has>
bool experts_are_fused(const ModelSpec& spec, Has&& has) {
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    if (!spec.layers[static_cast<std::size_t>(l)].moe) continue;
    return has(expert_matrices(spec, l, 0, true).front().name);
  }
  return false;
}

}  // namespace tailor
