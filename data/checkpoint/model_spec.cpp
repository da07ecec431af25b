#include "data/checkpoint/model_spec.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.h"
#include "base/text.h"
#include "data/checkpoint/published.h"

namespace tailor {
namespace {

constexpr std::int64_t kSizeMax = std::int64_t{1} << 32U;

[[noreturn]] void refuse(const std::string& where, const std::string& what,
                         const std::string& mend) {
  throw Error(Fault::bad_file, {what, where, mend});
}

std::int64_t size_of(const JsonReader& config, std::string_view key) {
  const std::int64_t value = config.integer(key);
  if (value < 1 || value > kSizeMax) {
    refuse(config.where(),
           std::string(key) + " is " + std::to_string(value) + ", needed: 1 or more",
           "Check that config.json is the one published with the weights.");
  }
  return value;
}

/// YaRN's correction of attention's temperature (Peng et al., arXiv 2309.00071, section 3.4).
double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

void refuse_option(const JsonReader& config, std::string_view key, const Json& only) {
  if (!config.has(key) || config.at(key) == only) return;
  refuse(config.where(),
         std::string(key) + " is " + config.at(key).dump() + ", which Tailor does not implement",
         "Models with " + std::string(key) + ": " + only.dump() + " can be trained.");
}

// Of transformers 5.17 modeling_rope_utils.py, _compute_yarn_parameters.
void read_yarn(const JsonReader& rope, const JsonReader& config, RopeSpec& out) {
  out.kind = RopeSpec::Kind::yarn;
  out.factor = rope.number("factor");
  out.original_positions =
      rope.number("original_max_position_embeddings",
                  static_cast<double>(config.integer("max_position_embeddings", 0)));
  out.beta_fast = rope.number("beta_fast", 32);
  out.beta_slow = rope.number("beta_slow", 1);
  out.truncate = rope.boolean("truncate", true);
  out.mscale_all_dim = rope.number("mscale_all_dim", 0);
  const double mscale = rope.number("mscale", 0);
  if (!(out.factor >= 1) || !(out.original_positions > 0) || !(out.beta_slow > 0) ||
      !(out.beta_fast >= out.beta_slow) || !(out.theta > 1)) {
    refuse(rope.where(), "yarn rope scaling has impossible factors",
           "Check that config.json is the one published with the weights.");
  }
  const bool both = mscale != 0 && out.mscale_all_dim != 0;
  const double own =
      both ? yarn_mscale(out.factor, mscale) / yarn_mscale(out.factor, out.mscale_all_dim)
           : yarn_mscale(out.factor, 1);
  out.attention_factor = rope.number("attention_factor", own);
}

// The factors for short texts are used. Models that switch to others past their original length
// would turn one text differently by its length, which packed sequences cannot.
void read_longrope(const JsonReader& rope, const JsonReader& config, RopeSpec& out) {
  out.kind = RopeSpec::Kind::longrope;
  const auto positions = static_cast<double>(config.integer("max_position_embeddings", 0));
  out.original_positions =
      rope.number("original_max_position_embeddings",
                  config.number("original_max_position_embeddings", positions));
  for (const char* key : {"short_factor", "long_factor"}) {
    if (!rope.has(key) || !rope.at(key).is_array()) {
      refuse(rope.where(), std::string(key) + " of longrope is not a list of numbers",
             "Check that config.json is the one published with the weights.");
    }
    for (const Json& factor : rope.at(key)) {
      if (factor.is_number() && factor.get<double>() > 0) continue;
      refuse(rope.where(), std::string(key) + " of longrope holds " + factor.dump().substr(0, 40),
             "Factors are numbers above 0.");
    }
  }
  out.factors = rope.at("short_factor").get<std::vector<double>>();
  if (!(out.original_positions > 0) ||
      (rope.at("long_factor") != rope.at("short_factor") && positions > out.original_positions)) {
    refuse(rope.where(), "longrope with other factors past its original length is not implemented",
           "Set max_position_embeddings to original_max_position_embeddings: the factors for short "
           "texts hold up to there.");
  }
  const double stretch = rope.number("factor", positions / out.original_positions);
  const double own =
      stretch <= 1 ? 1 : std::sqrt(1 + std::log(stretch) / std::log(out.original_positions));
  out.attention_factor = rope.number("attention_factor", own);
}

RopeSpec read_rope(const JsonReader& config) {
  const Json empty = Json::object();
  const bool new_style = config.has("rope_parameters");
  const bool old_style = config.has("rope_scaling");
  const Json& source = new_style   ? config.at("rope_parameters")
                       : old_style ? config.at("rope_scaling")
                                   : empty;
  const JsonReader rope(source,
                        config.where() + (new_style ? ", rope_parameters" : ", rope_scaling"));
  RopeSpec out;
  out.theta = rope.number("rope_theta", config.number("rope_theta", 10000.0));
  const std::string kind = rope.text("rope_type", rope.text("type", "default"));
  if (kind == "llama3") {
    out.kind = RopeSpec::Kind::llama3;
    out.factor = rope.number("factor");
    out.low_freq_factor = rope.number("low_freq_factor");
    out.high_freq_factor = rope.number("high_freq_factor");
    out.original_positions = rope.number("original_max_position_embeddings");
    // Llama 4 Scout is published with equal factors: the ramp between them is empty then.
    if (!(out.factor >= 1) || !(out.high_freq_factor >= out.low_freq_factor) ||
        !(out.original_positions > 0)) {
      refuse(rope.where(), "llama3 rope scaling has impossible factors",
             "Check that config.json is the one published with the weights.");
    }
  } else if (kind == "yarn") {
    read_yarn(rope, config, out);
  } else if (kind == "longrope") {
    read_longrope(rope, config, out);
  } else if (kind != "default") {
    refuse(rope.where(), "rope type '" + kind + "' is not implemented",
           "Rope types 'default', 'llama3', 'yarn' and 'longrope' can be trained.");
  }
  if (!(out.theta > 0)) refuse(rope.where(), "rope_theta must be positive", "Check config.json.");
  return out;
}

void read_common(const JsonReader& config, ModelSpec& spec) {
  spec.hidden = size_of(config, "hidden_size");
  spec.heads = size_of(config, "num_attention_heads");
  spec.vocab = size_of(config, "vocab_size");
  spec.positions_max = config.integer("max_position_embeddings", 8192);
  spec.norm_eps = config.number("rms_norm_eps", 1e-5);
  spec.tied_head = config.boolean("tie_word_embeddings", false);
  spec.rope = read_rope(config);
  const std::int64_t layers = size_of(config, "num_hidden_layers");
  if (layers > 10'000)
    refuse(config.where(), "num_hidden_layers is " + std::to_string(layers), "Check config.json.");
  spec.layers.resize(static_cast<std::size_t>(layers));
  refuse_option(config, "hidden_act", "silu");
  refuse_option(config, "mlp_bias", false);
  refuse_option(config, "attention_bias", false);
}

/// Heads that share keys and values among some of them; latent attention's are read with its ranks.
void read_grouped_heads(const JsonReader& config, ModelSpec& spec) {
  spec.kv_heads =
      config.has("num_key_value_heads") ? size_of(config, "num_key_value_heads") : spec.heads;
  spec.head_dim = config.has("head_dim") ? size_of(config, "head_dim") : spec.hidden / spec.heads;
  if (spec.heads % spec.kv_heads != 0 || spec.head_dim % 2 != 0) {
    refuse(config.where(),
           std::to_string(spec.heads) + " attention heads of width " +
               std::to_string(spec.head_dim) + " do not divide over " +
               std::to_string(spec.kv_heads) + " key-value heads",
           "Check that config.json is the one published with the weights.");
  }
}

bool truthy(const JsonReader& config, std::string_view key, bool fallback) {
  if (!config.has(key)) return fallback;
  const Json& value = config.at(key);
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number_integer()) return value.get<std::int64_t>() != 0;  // published configs hold 4
  refuse(config.where(), std::string(key) + " must be true or false", "Check config.json.");
}

/// A per-layer list of the config, of the model's length.
std::vector<std::int64_t> layer_list(const JsonReader& config, std::string_view key,
                                     std::size_t layers) {
  std::vector<std::int64_t> out;
  if (!config.has(key)) return out;
  for (const Json& value : config.at(key)) {
    if (!value.is_number_integer() && !value.is_boolean()) {
      refuse(config.where(), std::string(key) + " is not a list of numbers", "Check config.json.");
    }
    out.push_back(value.is_boolean() ? (value.get<bool>() ? 1 : 0) : value.get<std::int64_t>());
  }
  if (!out.empty() && layers != 0 && out.size() != layers) {
    refuse(config.where(),
           std::string(key) + " has " + std::to_string(out.size()) + " entries for " +
               std::to_string(layers) + " layers",
           "Check config.json.");
  }
  return out;
}

void check_experts_per_token(const JsonReader& config, const ModelSpec& spec) {
  if (spec.experts_per_token >= 1 && spec.experts_per_token <= spec.experts) return;
  refuse(config.where(),
         "num_experts_per_tok is " + std::to_string(spec.experts_per_token) + " of " +
             std::to_string(spec.experts) + " experts",
         "Check config.json.");
}

// Defaults follow transformers 5.17 configuration_llama4.py.
void read_llama4(const JsonReader& config, ModelSpec& spec) {
  read_grouped_heads(config, spec);
  spec.rope.pairs = true;
  spec.dense_width = size_of(config, "intermediate_size_mlp");
  spec.expert_width = spec.shared_width = size_of(config, "intermediate_size");
  spec.experts = size_of(config, "num_local_experts");
  spec.experts_per_token = config.integer("num_experts_per_tok", 1);
  check_experts_per_token(config, spec);
  spec.qk_norm = config.boolean("use_qk_norm", true);
  spec.temperature = truthy(config, "attn_temperature_tuning", true);
  spec.temperature_floor = config.number("floor_scale", 8192);
  spec.temperature_scale = config.number("attn_scale", 0.1);

  const std::size_t count = spec.layers.size();
  const std::vector<std::int64_t> rope_layers = layer_list(config, "no_rope_layers", count);
  const std::int64_t interval = config.integer("no_rope_layer_interval", 4);
  const std::int64_t step = config.integer("interleave_moe_layer_step", 1);
  if (step < 1 || interval < 1)
    refuse(config.where(), "layer intervals must be 1 or more", "Check config.json.");
  const bool has_list = config.has("moe_layers");
  const std::vector<std::int64_t> moe_list = layer_list(config, "moe_layers", 0);
  const std::int64_t chunk = config.integer("attention_chunk_size", 8192);
  const Json* types = config.has("layer_types") ? &config.at("layer_types") : nullptr;
  if (types != nullptr && (!types->is_array() || types->size() != count)) {
    refuse(config.where(), "layer_types does not name every layer", "Check config.json.");
  }
  for (std::size_t l = 0; l < count; ++l) {
    LayerSpec& layer = spec.layers[l];
    const auto number = static_cast<std::int64_t>(l);
    layer.rope = rope_layers.empty() ? (number + 1) % interval != 0 : rope_layers[l] != 0;
    layer.moe = has_list ? std::find(moe_list.begin(), moe_list.end(), number) != moe_list.end()
                         : number % step == step - 1;
    bool chunked = layer.rope;
    if (types != nullptr) {
      if ((*types)[l] != "chunked_attention" && (*types)[l] != "full_attention") {
        refuse(config.where(),
               "layer_types[" + std::to_string(l) + "] is " + (*types)[l].dump() +
                   ", which is not implemented",
               "Layers of 'chunked_attention' and 'full_attention' can be trained.");
      }
      chunked = (*types)[l] == "chunked_attention";
    }
    layer.attention_chunk = chunked ? chunk : 0;
  }
}

void read_llama(const JsonReader& config, ModelSpec& spec) {
  read_grouped_heads(config, spec);
  spec.dense_width = size_of(config, "intermediate_size");
}

void read_qwen2(const JsonReader& config, ModelSpec& spec) {
  read_grouped_heads(config, spec);
  spec.dense_width = size_of(config, "intermediate_size");
  spec.qkv_bias = true;
  refuse_option(config, "use_sliding_window", false);
  if (!config.has("layer_types")) return;
  for (const Json& type : config.at("layer_types")) {
    if (type == "full_attention") continue;
    refuse(config.where(), "layer_types holds " + type.dump() + ", which is not implemented",
           "Layers of 'full_attention' can be trained.");
  }
}

/// Blocks of fp8 weights are told by the sizes of their scales; the config must not say otherwise.
void check_quantisation(const JsonReader& config) {
  if (!config.has("quantization_config")) return;
  const JsonReader quant(config.at("quantization_config"),
                         config.where() + ", quantization_config");
  if (quant.text("quant_method", "") != "fp8") return;
  refuse_option(quant, "fmt", "e4m3");
  if (quant.has("weight_block_size")) {
    refuse_option(quant, "weight_block_size", Json::array({128, 128}));
  }
}

/// A size that the others determine: written beside them by some programs, never another.
void check_derived(const JsonReader& config, std::string_view key, std::int64_t needed,
                   const std::string& as) {
  if (!config.has(key)) return;
  const std::int64_t found = config.integer(key);
  if (found == needed) return;
  refuse(config.where(),
         std::string(key) + " is " + std::to_string(found) + ", needed: " + std::to_string(needed) +
             ", " + as,
         "Latent attention of deepseek_v3 expands keys and values for every head. Check that "
         "config.json is the one published with the weights, or leave the key out.");
}

/// What later families put into attention, residuals and experts (DeepSeek V3.2 and V4;
/// transformers 5.17 configuration_deepseek_v32.py, configuration_deepseek_v4.py): such a model may
/// call itself deepseek_v3, but is another function.
void refuse_later_families(const JsonReader& config) {
  constexpr std::string_view kLater[] = {"index_topk",
                                         "index_head_dim",
                                         "index_n_heads",
                                         "compress_ratios",
                                         "compress_rates",
                                         "compress_rope_theta",
                                         "compress_rate_csa",
                                         "compress_rate_hca",
                                         "hc_mult",
                                         "hc_sinkhorn_iters",
                                         "hc_eps",
                                         "num_hash_layers",
                                         "mlp_layer_types",
                                         "swiglu_limit",
                                         "sliding_window",
                                         "o_groups",
                                         "o_lora_rank",
                                         "layer_types"};
  for (const std::string_view key : kLater) {
    if (!config.has(key)) continue;
    refuse(config.where(),
           std::string(key) + " is " + config.at(key).dump().substr(0, 60) +
               ", which Tailor does not implement: DeepSeek V3.2 and V4 have it",
           "DeepSeek V3 and R1 can be trained, whose configs do not have this key: full latent "
           "attention, plain residuals, every token routed by its scores.");
  }
  refuse_option(config, "expert_dtype", "fp8");
}

// Defaults follow transformers 5.17 configuration_deepseek_v3.py; what published configs say beside
// (DeepSeek-V3, DeepSeek-R1) is checked against the one thing that is implemented.
void read_deepseek_v3(const JsonReader& config, ModelSpec& spec) {
  refuse_later_families(config);
  LatentSpec& latent = spec.latent;
  latent.q_rank = config.has("q_lora_rank") ? size_of(config, "q_lora_rank") : 0;
  latent.kv_rank = size_of(config, "kv_lora_rank");
  latent.nope_dim = size_of(config, "qk_nope_head_dim");
  latent.rope_dim = size_of(config, "qk_rope_head_dim");
  latent.value_dim = size_of(config, "v_head_dim");
  spec.kv_heads = spec.heads;
  spec.head_dim = latent.nope_dim + latent.rope_dim;
  if (latent.rope_dim % 2 != 0) {
    refuse(config.where(), "qk_rope_head_dim is " + std::to_string(latent.rope_dim),
           "Rotary embedding needs an even width.");
  }
  check_derived(config, "num_key_value_heads", spec.heads, "as num_attention_heads");
  check_derived(config, "head_dim", latent.rope_dim, "as qk_rope_head_dim");
  check_derived(config, "qk_head_dim", spec.head_dim,
                "the sum of qk_nope_head_dim and qk_rope_head_dim");
  spec.rope.pairs = config.boolean("rope_interleave", true);

  refuse_option(config, "topk_method", "noaux_tc");
  refuse_option(config, "scoring_func", "sigmoid");
  refuse_option(config, "moe_layer_freq", 1);
  check_quantisation(config);
  spec.dense_width = size_of(config, "intermediate_size");
  spec.expert_width = size_of(config, "moe_intermediate_size");
  spec.shared_width = spec.expert_width * size_of(config, "n_shared_experts");
  spec.experts = size_of(config, "n_routed_experts");
  spec.experts_per_token = size_of(config, "num_experts_per_tok");
  check_experts_per_token(config, spec);
  RouterSpec& router = spec.router;
  router.kind = RouterSpec::Kind::grouped_sigmoid;
  router.groups = config.integer("n_group", 8);
  router.groups_kept = config.integer("topk_group", 4);
  router.normalise = config.boolean("norm_topk_prob", true);
  router.scale = config.number("routed_scaling_factor", 2.5);
  if (router.groups < 1 || spec.experts % router.groups != 0 || router.groups_kept < 1 ||
      router.groups_kept > router.groups ||
      spec.experts / router.groups * router.groups_kept < spec.experts_per_token) {
    refuse(config.where(),
           "n_group " + std::to_string(router.groups) + ", topk_group " +
               std::to_string(router.groups_kept) + " and num_experts_per_tok " +
               std::to_string(spec.experts_per_token) + " do not fit " +
               std::to_string(spec.experts) + " experts",
           "Groups divide the experts, and those kept hold num_experts_per_tok or more.");
  }
  const std::int64_t dense = config.integer("first_k_dense_replace", 3);
  for (std::size_t l = 0; l < spec.layers.size(); ++l) {
    spec.layers[l].moe = static_cast<std::int64_t>(l) >= dense;
  }
  if (dense < 0 || spec.moe_layer_count() == 0) {
    refuse(config.where(), "first_k_dense_replace is " + std::to_string(dense),
           "At least one layer has routed experts.");
  }
  spec.prediction_layers = config.integer("num_nextn_predict_layers", 0);
}

void check_rope_factors(const JsonReader& config, const ModelSpec& spec) {
  const std::size_t found = spec.rope.factors.size();
  const std::int64_t pairs = spec.rope_width() / 2;
  if (found == 0 || found == static_cast<std::size_t>(pairs)) return;
  refuse(
      config.where(),
      "longrope has " + std::to_string(found) + " factors for " + std::to_string(pairs) + " pairs",
      std::string("short_factor holds one for every pair of ") +
          (spec.is_latent() ? "qk_rope_head_dim." : "a head's width."));
}

/// Of `experts` routed experts a layer.
std::int64_t count_parameters(const ModelSpec& spec, std::int64_t experts) {
  const auto sum = [](const std::vector<PublishedMatrix>& matrices) {
    std::int64_t total = 0;
    for (const PublishedMatrix& matrix : matrices) total += matrix.rows * matrix.columns;
    return total;
  };
  std::int64_t total = sum({embedding_matrix(spec), final_norm_matrix(spec)});
  if (!spec.tied_head) total += sum({head_matrix(spec)});
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    total += sum(attention_matrices(spec, l)) + sum(feed_forward_matrices(spec, l));
    if (!spec.layers[static_cast<std::size_t>(l)].moe) continue;
    total += experts * sum(expert_matrices(spec, l, 0, false));
  }
  return total;
}

}  // namespace

const char* family_name(Family family) {
  switch (family) {
    case Family::llama:
      return "llama";
    case Family::llama4:
      return "llama4";
    case Family::qwen2:
      return "qwen2";
    case Family::deepseek_v3:
      return "deepseek_v3";
  }
  return "?";
}

std::int64_t ModelSpec::moe_layer_count() const {
  return std::count_if(layers.begin(), layers.end(),
                       [](const LayerSpec& layer) { return layer.moe; });
}
// modeling_deepseek_v3.py, DeepseekV3Attention.
double ModelSpec::softmax_scale() const {
  const double scale = 1 / std::sqrt(static_cast<double>(head_dim));
  if (!is_latent() || rope.mscale_all_dim == 0) return scale;
  const double mscale = yarn_mscale(rope.factor, rope.mscale_all_dim);
  return scale * mscale * mscale;
}
std::int64_t ModelSpec::parameters() const { return count_parameters(*this, experts); }
std::int64_t ModelSpec::active_parameters() const {
  return count_parameters(*this, experts_per_token);
}

ModelSpec model_spec_from_config(const Json& config, const std::string& where) {
  const JsonReader whole(config, where);
  ModelSpec spec;
  if (whole.has("architectures") && whole.at("architectures").is_array() &&
      !whole.at("architectures").empty()) {
    const Json& first = whole.at("architectures")[0];
    spec.architecture = first.is_string() ? first.get<std::string>() : first.dump();
  }
  const std::string type = whole.text("model_type");
  const bool wrapper = type == "llama4";
  const Json& text = wrapper ? whole.at("text_config") : config;
  const JsonReader reader(text, wrapper ? where + ", text_config" : where);
  if (type == "llama4" || type == "llama4_text") {
    spec.family = Family::llama4;
    read_common(reader, spec);
    read_llama4(reader, spec);
  } else if (type == "llama") {
    spec.family = Family::llama;
    read_common(reader, spec);
    read_llama(reader, spec);
  } else if (type == "qwen2") {
    spec.family = Family::qwen2;
    read_common(reader, spec);
    read_qwen2(reader, spec);
  } else if (type == "deepseek_v3") {
    spec.family = Family::deepseek_v3;
    read_common(reader, spec);
    read_deepseek_v3(reader, spec);
  } else {
    refuse(
        where,
        "model_type '" + type + "' is not supported" +
            (spec.architecture.empty() ? "" : " (architecture " + spec.architecture + ")"),
        "Supported: llama (LlamaForCausalLM), qwen2 (Qwen2ForCausalLM), llama4 (Llama4ForCausalLM "
        "and the language part of Llama4ForConditionalGeneration), deepseek_v3 "
        "(DeepseekV3ForCausalLM: V3, R1).");
  }
  check_rope_factors(reader, spec);
  if (wrapper && whole.has("tie_word_embeddings") && !reader.has("tie_word_embeddings")) {
    spec.tied_head = whole.boolean("tie_word_embeddings", false);
  }
  return spec;
}

ModelSpec read_model_spec(const fs::path& model_folder) {
  const fs::path path = model_folder / "config.json";
  std::error_code error;
  if (!fs::exists(path, error)) {
    throw Error(Fault::bad_file, {"config.json is missing", model_folder.string(),
                                  "Name the folder of a Hugging Face model: config.json beside its "
                                  "safetensors files."});
  }
  return model_spec_from_config(read_json(path), path.string());
}

}  // namespace tailor
