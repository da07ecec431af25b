#include <cmath>

#include "base/error.h"
#include "base/text.h"
#include "data/gguf/metadata.h"

namespace tailor {
namespace {

// What llama.cpp takes for granted of Llama 4 (src/models/llama4.cpp).
constexpr std::int64_t kChunk = 8192, kNoRopeEvery = 4, kExpertsWithoutQkNorm = 128;
constexpr double kTemperatureFloor = 8192, kTemperatureScale = 0.1;

[[noreturn]] void refuse(const std::string& what, const std::string& mend) {
  throw Error(
      Fault::usage,
      {"llama.cpp cannot run this model: " + what, "config.json",
       mend.empty() ? "Serve the checkpoint with vLLM, SGLang or transformers instead." : mend});
}

double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

/// One value after the other under the architecture's name.
class Values {
 public:
  explicit Values(const char* architecture) : prefix_(std::string(architecture) + ".") {}
  void add(const std::string& key, GgufValue value) {
    list_.emplace_back(prefix_ + key, std::move(value));
  }
  void integer(const std::string& key, std::int64_t value) { add(key, GgufValue::of_u32(value)); }
  void real(const std::string& key, double value) { add(key, GgufValue::of_f32(value)); }
  std::vector<std::pair<std::string, GgufValue>> take() { return std::move(list_); }

 private:
  std::string prefix_;
  std::vector<std::pair<std::string, GgufValue>> list_;
};

void check_llama4(const ModelSpec& spec) {
  const bool norm_there = spec.experts != kExpertsWithoutQkNorm;
  if (spec.qk_norm != norm_there) {
    refuse("use_qk_norm is " + std::string(spec.qk_norm ? "true" : "false") + " with " +
               std::to_string(spec.experts) + " experts, and llama.cpp leaves that norm out for " +
               std::to_string(kExpertsWithoutQkNorm) + " experts and for no other number",
           "");
  }
  if (spec.shared_width != spec.expert_width)
    refuse("its shared expert is not as wide as the others", "");
  bool without_rope = false;
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    const LayerSpec& layer = spec.layers[static_cast<std::size_t>(l)];
    const bool rope = (l + 1) % kNoRopeEvery != 0;
    if (layer.rope != rope) {
      refuse("layer " + std::to_string(l) + (layer.rope ? " has" : " has no") +
                 " rotary embedding (no_rope_layers), and llama.cpp leaves it out in every fourth "
                 "layer",
             "");
    }
    without_rope = without_rope || !rope;
    const std::int64_t chunk = rope ? kChunk : 0;
    const bool never_reached =
        layer.attention_chunk >= spec.positions_max || layer.attention_chunk == 0;
    if (layer.attention_chunk != chunk && !(never_reached && spec.positions_max <= kChunk)) {
      refuse("layer " + std::to_string(l) + " attends " +
                 (layer.attention_chunk == 0
                      ? std::string("without chunks")
                      : "in chunks of " + std::to_string(layer.attention_chunk)) +
                 ", and llama.cpp in chunks of 8192 wherever there is rotary embedding",
             "");
    }
  }
  if (!without_rope) return;
  const bool published = spec.temperature && spec.temperature_floor == kTemperatureFloor &&
                         spec.temperature_scale == kTemperatureScale;
  const bool never_reached =
      (!spec.temperature || static_cast<double>(spec.positions_max) < spec.temperature_floor) &&
      static_cast<double>(spec.positions_max) < kTemperatureFloor;
  if (!published && !never_reached) {
    refuse("attn_temperature_tuning is " + std::string(spec.temperature ? "true" : "false") +
               ", floor_scale " + number_text(spec.temperature_floor) + ", attn_scale " +
               number_text(spec.temperature_scale) +
               ", and llama.cpp always has true, 8192 and 0.1",
           "A max_position_embeddings below 8192 makes no use of them and is accepted.");
  }
}

/// Every how many layers is one of experts; llama.cpp knows no other pattern.
std::int64_t moe_step(const ModelSpec& spec) {
  std::int64_t first = 0;
  while (first < spec.layer_count() && !spec.layers[static_cast<std::size_t>(first)].moe) ++first;
  if (first == spec.layer_count()) refuse("no layer has experts", "");
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    if (spec.layers[static_cast<std::size_t>(l)].moe == ((l + 1) % (first + 1) == 0)) continue;
    refuse("layers with experts (moe_layers) do not come at even distances", "");
  }
  return first + 1;
}

void add_llama4(const ModelSpec& spec, Values& out) {
  check_llama4(spec);
  out.integer("feed_forward_length", spec.dense_width);
  out.integer("expert_feed_forward_length", spec.expert_width);
  out.integer("expert_count", spec.experts);
  out.integer("expert_used_count", spec.experts_per_token);
  out.integer("interleave_moe_layer_step", moe_step(spec));
}

void add_deepseek(const ModelSpec& spec, Values& out) {
  const LatentSpec& latent = spec.latent;
  if (!spec.rope.pairs) refuse("rope_interleave is false", "");
  // llama.cpp takes models of these depths for small ones that have no latent of queries.
  const std::int64_t layers = spec.layer_count();
  const bool lite = layers == 26 || layers == 27 || (layers == 48 && spec.vocab == 128256);
  if (lite && latent.q_rank > 0) {
    refuse("with " + std::to_string(layers) +
               " layers it is taken for DeepSeek V2 Lite, whose "
               "queries have no latent (q_lora_rank)",
           "");
  }
  out.integer("feed_forward_length", spec.dense_width);
  out.integer("leading_dense_block_count", layers - spec.moe_layer_count());
  out.integer("attention.q_lora_rank", latent.q_rank);
  out.integer("attention.kv_lora_rank", latent.kv_rank);
  out.integer("attention.key_length_mla", latent.nope_dim + latent.rope_dim);
  out.integer("attention.value_length_mla", latent.value_dim);
  out.integer("expert_feed_forward_length", spec.expert_width);
  out.integer("expert_count", spec.experts);
  out.integer("expert_used_count", spec.experts_per_token);
  out.integer("expert_shared_count", spec.shared_width / spec.expert_width);
  out.integer("expert_gating_func", 2);  // sigmoid
  out.real("expert_weights_scale", spec.router.scale);
  out.add("expert_weights_norm", GgufValue::of_bool(spec.router.normalise));
  if (spec.router.groups_kept < spec.router.groups) {  // else groups choose nothing
    if (spec.router.groups >= spec.experts) refuse("every expert is a group (n_group)", "");
    out.integer("expert_group_count", spec.router.groups);
    out.integer("expert_group_used_count", spec.router.groups_kept);
  }
}

void add_yarn(const ModelSpec& spec, Values& out) {
  const RopeSpec& rope = spec.rope;
  if (!rope.truncate) refuse("yarn with truncate: false", "");
  if (rope.factor <= 1) refuse("yarn with a factor of " + number_text(rope.factor), "");
  out.add("rope.scaling.type", GgufValue::of_text("yarn"));
  out.real("rope.scaling.factor", rope.factor);
  out.integer("rope.scaling.original_context_length",
              static_cast<std::int64_t>(rope.original_positions));
  out.real("rope.scaling.yarn_beta_fast", rope.beta_fast);
  out.real("rope.scaling.yarn_beta_slow", rope.beta_slow);
  const double usual = yarn_mscale(rope.factor, 1);
  if (!spec.is_latent()) {
    if (rope.attention_factor != usual) {
      out.real("rope.scaling.attn_factor", rope.attention_factor / usual);
    }
    return;
  }
  // src/models/deepseek2.cpp: one number for mscale and mscale_all_dim, and both must be there.
  if (rope.mscale_all_dim == 0 || std::fabs(rope.attention_factor - 1) > 1e-12) {
    refuse("yarn whose mscale and mscale_all_dim differ or are not set", "");
  }
  out.real("rope.scaling.yarn_log_multiplier", 0.1 * rope.mscale_all_dim);
}

void add_rope(const ModelSpec& spec, Values& out) {
  const bool factors_read = spec.family == Family::llama || spec.family == Family::llama4;
  out.real("rope.freq_base", spec.rope.theta);
  out.integer("rope.dimension_count", spec.rope_width());
  switch (spec.rope.kind) {
    case RopeSpec::Kind::plain:
      return;
    case RopeSpec::Kind::yarn:
      return add_yarn(spec, out);
    case RopeSpec::Kind::llama3:
    case RopeSpec::Kind::longrope:
      if (!factors_read) {
        refuse("rope type " +
                   std::string(spec.rope.kind == RopeSpec::Kind::llama3 ? "llama3" : "longrope") +
                   " with model_type " + family_name(spec.family),
               "");
      }
      if (spec.rope.attention_factor != 1) {
        out.real("rope.scaling.attn_factor", spec.rope.attention_factor);
      }
      return;
  }
}

}  // namespace

const char* gguf_architecture(Family family) {
  return family == Family::deepseek_v3 ? "deepseek2" : family_name(family);
}

std::vector<std::pair<std::string, GgufValue>> gguf_model_values(const ModelSpec& spec,
                                                                 const std::string& name,
                                                                 std::int64_t file_type) {
  constexpr std::int64_t kLayersMax = 512, kExpertsMax = 1024;  // src/llama-hparams.h
  if (spec.layer_count() > kLayersMax) refuse("more than 512 layers", "");
  if (spec.experts > kExpertsMax) refuse("more than 1,024 experts a layer", "");
  Values out(gguf_architecture(spec.family));
  out.integer("block_count", spec.layer_count());
  out.integer("context_length", spec.positions_max);
  out.integer("embedding_length", spec.hidden);
  out.integer("vocab_size", spec.vocab);
  out.integer("attention.head_count", spec.heads);
  if (spec.is_latent()) {  // one shared key and value: the latent, which holds both
    out.integer("attention.head_count_kv", 1);
    out.integer("attention.key_length", spec.latent.kv_rank + spec.latent.rope_dim);
    out.integer("attention.value_length", spec.latent.kv_rank);
  } else {
    out.integer("attention.head_count_kv", spec.kv_heads);
    out.integer("attention.key_length", spec.head_dim);
    out.integer("attention.value_length", spec.head_dim);
  }
  out.real("attention.layer_norm_rms_epsilon", spec.norm_eps);
  switch (spec.family) {
    case Family::llama4:
      add_llama4(spec, out);
      break;
    case Family::deepseek_v3:
      add_deepseek(spec, out);
      break;
    default:
      out.integer("feed_forward_length", spec.dense_width);
  }
  add_rope(spec, out);
  std::vector<std::pair<std::string, GgufValue>> values = {
      {"general.architecture", GgufValue::of_text(gguf_architecture(spec.family))},
      {"general.type", GgufValue::of_text("model")},
      {"general.name", GgufValue::of_text(name)},
      {"general.file_type", GgufValue::of_u32(file_type)},
      {"general.quantization_version", GgufValue::of_u32(2)}};
  for (auto& value : out.take()) values.push_back(std::move(value));
  return values;
}

}  // namespace tailor
