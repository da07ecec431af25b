#include "data/gguf/tensors.h"

#include <cmath>
#include <numbers>

#include "base/error.h"

namespace tailor {
namespace {

/// The name within a layer, without "blk.0." and ".weight".
std::string layer_part(const ModelSpec& spec, MatrixRole role, std::int64_t layer, bool routed) {
  const bool moe = spec.layers[static_cast<std::size_t>(layer)].moe;
  const std::string kind = routed ? "_exps" : moe ? "_shexp" : "";
  switch (role) {
    case MatrixRole::input_norm:
      return "attn_norm";
    case MatrixRole::q:
    case MatrixRole::q_bias:
      return "attn_q";
    case MatrixRole::k:
    case MatrixRole::k_bias:
      return "attn_k";
    case MatrixRole::v:
    case MatrixRole::v_bias:
      return "attn_v";
    case MatrixRole::o:
      return "attn_output";
    case MatrixRole::q_a:
      return "attn_q_a";
    case MatrixRole::q_a_norm:
      return "attn_q_a_norm";
    case MatrixRole::q_b:
      return "attn_q_b";
    case MatrixRole::kv_a:
      return "attn_kv_a_mqa";
    case MatrixRole::kv_a_norm:
      return "attn_kv_a_norm";
    case MatrixRole::post_norm:
      return "ffn_norm";
    case MatrixRole::router:
      return "ffn_gate_inp";
    case MatrixRole::router_bias:
      return "exp_probs_b";
    case MatrixRole::gate:
      return "ffn_gate" + kind;
    case MatrixRole::up:
      return "ffn_up" + kind;
    case MatrixRole::down:
      return "ffn_down" + kind;
    default:
      break;
  }
  TAILOR_CHECK(false, role_name(role));
}

bool is_bias(MatrixRole role) {
  return role == MatrixRole::q_bias || role == MatrixRole::k_bias || role == MatrixRole::v_bias ||
         role == MatrixRole::router_bias;
}

}  // namespace

std::vector<GgufPlace> gguf_places(const ModelSpec& spec, const PublishedMatrix& matrix,
                                   std::int64_t layer, std::int64_t expert) {
  GgufPlace place;
  place.float32 = matrix.is_vector() || matrix.role == MatrixRole::router;
  place.shape =
      matrix.is_vector() ? std::vector{matrix.columns} : std::vector{matrix.rows, matrix.columns};
  switch (matrix.role) {
    case MatrixRole::embedding:
      place.tensor = "token_embd.weight";
      return {place};
    case MatrixRole::head:
      place.tensor = "output.weight";
      return {place};
    case MatrixRole::final_norm:
      place.tensor = "output_norm.weight";
      return {place};
    default:
      break;
  }
  const std::string block = "blk." + std::to_string(layer) + ".";
  if (matrix.role == MatrixRole::kv_b) {
    const LatentSpec& latent = spec.latent;
    GgufPlace values = place;
    place.heads = values.heads = spec.heads;
    place.tensor = block + "attn_k_b.weight";
    place.form = GgufForm::latent_keys;
    place.shape = {spec.heads, latent.kv_rank, latent.nope_dim};
    values.tensor = block + "attn_v_b.weight";
    values.form = GgufForm::latent_values;
    values.shape = {spec.heads, latent.value_dim, latent.kv_rank};
    return {place, values};
  }
  const bool routed = expert >= 0;
  place.tensor = block + layer_part(spec, matrix.role, layer, routed) +
                 (is_bias(matrix.role) ? ".bias" : ".weight");
  if (routed) {
    place.shape.insert(place.shape.begin(), spec.experts);
    place.first = expert * matrix.rows * matrix.columns;
  }
  const bool query = matrix.role == MatrixRole::q;
  if (spec.family == Family::llama && (query || matrix.role == MatrixRole::k)) {
    place.form = GgufForm::rotary_pairs;
    place.heads = query ? spec.heads : spec.kv_heads;
  }
  return {place};
}

std::vector<GgufMatrix> gguf_matrices(const ModelSpec& spec, bool experts_fused) {
  std::vector<GgufMatrix> out;
  const auto add = [&](PublishedMatrix matrix, std::int64_t layer, std::int64_t expert) {
    std::vector<GgufPlace> places = gguf_places(spec, matrix, layer, expert);
    out.push_back({std::move(matrix), std::move(places)});
  };
  add(embedding_matrix(spec), -1, -1);
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    for (PublishedMatrix& matrix : attention_matrices(spec, l)) add(std::move(matrix), l, -1);
    for (PublishedMatrix& matrix : feed_forward_matrices(spec, l)) add(std::move(matrix), l, -1);
    if (!spec.layers[static_cast<std::size_t>(l)].moe) continue;
    for (std::int64_t e = 0; e < spec.experts; ++e) {
      for (PublishedMatrix& matrix : expert_matrices(spec, l, e, experts_fused)) {
        add(std::move(matrix), l, e);
      }
    }
  }
  add(final_norm_matrix(spec), -1, -1);
  if (!spec.tied_head) add(head_matrix(spec), -1, -1);
  return out;
}

// llama3's: transformers 5.17 modeling_rope_utils.py, _compute_llama3_parameters, as quotients.
std::vector<float> rope_frequency_factors(const ModelSpec& spec) {
  const RopeSpec& rope = spec.rope;
  const auto pairs = static_cast<std::size_t>(spec.rope_width() / 2);
  std::vector<float> out;
  if (rope.kind == RopeSpec::Kind::longrope) {
    out.assign(rope.factors.begin(), rope.factors.end());
    TAILOR_CHECK(out.size() == pairs);
  }
  if (rope.kind != RopeSpec::Kind::llama3) return out;
  for (std::size_t i = 0; i < pairs; ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(spec.rope_width());
    const double wavelength = 2 * std::numbers::pi * std::pow(rope.theta, exponent);
    double factor = 1;
    if (wavelength > rope.original_positions / rope.low_freq_factor) {
      factor = rope.factor;
    } else if (wavelength >= rope.original_positions / rope.high_freq_factor) {
      const double smooth = (rope.original_positions / wavelength - rope.low_freq_factor) /
                            (rope.high_freq_factor - rope.low_freq_factor);
      factor = 1 / ((1 - smooth) / rope.factor + smooth);
    }
    out.push_back(static_cast<float>(factor));
  }
  return out;
}

}  // namespace tailor
