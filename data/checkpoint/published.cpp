#include "data/checkpoint/published.h"

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
  }
  return "?";
}

std::vector<PublishedMatrix> attention_matrices(const ModelSpec& spec, std::int64_t layer) {
  const std::int64_t D = spec.hidden, Q = spec.query_width(), KV = spec.kv_width();
  const std::string base = layer_name(layer), attention = base + "self_attn.";
  return {{MatrixRole::input_norm, 1, D, base + "input_layernorm.weight"},
          {MatrixRole::q, Q, D, attention + "q_proj.weight"},
          {MatrixRole::k, KV, D, attention + "k_proj.weight"},
          {MatrixRole::v, KV, D, attention + "v_proj.weight"},
          {MatrixRole::o, D, Q, attention + "o_proj.weight"}};
}

std::vector<PublishedMatrix> feed_forward_matrices(const ModelSpec& spec, std::int64_t layer) {
  const std::int64_t D = spec.hidden;
  const bool moe = is_moe(spec, layer);
  const std::int64_t F = moe ? spec.expert_width : spec.dense_width;
  const std::string base = feed_forward_name(spec, layer);
  const std::string mlp = base + (moe ? "shared_expert." : "");
  std::vector<PublishedMatrix> out = {
      {MatrixRole::post_norm, 1, D, layer_name(layer) + "post_attention_layernorm.weight"}};
  if (moe) out.push_back({MatrixRole::router, spec.experts, D, base + "router.weight"});
  out.push_back({MatrixRole::gate, F, D, mlp + "gate_proj.weight"});
  out.push_back({MatrixRole::up, F, D, mlp + "up_proj.weight"});
  out.push_back({MatrixRole::down, D, F, mlp + "down_proj.weight"});
  return out;
}

std::vector<PublishedMatrix> expert_matrices(const ModelSpec& spec, std::int64_t layer,
                                             std::int64_t expert, bool experts_fused) {
  TAILOR_CHECK(is_moe(spec, layer) && expert >= 0 && expert < spec.experts);
  const std::int64_t D = spec.hidden, F = spec.expert_width;
  const std::string base = feed_forward_name(spec, layer) + "experts.";
  if (experts_fused) {
    const std::string gate_up = base + "gate_up_proj", down = base + "down_proj";
    return {{MatrixRole::gate, F, D, gate_up, true, expert, 0, 2 * F},
            {MatrixRole::up, F, D, gate_up, true, expert, F, 2 * F},
            {MatrixRole::down, D, F, down, true, expert, 0, D}};
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
