#include "data/checkpoint/published.h"

#include <algorithm>
#include <string_view>

#include "base/error.h"

namespace tailor {
namespace {

std::string layer_name(std::int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

std::string feed_forward_name(const ModelSpec& spec, std::int64_t layer) {
  return layer_name(layer) + (spec.family == Family::llama4 ? "feed_forward." : "mlp.");
}

bool is_moe(const ModelSpec& spec, std::int64_t layer) {
  return spec.layers[static_cast<std::size_t>(layer)].moe;
}

}  // namespace

const char* role_name(MatrixRole role) {
  switch (role) {
    case MatrixRole::embedding:
      return "embedding";
    case MatrixRole::head:
      return "head";
    case MatrixRole::final_norm:
      return "final norm";
    case MatrixRole::input_norm:
      return "input norm";
    case MatrixRole::q:
      return "q";
    case MatrixRole::k:
      return "k";
    case MatrixRole::v:
      return "v";
    case MatrixRole::o:
      return "o";
    case MatrixRole::post_norm:
      return "post norm";
    case MatrixRole::router:
      return "router";
    case MatrixRole::gate:
      return "gate";
    case MatrixRole::up:
      return "up";
    case MatrixRole::down:
      return "down";
    case MatrixRole::router_bias:
      return "router bias";
    case MatrixRole::q_bias:
      return "q bias";
    case MatrixRole::k_bias:
      return "k bias";
    case MatrixRole::v_bias:
      return "v bias";
    case MatrixRole::q_a:
      return "q_a";
    case MatrixRole::q_a_norm:
      return "q_a norm";
    case MatrixRole::q_b:
      return "q_b";
    case MatrixRole::kv_a:
      return "kv_a";
    case MatrixRole::kv_a_norm:
      return "kv_a norm";
    case MatrixRole::kv_b:
      return "kv_b";
  }
  return "?";
}

bool is_vector_role(MatrixRole role) {
  switch (role) {
    case MatrixRole::final_norm:
    case MatrixRole::input_norm:
    case MatrixRole::post_norm:
    case MatrixRole::q_a_norm:
    case MatrixRole::kv_a_norm:
    case MatrixRole::q_bias:
    case MatrixRole::k_bias:
    case MatrixRole::v_bias:
    case MatrixRole::router_bias:
      return true;
    default:
      return false;
  }
}

std::string module_of(const std::string& tensor) {
  constexpr std::string_view kWeight = ".weight";
  return tensor.ends_with(kWeight) ? tensor.substr(0, tensor.size() - kWeight.size()) : tensor;
}
std::string PublishedMatrix::module_name() const {
  const std::string whole = module_of(name);
  return whole.substr(whole.rfind('.') + 1);
}

std::vector<std::int64_t> PublishedMatrix::tensor_shape(std::int64_t experts) const {
  if (is_vector()) return {columns};
  if (!fused) return {rows, columns};
  if (outputs_first) return {experts, width, columns};
  return {experts, columns, width};
}

namespace {

// Projections of one input stand side by side, so that they can be stacked into one product.
std::vector<PublishedMatrix> latent_attention_matrices(const ModelSpec& spec, std::int64_t layer) {
  const LatentSpec& latent = spec.latent;
  const std::int64_t D = spec.hidden, Q = spec.query_width();
  const std::string base = layer_name(layer), attention = base + "self_attn.";
  std::vector<PublishedMatrix> out = {
      {MatrixRole::input_norm, 1, D, base + "input_layernorm.weight"}};
  if (latent.q_rank > 0) {
    out.push_back({MatrixRole::q_a, latent.q_rank, D, attention + "q_a_proj.weight"});
  } else {
    out.push_back({MatrixRole::q, Q, D, attention + "q_proj.weight"});
  }
  out.push_back({MatrixRole::kv_a, latent.kv_rank + latent.rope_dim, D,
                 attention + "kv_a_proj_with_mqa.weight"});
  if (latent.q_rank > 0) {
    out.push_back({MatrixRole::q_a_norm, 1, latent.q_rank, attention + "q_a_layernorm.weight"});
    out.push_back({MatrixRole::q_b, Q, latent.q_rank, attention + "q_b_proj.weight"});
  }
  out.push_back({MatrixRole::kv_a_norm, 1, latent.kv_rank, attention + "kv_a_layernorm.weight"});
  out.push_back({MatrixRole::kv_b, spec.heads * (latent.nope_dim + latent.value_dim),
                 latent.kv_rank, attention + "kv_b_proj.weight"});
  out.push_back({MatrixRole::o, D, spec.attention_width(), attention + "o_proj.weight"});
  return out;
}

}  // namespace

std::vector<PublishedMatrix> attention_matrices(const ModelSpec& spec, std::int64_t layer) {
  const std::int64_t D = spec.hidden, Q = spec.query_width(), KV = spec.kv_width();
  const std::string base = layer_name(layer), attention = base + "self_attn.";
  if (spec.is_latent()) return latent_attention_matrices(spec, layer);
  std::vector<PublishedMatrix> out = {
      {MatrixRole::input_norm, 1, D, base + "input_layernorm.weight"},
      {MatrixRole::q, Q, D, attention + "q_proj.weight"},
      {MatrixRole::k, KV, D, attention + "k_proj.weight"},
      {MatrixRole::v, KV, D, attention + "v_proj.weight"},
      {MatrixRole::o, D, Q, attention + "o_proj.weight"}};
  if (spec.qkv_bias) {
    out.push_back({MatrixRole::q_bias, 1, Q, attention + "q_proj.bias"});
    out.push_back({MatrixRole::k_bias, 1, KV, attention + "k_proj.bias"});
    out.push_back({MatrixRole::v_bias, 1, KV, attention + "v_proj.bias"});
  }
  return out;
}

std::vector<PublishedMatrix> attention_projections(const ModelSpec& spec, std::int64_t layer) {
  std::vector<PublishedMatrix> out;
  for (PublishedMatrix& matrix : attention_matrices(spec, layer)) {
    if (!matrix.is_vector()) out.push_back(std::move(matrix));
  }
  const auto of_keys = [](const PublishedMatrix& matrix) {
    return matrix.role != MatrixRole::q && matrix.role != MatrixRole::q_a &&
           matrix.role != MatrixRole::q_b;
  };
  std::stable_sort(out.begin(), out.end(),
                   [&](const auto& a, const auto& b) { return of_keys(a) < of_keys(b); });
  return out;
}

std::vector<PublishedMatrix> feed_forward_matrices(const ModelSpec& spec, std::int64_t layer) {
  const std::int64_t D = spec.hidden;
  const bool moe = is_moe(spec, layer);
  const std::int64_t F = moe ? spec.shared_width : spec.dense_width;
  const bool llama4 = spec.family == Family::llama4;
  const std::string base = feed_forward_name(spec, layer);
  const std::string mlp = base + (!moe ? "" : llama4 ? "shared_expert." : "shared_experts.");
  std::vector<PublishedMatrix> out = {
      {MatrixRole::post_norm, 1, D, layer_name(layer) + "post_attention_layernorm.weight"}};
  if (moe)
    out.push_back(
        {MatrixRole::router, spec.experts, D, base + (llama4 ? "router.weight" : "gate.weight")});
  out.push_back({MatrixRole::gate, F, D, mlp + "gate_proj.weight"});
  out.push_back({MatrixRole::up, F, D, mlp + "up_proj.weight"});
  out.push_back({MatrixRole::down, D, F, mlp + "down_proj.weight"});
  if (moe && spec.router.kind == RouterSpec::Kind::grouped_sigmoid) {
    out.push_back(
        {MatrixRole::router_bias, 1, spec.experts, base + "gate.e_score_correction_bias"});
  }
  return out;
}

std::vector<PublishedMatrix> expert_matrices(const ModelSpec& spec, std::int64_t layer,
                                             std::int64_t expert, bool experts_fused) {
  TAILOR_CHECK(is_moe(spec, layer) && expert >= 0 && expert < spec.experts);
  const std::int64_t D = spec.hidden, F = spec.expert_width;
  const std::string base = feed_forward_name(spec, layer) + "experts.";
  if (experts_fused) {
    const std::string gate_up = base + "gate_up_proj", down = base + "down_proj";
    const bool outputs_first = spec.family != Family::llama4;
    return {{MatrixRole::gate, F, D, gate_up, true, expert, 0, 2 * F, outputs_first},
            {MatrixRole::up, F, D, gate_up, true, expert, F, 2 * F, outputs_first},
            {MatrixRole::down, D, F, down, true, expert, 0, D, outputs_first}};
  }
  const std::string one = base + std::to_string(expert) + ".";
  return {{MatrixRole::gate, F, D, one + "gate_proj.weight"},
          {MatrixRole::up, F, D, one + "up_proj.weight"},
          {MatrixRole::down, D, F, one + "down_proj.weight"}};
}

PublishedMatrix embedding_matrix(const ModelSpec& spec) {
  return {MatrixRole::embedding, spec.vocab, spec.hidden, "model.embed_tokens.weight"};
}

PublishedMatrix head_matrix(const ModelSpec& spec) {
  return {MatrixRole::head, spec.vocab, spec.hidden,
          spec.tied_head ? "model.embed_tokens.weight" : "lm_head.weight"};
}

PublishedMatrix final_norm_matrix(const ModelSpec& spec) {
  return {MatrixRole::final_norm, 1, spec.hidden, "model.norm.weight"};
}

}  // namespace tailor
