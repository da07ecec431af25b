#include "data/checkpoint/model_spec.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/text.h"

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

void refuse_option(const JsonReader& config, std::string_view key, const Json& only) {
  if (!config.has(key) || config.at(key) == only) return;
  refuse(config.where(),
         std::string(key) + " is " + config.at(key).dump() + ", which Tailor does not implement",
         "Models with " + std::string(key) + ": " + only.dump() + " can be trained.");
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
  } else if (kind != "default") {
    refuse(rope.where(), "rope type '" + kind + "' is not implemented",
           "Rope types 'default' and 'llama3' can be trained.");
  }
  if (!(out.theta > 0)) refuse(rope.where(), "rope_theta must be positive", "Check config.json.");
  return out;
}

void read_common(const JsonReader& config, ModelSpec& spec) {
  spec.hidden = size_of(config, "hidden_size");
  spec.heads = size_of(config, "num_attention_heads");
  spec.kv_heads =
      config.has("num_key_value_heads") ? size_of(config, "num_key_value_heads") : spec.heads;
  spec.head_dim = config.has("head_dim") ? size_of(config, "head_dim") : spec.hidden / spec.heads;
  spec.vocab = size_of(config, "vocab_size");
  spec.positions_max = config.integer("max_position_embeddings", 8192);
  spec.norm_eps = config.number("rms_norm_eps", 1e-5);
  spec.tied_head = config.boolean("tie_word_embeddings", false);
  spec.attention_bias = config.boolean("attention_bias", false);
  spec.rope = read_rope(config);
  const std::int64_t layers = size_of(config, "num_hidden_layers");
  if (layers > 10'000)
    refuse(config.where(), "num_hidden_layers is " + std::to_string(layers), "Check config.json.");
  spec.layers.resize(static_cast<std::size_t>(layers));
  refuse_option(config, "hidden_act", "silu");
  refuse_option(config, "mlp_bias", false);
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

// Defaults follow transformers 5.17 configuration_llama4.py.
void read_llama4(const JsonReader& config, ModelSpec& spec) {
  spec.rope.pairs = true;
  spec.dense_width = size_of(config, "intermediate_size_mlp");
  spec.expert_width = size_of(config, "intermediate_size");
  spec.experts = size_of(config, "num_local_experts");
  spec.experts_per_token = config.integer("num_experts_per_tok", 1);
  if (spec.experts_per_token < 1 || spec.experts_per_token > spec.experts) {
    refuse(config.where(),
           "num_experts_per_tok is " + std::to_string(spec.experts_per_token) + " of " +
               std::to_string(spec.experts) + " experts",
           "Check config.json.");
  }
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
  spec.dense_width = size_of(config, "intermediate_size");
  if (spec.attention_bias) {
    refuse(config.where(), "attention_bias is true, which Tailor does not implement for llama",
           "Llama models without attention biases can be trained.");
  }
}

std::int64_t layer_parameters(const ModelSpec& spec, const LayerSpec& layer, std::int64_t experts) {
  const std::int64_t attention = spec.hidden * (2 * spec.query_width() + 2 * spec.kv_width());
  const std::int64_t norms = 2 * spec.hidden;
  if (!layer.moe) return attention + norms + 3 * spec.hidden * spec.dense_width;
  return attention + norms + spec.experts * spec.hidden +
         (experts + 1) * 3 * spec.hidden * spec.expert_width;
}

std::int64_t count_parameters(const ModelSpec& spec, std::int64_t experts) {
  std::int64_t total = spec.vocab * spec.hidden * (spec.tied_head ? 1 : 2) + spec.hidden;
  for (const LayerSpec& layer : spec.layers) total += layer_parameters(spec, layer, experts);
  return total;
}

}  // namespace

std::int64_t ModelSpec::moe_layer_count() const {
  return std::count_if(layers.begin(), layers.end(),
                       [](const LayerSpec& layer) { return layer.moe; });
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
  } else {
    refuse(
        where,
        "model_type '" + type + "' is not supported" +
            (spec.architecture.empty() ? "" : " (architecture " + spec.architecture + ")"),
        "Supported: llama (LlamaForCausalLM), llama4 (Llama4ForCausalLM and the language part of "
        "Llama4ForConditionalGeneration).");
  }
  if (spec.family == Family::llama4 && spec.attention_bias) {
    refuse(where, "attention_bias is true, which Tailor does not implement for llama4",
           "Published Llama 4 models have none.");
  }
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
