#include "adapters/peft_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

/// Options that leave y = x W^T + scale (x A^T) B^T as it is, whatever they say. Those of the
/// initial factors only matter before training, and runtime options not to the result.
constexpr std::array<std::string_view, 26> kHarmless = {"peft_type",
                                                        "task_type",
                                                        "auto_mapping",
                                                        "base_model_name_or_path",
                                                        "revision",
                                                        "inference_mode",
                                                        "r",
                                                        "lora_alpha",
                                                        "lora_dropout",
                                                        "target_modules",
                                                        "target_parameters",
                                                        "exclude_modules",
                                                        "fan_in_fan_out",
                                                        "bias",
                                                        "use_rslora",
                                                        "init_lora_weights",
                                                        "layers_to_transform",
                                                        "layers_pattern",
                                                        "rank_pattern",
                                                        "alpha_pattern",
                                                        "megatron_core",
                                                        "qalora_group_size",
                                                        "eva_config",
                                                        "runtime_config",
                                                        "ensure_weight_tying",
                                                        "peft_version"};

/// Options that are known to change the function; any other one that is set is not known.
constexpr std::array<std::string_view, 18> kImpossible = {
    "use_dora",          "lora_bias",     "use_qalora",        "use_bdlora",
    "modules_to_save",   "loftq_config",  "megatron_config",   "trainable_token_indices",
    "layer_replication", "corda_config",  "lora_ga_config",    "alora_invocation_tokens",
    "arrow_config",      "velora_config", "monteclora_config", "kasa_config",
    "use_kasa",          "use_velora"};

/// Starts that subtract the first product from the base: factors from there fit the changed base.
constexpr std::array<std::string_view, 5> kBaseChanging = {"pissa", "olora", "corda", "loftq",
                                                           "lora_ga"};

bool is_set(const Json& value) {
  return !(value.is_null() || value == false || value == 0 || value == "" ||
           ((value.is_array() || value.is_object()) && value.empty()));
}

[[noreturn]] void refuse(const fs::path& path, const std::string& what, const std::string& mend) {
  throw Error(Fault::bad_file, {what, path.string(), mend});
}

void check_options(const Json& config, const fs::path& path) {
  const auto has = [](const auto& list, const std::string& key) {
    return std::find(list.begin(), list.end(), key) != list.end();
  };
  for (const auto& [key, value] : config.items()) {
    if (has(kHarmless, key) || !is_set(value)) continue;
    if (key == kVllmRowsKey) {
      refuse(path,
             "rows of q_proj and k_proj are in vLLM's order: this was exported for vLLM alone",
             "Name the adapter that it was exported from.");
    }
    const std::string state = value == true ? "true" : "set";
    if (has(kImpossible, key)) {
      refuse(path, key + " is " + state + ", which Tailor does not implement",
             "Only plain LoRA factors are read.");
    }
    refuse(path, "option '" + key.substr(0, 80) + "' is " + state + ", which Tailor does not know",
           "If it changes nothing of the adapter's function, take it out of the file.");
  }
}

std::vector<std::string> names(const Json& config, const char* key, const fs::path& path) {
  std::vector<std::string> out;
  const auto found = config.find(key);
  if (found == config.end() || found->is_null()) return out;
  if (found->is_string()) return {found->get<std::string>()};
  if (found->is_array() &&
      std::all_of(found->begin(), found->end(), [](const Json& name) { return name.is_string(); }))
    return found->get<std::vector<std::string>>();
  refuse(path, std::string(key) + " is no list of names", "Repair adapter_config.json.");
}

PeftPatterns patterns(const Json& config, const char* key, const fs::path& path) {
  PeftPatterns out;
  const auto found = config.find(key);
  if (found == config.end() || found->is_null()) return out;
  if (!found->is_object()) {
    refuse(path, std::string(key) + " is no object", "Repair adapter_config.json.");
  }
  for (const auto& [name, value] : found->items()) {
    if (!value.is_number() || name.size() > 200) {
      refuse(path, std::string(key) + "['" + name.substr(0, 80) + "'] is not a number",
             "Repair adapter_config.json.");
    }
    out.add(key, name, value.get<double>(), path);
  }
  return out;
}

}  // namespace

void PeftPatterns::add(const std::string& key, const std::string& pattern, double value,
                       const fs::path& path) {
  Entry entry{pattern, value, std::nullopt};
  if (pattern.find_first_of("\\*+?[](){}|^$") != std::string::npos) {
    try {
      entry.expression.emplace("(.*\\.)?(" + pattern + ")");
    } catch (const std::regex_error&) {
      refuse(path, key + " '" + pattern + "' is not a regular expression",
             "Repair adapter_config.json.");
    }
  }
  entries_.push_back(std::move(entry));
}

bool PeftPatterns::matches(const Entry& entry, const std::string& name) {
  if (entry.expression) return std::regex_match(name, *entry.expression);
  const std::string& pattern = entry.pattern;
  if (pattern.size() > name.size()) return false;
  const std::size_t before = name.size() - pattern.size();
  if (before > 0 && name[before - 1] != '.') return false;
  for (std::size_t i = 0; i < pattern.size(); ++i) {  // in an expression a dot is any character
    if (pattern[i] != '.' && pattern[i] != name[before + i]) return false;
  }
  return true;
}

std::optional<double> PeftPatterns::find(const std::string& module) const {
  for (const Entry& entry : entries_) {
    if (matches(entry, module) || matches(entry, module + ".weight")) return entry.value;
  }
  return std::nullopt;
}

std::int64_t PeftConfig::rank_of(const std::string& module) const {
  const std::optional<double> own = rank_pattern.find(module);
  return own ? std::llround(*own) : rank;
}
double PeftConfig::alpha_of(const std::string& module) const {
  return alpha_pattern.find(module).value_or(alpha);
}
double PeftConfig::scale(double of_alpha, std::int64_t of_rank) const {
  const auto wide = static_cast<double>(of_rank);
  return of_alpha / (rslora ? std::sqrt(wide) : wide);
}

PeftConfig read_peft_config(const fs::path& folder) {
  const fs::path path = folder / "adapter_config.json";
  std::error_code error;
  if (!fs::exists(path, error)) {
    throw Error(Fault::bad_file,
                {"adapter_config.json is missing", folder.string(),
                 "Name an adapter folder: adapter_config.json beside adapter_model.safetensors."});
  }
  const Json json = read_json(path);
  const JsonReader config(json, path.string());
  const std::string type = config.text("peft_type", "LORA");
  if (type != "LORA") refuse(path, "peft_type is '" + type + "'", "Only LORA adapters are read.");
  if (config.text("bias", "none") != "none") {
    refuse(path, "bias is '" + config.text("bias") + "', which Tailor does not implement",
           "Only adapters with bias 'none' are read.");
  }
  check_options(json, path);
  if (config.has("init_lora_weights") && config.at("init_lora_weights").is_string()) {
    const std::string start = config.text("init_lora_weights");
    for (const std::string_view changing : kBaseChanging) {
      if (!lower(start).starts_with(changing)) continue;
      refuse(path, "init_lora_weights is '" + start + "': the factors belong to a changed base",
             "Save the adapter with PEFT's save_pretrained(path_initial_model_for_weight_"
             "conversion=...), which makes it a plain one.");
    }
  }
  PeftConfig out;
  out.path = path;
  out.json = json;
  out.rank = config.integer("r");
  out.alpha = config.number("lora_alpha");
  out.rslora = config.boolean("use_rslora", false);
  out.version = config.text("peft_version", "");
  out.base_model = config.text("base_model_name_or_path", "");
  out.target_modules = names(json, "target_modules", path);
  out.target_parameters = names(json, "target_parameters", path);
  out.rank_pattern = patterns(json, "rank_pattern", path);
  out.alpha_pattern = patterns(json, "alpha_pattern", path);
  return out;
}

}  // namespace tailor
