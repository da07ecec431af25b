#include "data/gguf/metadata.h"

#include <array>
#include <charconv>
#include <cmath>

#include "base/error.h"
#include "base/text.h"
#include "data/gguf/tensors.h"

namespace tailor {

bool GgufValues::has(std::string_view key) const {
  return header_.values.find(key) != header_.values.end();
}

void GgufValues::refuse(const std::string& key, const std::string& what,
                        const std::string& mend) const {
  throw Error(Fault::bad_file, {what, where_ + ", key " + key, mend});
}

template <class T>
const T& GgufValues::get(const std::string& key, const char* needed) const {
  const auto found = header_.values.find(key);
  const std::string mend = "Use a GGUF file that llama.cpp's own conversion has made.";
  if (found == header_.values.end()) refuse(key, "the key is missing", mend);
  const T* value = std::get_if<T>(&found->second.value);
  if (value == nullptr) refuse(key, std::string("the value is not ") + needed, mend);
  return *value;
}

std::int64_t GgufValues::integer(const std::string& key) const {
  return get<std::int64_t>(key, "a whole number");
}
std::int64_t GgufValues::integer(const std::string& key, std::int64_t fallback) const {
  return has(key) ? integer(key) : fallback;
}
double GgufValues::number(const std::string& key) const {
  const double value = get<double>(key, "a number");
  if (!std::isfinite(value))
    refuse(key, "the value is infinite or not a number", "Check the file.");
  // Kept as float32: 1e-5 would come back as 9.99999974e-06, so the shortest text is read again.
  const auto narrow_value = static_cast<float>(value);
  if (static_cast<double>(narrow_value) != value) return value;
  std::array<char, 64> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), narrow_value).ptr;
  double out = 0;
  std::from_chars(text.data(), end, out);
  return out;
}
double GgufValues::number(const std::string& key, double fallback) const {
  return has(key) ? number(key) : fallback;
}
bool GgufValues::boolean(const std::string& key, bool fallback) const {
  return has(key) ? get<bool>(key, "true or false") : fallback;
}
std::string GgufValues::text(const std::string& key) const {
  const auto& value = get<std::string>(key, "a text");
  if (!is_utf8(value)) refuse(key, "the text is not UTF-8", "Fetch the file again.");
  return value;
}
std::string GgufValues::text(const std::string& key, const std::string& fallback) const {
  return has(key) ? text(key) : fallback;
}
const std::vector<std::string>& GgufValues::texts(const std::string& key) const {
  return get<std::vector<std::string>>(key, "a list of texts");
}
const std::vector<std::int64_t>& GgufValues::integers(const std::string& key) const {
  return get<std::vector<std::int64_t>>(key, "a list of whole numbers");
}

namespace {

/// Builds config.json key by key from the values under the architecture's name.
class ConfigReader {
 public:
  ConfigReader(const GgufValues& values, std::vector<float> frequency_factors)
      : values_(values),
        frequency_factors_(std::move(frequency_factors)),
        architecture_(values.text("general.architecture")) {}

  Json read() {
    if (architecture_ == "llama") {
      start("LlamaForCausalLM", "llama");
      refuse_experts();
      grouped_heads();
      set("intermediate_size", "feed_forward_length");
    } else if (architecture_ == "qwen2") {
      start("Qwen2ForCausalLM", "qwen2");
      refuse_experts();
      grouped_heads();
      set("intermediate_size", "feed_forward_length");
      config_["use_sliding_window"] = false;
    } else if (architecture_ == "llama4") {
      start("Llama4ForCausalLM", "llama4_text");
      grouped_heads();
      llama4();
    } else if (architecture_ == "deepseek2") {
      start("DeepseekV3ForCausalLM", "deepseek_v3");
      deepseek();
    } else {
      values_.refuse(
          "general.architecture",
          "architecture '" + architecture_.substr(0, 60) + "' is not supported",
          "Supported in GGUF: llama, qwen2, llama4, and deepseek2 (DeepSeek V3 and R1).");
    }
    rope();
    special_ids();
    return config_;
  }

 private:
  std::string key(const std::string& name) const { return architecture_ + "." + name; }
  std::int64_t integer(const std::string& name) const { return values_.integer(key(name)); }
  /// A number of heads, layers, experts, or a width: so small that no product of a matrix's
  /// overflows.
  std::int64_t size(const std::string& name) const {
    constexpr std::int64_t kMost = 1 << 20;
    const std::int64_t value = integer(name);
    if (value < 0 || value > kMost) {
      values_.refuse(
          key(name),
          "the value is " + std::to_string(value) + ", the most is " + std::to_string(kMost),
          "The file is damaged: fetch it again.");
    }
    return value;
  }
  std::int64_t size(const std::string& name, std::int64_t fallback) const {
    return values_.has(key(name)) ? size(name) : fallback;
  }
  void set(const char* to, const std::string& from) { config_[to] = size(from); }

  void start(const char* class_name, const char* type) {
    config_ = {{"architectures", {class_name}}, {"model_type", type}};
    set("hidden_size", "embedding_length");
    set("num_hidden_layers", "block_count");
    set("num_attention_heads", "attention.head_count");
    config_["max_position_embeddings"] = integer("context_length");
    config_["rms_norm_eps"] = values_.number(key("attention.layer_norm_rms_epsilon"));
    config_["hidden_act"] = "silu";
    config_["attention_bias"] = false;
    config_["mlp_bias"] = false;
    const auto& tensors = values_.header().tensors;
    const auto embedding = tensors.find("token_embd.weight");
    if (embedding == tensors.end() || embedding->second.shape.size() != 2) {
      values_.refuse("general.architecture", "tensor token_embd.weight is missing or no matrix",
                     "Name the first file of a model; files of a vocabulary alone hold none.");
    }
    config_["vocab_size"] = embedding->second.shape[0];
    config_["tie_word_embeddings"] = tensors.find("output.weight") == tensors.end();
    config_["torch_dtype"] = "bfloat16";
    if (values_.integer("split.count", 1) > 1) {
      values_.refuse("split.count", "the model is split over several files, which is not read",
                     "Join them: llama-gguf-split --merge FIRST.gguf WHOLE.gguf.");
    }
  }
  void refuse_experts() const {
    if (values_.integer(key("expert_count"), 0) == 0) return;
    values_.refuse(key("expert_count"),
                   "a " + architecture_ + " with routed experts is not supported",
                   "Models with experts: llama4, and deepseek2.");
  }
  void grouped_heads() {
    config_["num_key_value_heads"] = size("attention.head_count_kv", size("attention.head_count"));
    const std::int64_t heads = size("attention.head_count");
    if (heads < 1)
      values_.refuse(key("attention.head_count"), "no attention heads", "Check the file.");
    const std::int64_t own = size("embedding_length") / heads;
    const std::int64_t width = size("attention.key_length", own);
    same("attention.value_length", own, width);
    same("rope.dimension_count", width, width);
    config_["head_dim"] = width;
  }
  /// A value that has to be another one.
  void same(const std::string& name, std::int64_t fallback, std::int64_t needed) const {
    const std::int64_t found = values_.integer(key(name), fallback);
    if (found == needed) return;
    values_.refuse(key(name),
                   "the value is " + std::to_string(found) + ", needed: " + std::to_string(needed),
                   "Heads of other widths for values, or rotated in part, are not implemented.");
  }

  // What the file does not say is fixed in llama.cpp's src/models/llama4.cpp.
  void llama4() {
    if (values_.integer(key("attention.sliding_window"), 8192) == 0) {
      values_.refuse(key("attention.sliding_window"),
                     "a llama4 without chunked attention is not read",
                     "Maverick, Scout and models like them are.");
    }
    set("intermediate_size_mlp", "feed_forward_length");
    set("intermediate_size", "expert_feed_forward_length");
    set("num_local_experts", "expert_count");
    set("num_experts_per_tok", "expert_used_count");
    set("interleave_moe_layer_step", "interleave_moe_layer_step");
    config_["use_qk_norm"] = integer("expert_count") != 128;
    config_["no_rope_layer_interval"] = 4;
    config_["attention_chunk_size"] = 8192;
    config_["attn_temperature_tuning"] = true;
    config_["floor_scale"] = 8192;
    config_["attn_scale"] = 0.1;
  }

  void deepseek() {
    // DeepSeek V2's files have softmax here, or nothing.
    if (values_.integer(key("expert_gating_func"), 1) != 2) {
      values_.refuse(key("expert_gating_func"), "the router's scores are no sigmoids: DeepSeek V2",
                     "Of deepseek2 only DeepSeek V3 and R1 are supported.");
    }
    const std::int64_t rope_dim = size("rope.dimension_count");
    set("intermediate_size", "feed_forward_length");
    set("moe_intermediate_size", "expert_feed_forward_length");
    set("n_routed_experts", "expert_count");
    set("num_experts_per_tok", "expert_used_count");
    set("n_shared_experts", "expert_shared_count");
    set("first_k_dense_replace", "leading_dense_block_count");
    set("kv_lora_rank", "attention.kv_lora_rank");
    const std::int64_t q_rank = size("attention.q_lora_rank", 0);
    config_["q_lora_rank"] = q_rank == 0 ? Json() : Json(q_rank);
    const bool latent = values_.has(key("attention.key_length_mla"));
    const std::int64_t key_width =
        size(latent ? "attention.key_length_mla" : "attention.key_length");
    config_["qk_nope_head_dim"] = key_width - rope_dim;
    config_["qk_rope_head_dim"] = rope_dim;
    set("v_head_dim", latent ? "attention.value_length_mla" : "attention.value_length");
    config_["num_key_value_heads"] = integer("attention.head_count");
    config_["rope_interleave"] = true;
    config_["topk_method"] = "noaux_tc";
    config_["scoring_func"] = "sigmoid";
    config_["moe_layer_freq"] = 1;
    config_["n_group"] = values_.integer(key("expert_group_count"), 1);
    config_["topk_group"] = values_.integer(key("expert_group_used_count"), 1);
    config_["norm_topk_prob"] = values_.boolean(key("expert_weights_norm"), false);
    config_["routed_scaling_factor"] = values_.number(key("expert_weights_scale"), 1.0);
    // Older files say nothing of groups; R1's are known by its experts.
    if (!values_.has(key("expert_group_count")) && integer("expert_count") == 256 &&
        integer("block_count") == 61) {
      config_["n_group"] = 8;
      config_["topk_group"] = 4;
    }
  }

  void rope() {
    const double theta = values_.number(key("rope.freq_base"), 10000.0);
    config_["rope_theta"] = theta;
    const std::string type = values_.text(key("rope.scaling.type"), "none");
    const double factor = values_.number(key("rope.scaling.factor"), 1.0);
    const double on_attention = values_.number(key("rope.scaling.attn_factor"), 1.0);
    if (type == "yarn") return yarn(factor, on_attention);
    if ((type != "none" && type != "linear") || factor != 1) {
      values_.refuse(key("rope.scaling.type"),
                     "rope scaling '" + type.substr(0, 60) + "' with a factor of " +
                         number_text(factor) + " is not implemented",
                     "Models without scaling, with yarn, and with rope_freqs.weight are read.");
    }
    frequency_factors(theta, on_attention);
  }
  void yarn(double factor, double on_attention) {
    Json scaling = {
        {"rope_type", "yarn"},
        {"type", "yarn"},
        {"factor", factor},
        {"original_max_position_embeddings",
         values_.integer(key("rope.scaling.original_context_length"), integer("context_length"))},
        {"beta_fast", values_.number(key("rope.scaling.yarn_beta_fast"), 32.0)},
        {"beta_slow", values_.number(key("rope.scaling.yarn_beta_slow"), 1.0)}};
    const double multiplier = values_.number(key("rope.scaling.yarn_log_multiplier"), 0.0);
    if (architecture_ == "deepseek2") {
      if (multiplier == 0) {
        values_.refuse(key("rope.scaling.yarn_log_multiplier"),
                       "yarn without this value scales attention as no published model does",
                       "Convert the model again with a current llama.cpp.");
      }
      // Tenths: 0.1 * mscale_all_dim went through float32.
      const double mscale = std::round(multiplier * 1e7) / 1e6;
      scaling["mscale"] = mscale;
      scaling["mscale_all_dim"] = mscale;
    } else if (on_attention != 1) {
      scaling["attention_factor"] = on_attention * (factor <= 1 ? 1 : 0.1 * std::log(factor) + 1);
    }
    config_["rope_scaling"] = scaling;
  }

  /// `rope_freqs.weight`: rope type llama3 where one of the published parameters gives these
  /// factors, else longrope, which has a factor for every pair.
  void frequency_factors(double theta, double on_attention) {
    if (frequency_factors_.empty()) {
      config_["rope_scaling"] = nullptr;
      return;
    }
    struct Published {
      double factor, low, high;
    };
    constexpr Published kPublished[] = {{8, 1, 4}, {32, 1, 4}, {16, 1, 1}, {8, 1, 1}};
    for (const Published& numbers : kPublished) {
      ModelSpec spec;
      spec.head_dim = static_cast<std::int64_t>(frequency_factors_.size()) * 2;
      spec.rope.kind = RopeSpec::Kind::llama3;
      spec.rope.theta = theta;
      spec.rope.factor = numbers.factor;
      spec.rope.low_freq_factor = numbers.low;
      spec.rope.high_freq_factor = numbers.high;
      const std::vector<float> theirs = rope_frequency_factors(spec);
      bool equal = on_attention == 1;
      for (std::size_t i = 0; equal && i < theirs.size(); ++i) {
        equal = std::fabs(theirs[i] - frequency_factors_[i]) <= 1e-5F * theirs[i];
      }
      if (!equal) continue;
      config_["rope_scaling"] = {{"rope_type", "llama3"},
                                 {"factor", numbers.factor},
                                 {"low_freq_factor", numbers.low},
                                 {"high_freq_factor", numbers.high},
                                 {"original_max_position_embeddings", 8192}};
      return;
    }
    Json factors = Json::array();
    for (const float factor : frequency_factors_) factors.push_back(factor);
    config_["rope_scaling"] = {{"rope_type", "longrope"},
                               {"short_factor", factors},
                               {"long_factor", factors},
                               {"attention_factor", on_attention},
                               {"original_max_position_embeddings", integer("context_length")}};
  }

  void special_ids() {
    for (const auto& [to, from] : {std::pair{"bos_token_id", "tokenizer.ggml.bos_token_id"},
                                   std::pair{"eos_token_id", "tokenizer.ggml.eos_token_id"},
                                   std::pair{"pad_token_id", "tokenizer.ggml.padding_token_id"}}) {
      if (values_.has(from)) config_[to] = values_.integer(from);
    }
  }

  const GgufValues& values_;
  std::vector<float> frequency_factors_;
  std::string architecture_;
  Json config_;
};

}  // namespace

Json config_from_gguf(const GgufValues& values, std::vector<float> frequency_factors) {
  return ConfigReader(values, std::move(frequency_factors)).read();
}

}  // namespace tailor
