#include "adapters/peft_files.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <regex>
#include <set>
#include <tuple>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "base/units.h"
#include "data/checkpoint/safetensors.h"

namespace tailor {
namespace {

constexpr std::string_view kKeyPrefix = "base_model.model.";
constexpr std::string_view kWrapper = "language_model.";

/// One factor of the file as float32, row-major [rows, columns].
struct Factor {
  std::int64_t rows = 0, columns = 0;
  std::vector<float> values;
  float at(std::int64_t row, std::int64_t column) const {
    return values[static_cast<std::size_t>(row * columns + column)];
  }
};
struct FactorPair {
  std::optional<Factor> a, b;
};

float widen(const std::byte* p, Dtype dtype) {
  if (dtype == Dtype::f32) {
    float value = 0;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  std::uint16_t raw = 0;
  std::memcpy(&raw, p, sizeof raw);
  std::uint32_t bits = 0;
  if (dtype == Dtype::bf16) {
    bits = std::uint32_t{raw} << 16U;
  } else {  // f16: exact in float32
    const std::uint32_t sign = (raw & 0x8000U) << 16U, exponent = (raw >> 10U) & 31U;
    const std::uint32_t mantissa = raw & 0x3FFU;
    if (exponent == 0) {
      const float value = std::ldexp(static_cast<float>(mantissa), -24);
      return sign != 0 ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7F800000U : (exponent + 112) << 23U) | (mantissa << 13U);
  }
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

class PeftReader {
 public:
  PeftReader(const fs::path& folder, const ModelSpec& spec)
      : spec_(spec),
        file_path_(folder / "adapter_model.safetensors"),
        config_path_(folder / "adapter_config.json") {
    read_config();
    read_factors();
  }

  Adapter read() {
    std::vector<LoraSite> sites;
    std::vector<std::pair<std::vector<float>, std::vector<float>>> values;
    for (LoraSite& site : all_sites(spec_)) {
      std::vector<float> a, b;
      const bool found = site.is_experts() ? read_experts(site, a, b) : read_plain(site, a, b);
      if (!found) continue;
      const auto rank = static_cast<double>(site.rank);
      site.scale = site.alpha / (rslora_ ? std::sqrt(rank) : rank);
      check_finite(a, b, site);
      sites.push_back(site);
      values.emplace_back(std::move(a), std::move(b));
    }
    refuse_left_over();
    if (sites.empty()) {
      throw Error(Fault::bad_file, {"the adapter holds no factors", file_path_.string(),
                                    "An empty adapter file is the mark of a save that went wrong; "
                                    "save it again."});
    }
    LoraOptions options;
    options.rank = rank_;
    options.alpha = alpha_;
    options.rslora = rslora_;
    std::map<std::pair<int, Projection>, std::size_t> order;
    for (std::size_t i = 0; i < sites.size(); ++i) order[{sites[i].layer, sites[i].projection}] = i;
    Adapter adapter = Adapter::from_sites(std::move(sites), options);
    for (const LoraSite& site : adapter.sites()) {
      const auto& [a, b] = values[order.at({site.layer, site.projection})];
      std::copy(a.begin(), a.end(), adapter.a_of(site).begin());
      std::copy(b.begin(), b.end(), adapter.b_of(site).begin());
    }
    return adapter;
  }

 private:
  [[noreturn]] void refuse(const std::string& what, const std::string& where,
                           const std::string& mend) const {
    throw Error(Fault::bad_file, {what, where, mend});
  }

  void read_config() {
    std::error_code error;
    if (!fs::exists(config_path_, error)) {
      refuse("adapter_config.json is missing", config_path_.parent_path().string(),
             "Name an adapter folder: adapter_config.json beside adapter_model.safetensors.");
    }
    config_ = read_json(config_path_);
    const JsonReader config(config_, config_path_.string());
    const std::string type = config.text("peft_type", "LORA");
    if (type != "LORA") {
      refuse("peft_type is '" + type + "'", config_path_.string(), "Only LORA adapters are read.");
    }
    for (const char* option : {"use_dora", "lora_bias", "use_qalora", "use_bdlora"}) {
      if (config.has(option) && config.at(option) == true) {
        refuse(std::string(option) + " is true, which Tailor does not implement",
               config_path_.string(), "Only plain LoRA factors are read.");
      }
    }
    if (config.text("bias", "none") != "none") {
      refuse("bias is '" + config.text("bias") + "', which Tailor does not implement",
             config_path_.string(), "Only adapters with bias 'none' are read.");
    }
    for (const char* option : {"modules_to_save", "trainable_token_indices", "layer_replication"}) {
      if (config.has(option) && !config.at(option).empty()) {
        refuse(std::string(option) + " is set, which Tailor does not implement",
               config_path_.string(), "Only plain LoRA factors are read.");
      }
    }
    rank_ = config.integer("r");
    alpha_ = config.number("lora_alpha");
    rslora_ = config.boolean("use_rslora", false);
    version_ = config.text("peft_version", "");
    if (config.has("alpha_pattern")) {
      for (const auto& [key, value] : config.at("alpha_pattern").items()) {
        if (!value.is_number() || key.size() > 200) {
          refuse("alpha_pattern['" + key.substr(0, 80) + "'] is not a number",
                 config_path_.string(), "Repair adapter_config.json.");
        }
        alpha_pattern_.emplace_back(key, value.get<double>());
      }
    }
  }

  /// PEFT's get_pattern_key: the first pattern that matches the end of the module's name, or of its
  /// weight's where PEFT was told of the parameter.
  double alpha_of(const std::string& module) const {
    for (const auto& [pattern, alpha] : alpha_pattern_) {
      try {
        const std::regex expression("(.*\\.)?(" + pattern + ")");
        if (std::regex_match(module, expression)) return alpha;
        if (std::regex_match(module + ".weight", expression)) return alpha;
      } catch (const std::regex_error&) {
        refuse("alpha_pattern '" + pattern + "' is not a regular expression", config_path_.string(),
               "Repair adapter_config.json.");
      }
    }
    return alpha_;
  }

  void read_factors() {
    std::error_code error;
    if (!fs::exists(file_path_, error)) {
      refuse("adapter_model.safetensors is missing", file_path_.parent_path().string(),
             "Tailor reads safetensors only. An adapter_model.bin is a pickle file, which can run "
             "code: convert it with PEFT's save_pretrained(safe_serialization=True).");
    }
    const MappedFile file(file_path_);
    for (const auto& [key, info] : parse_safetensors_header(file.bytes(), file_path_).tensors) {
      std::string name = key;
      if (name.starts_with(kKeyPrefix)) name.erase(0, kKeyPrefix.size());
      if (name.starts_with(kWrapper)) name.erase(0, kWrapper.size());
      const bool is_a = name.ends_with(".lora_A.weight"), is_b = name.ends_with(".lora_B.weight");
      if (!is_a && !is_b) {
        refuse("tensor '" + key + "' is no LoRA factor", file_path_.string(),
               "Only '....lora_A.weight' and '....lora_B.weight' are read.");
      }
      if (info.shape.size() != 2 ||
          (info.dtype != Dtype::f32 && info.dtype != Dtype::bf16 && info.dtype != Dtype::f16)) {
        refuse("factor has shape " + info.shape_text() + " and type " +
                   std::string(dtype_name(info.dtype)),
               file_path_.string() + ", tensor " + key, "Factors are 2-D, in F32, BF16 or F16.");
      }
      if (info.elements() == 0) {
        refuse("factor has shape " + info.shape_text() + ", which holds nothing",
               file_path_.string() + ", tensor " + key, "Ranks start at 1.");
      }
      Factor factor{info.shape[0], info.shape[1], {}};
      const std::int64_t width = dtype_bytes(info.dtype);
      for (std::int64_t i = 0; i < info.elements(); ++i) {
        factor.values.push_back(widen(file.bytes().data() + info.offset + i * width, info.dtype));
      }
      const std::string module =
          name.substr(0, name.size() - std::string_view(".lora_A.weight").size());
      (is_a ? pairs_[module].a : pairs_[module].b) = std::move(factor);
    }
    for (const auto& [module, pair] : pairs_) {
      if (pair.a && pair.b) continue;
      refuse(std::string("factor lora_") + (pair.a ? "B" : "A") + " of '" + module + "' is missing",
             file_path_.string(), "The file is incomplete; save the adapter again.");
    }
  }

  const FactorPair* find(const std::string& module) {
    const auto found = pairs_.find(module);
    if (found == pairs_.end()) return nullptr;
    used_.insert(module);
    return &found->second;
  }

  void need_shape(const Factor& factor, std::int64_t rows, std::int64_t columns,
                  const std::string& name) const {
    if (factor.rows == rows && factor.columns == columns) return;
    refuse("factor has shape [" + std::to_string(factor.rows) + ", " +
               std::to_string(factor.columns) + "], the model asks for [" + std::to_string(rows) +
               ", " + std::to_string(columns) + "]",
           file_path_.string() + ", " + name, "This adapter belongs to another base model.");
  }

  bool read_plain(LoraSite& site, std::vector<float>& a, std::vector<float>& b) {
    const FactorPair* pair = find(site.module);
    if (pair == nullptr) return false;
    site.rank = pair->a->rows;
    site.alpha = alpha_of(site.module);
    need_shape(*pair->a, site.rank, site.in, site.module + ".lora_A");
    need_shape(*pair->b, site.out, site.rank, site.module + ".lora_B");
    a = pair->a->values;
    for (std::int64_t r = 0; r < site.rank; ++r) {
      for (std::int64_t o = 0; o < site.out; ++o) b.push_back(pair->b->at(o, r));
    }
    return true;
  }

  /// Name of the fused pair of gate_up or down, or nothing. PEFT wraps the parameters of a module
  /// one in another: the first is "base_layer", unless it is the only one. Gate_up alone therefore
  /// has the name that down has beside it, and its shapes tell it: 2 F is never F.
  std::string fused_key(const std::string& module, bool gate_up) const {
    const std::string inner = module + ".base_layer";
    if (pairs_.contains(inner)) {
      if (gate_up) return inner;
      return pairs_.contains(module) ? module : std::string();
    }
    const auto alone = pairs_.find(module);
    if (alone == pairs_.end()) return {};
    const std::int64_t a_side = alone->second.a->columns, b_side = alone->second.b->rows;
    const std::int64_t D = spec_.hidden, wide = 2 * spec_.expert_width;
    const bool is_gate_up = (a_side == D && b_side == wide) || (a_side == wide && b_side == D);
    return is_gate_up == gate_up ? module : std::string();
  }

  bool read_experts(LoraSite& site, std::vector<float>& a, std::vector<float>& b) {
    const bool gate_up = site.projection == Projection::experts_gate_up;
    const std::string key = fused_key(site.module, gate_up);
    if (!key.empty()) {
      read_fused(*find(key), key, site, a, b);
      return true;
    }
    if (!pairs_.contains(site.module + ".0." + (gate_up ? "gate_proj" : "down_proj"))) return false;
    if (gate_up) {
      read_two_d_gate_up(site, a, b);
    } else {
      read_two_d_down(site, a, b);
    }
    return true;
  }

  void read_fused(const FactorPair& pair, const std::string& key, LoraSite& site,
                  std::vector<float>& a, std::vector<float>& b) {
    const std::int64_t E = site.experts;
    const auto columns = [&](bool gate_up) {
      const auto found = pairs_.find(fused_key(site.module, gate_up));
      return found == pairs_.end() ? std::int64_t{0} : found->second.a->columns;
    };
    const ExpertLayout layout = detect_expert_layout(spec_, columns(true), columns(false), version_,
                                                     file_path_.string() + ", " + key);
    if (pair.a->rows % E != 0 || pair.a->rows == 0) {
      refuse("factor A has " + std::to_string(pair.a->rows) + " rows, which " + std::to_string(E) +
                 " experts do not divide",
             file_path_.string() + ", " + key, "This adapter belongs to another base model.");
    }
    site.rank = pair.a->rows / E;
    site.alpha =
        alpha_of(site.module +
                 (site.projection == Projection::experts_gate_up ? ".gate_up_proj" : ".down_proj"));
    const bool swapped = layout == ExpertLayout::swapped;
    const std::int64_t wide_a = swapped ? site.out : site.in, wide_b = swapped ? site.in : site.out;
    need_shape(*pair.a, E * site.rank, wide_a, key + ".lora_A");
    need_shape(*pair.b, wide_b, site.rank * E, key + ".lora_B");
    std::vector<float> unfolded;  // of B: [E, r, wide_b]
    for (std::int64_t e = 0; e < E; ++e) {
      for (std::int64_t r = 0; r < site.rank; ++r) {
        for (std::int64_t i = 0; i < wide_b; ++i) unfolded.push_back(pair.b->at(i, r * E + e));
      }
    }
    a = swapped ? unfolded : pair.a->values;
    b = swapped ? pair.a->values : unfolded;
  }

  const FactorPair& expert_pair(const LoraSite& site, std::int64_t e, const char* projection,
                                std::int64_t in, std::int64_t out) {
    const std::string name = site.module + "." + std::to_string(e) + "." + projection;
    const FactorPair* pair = find(name);
    if (pair == nullptr) {
      refuse("factors of '" + name + "' are missing", file_path_.string(),
             "Every expert of a layer needs factors; those that were not trained are zero.");
    }
    need_shape(*pair->a, pair->a->rows, in, name + ".lora_A");
    need_shape(*pair->b, out, pair->a->rows, name + ".lora_B");
    const bool down = site.projection == Projection::experts_down;
    const std::string first = site.module + (down ? ".0.down_proj" : ".0.gate_proj");
    if (alpha_of(name) != alpha_of(first)) {
      refuse("alpha_pattern gives '" + name + "' another alpha than '" + first + "'",
             config_path_.string(), "Scale the B of each expert so that one alpha fits all.");
    }
    return *pair;
  }

  void read_two_d_down(LoraSite& site, std::vector<float>& a, std::vector<float>& b) {
    for (std::int64_t e = 0; e < site.experts; ++e) {
      const FactorPair& pair = expert_pair(site, e, "down_proj", site.in, site.out);
      if (e == 0) site.rank = pair.a->rows;
      need_shape(*pair.a, site.rank, site.in, site.module + " expert " + std::to_string(e));
      a.insert(a.end(), pair.a->values.begin(), pair.a->values.end());
      for (std::int64_t r = 0; r < site.rank; ++r) {
        for (std::int64_t o = 0; o < site.out; ++o) b.push_back(pair.b->at(o, r));
      }
    }
    site.alpha = alpha_of(site.module + ".0.down_proj");
  }

  /// Gate and up with one A become one site of that rank; with two, one of the summed rank whose B
  /// is block-diagonal. The scale stays what it was for each.
  void read_two_d_gate_up(LoraSite& site, std::vector<float>& a, std::vector<float>& b) {
    const std::int64_t F = site.out / 2;
    bool shared = true;
    std::int64_t rank = 0;
    for (std::int64_t e = 0; e < site.experts; ++e) {
      const FactorPair& gate = expert_pair(site, e, "gate_proj", site.in, F);
      const FactorPair& up = expert_pair(site, e, "up_proj", site.in, F);
      if (e == 0) rank = gate.a->rows;
      if (gate.a->rows != rank || up.a->rows != rank) {
        refuse("gate and up factors of the experts differ in rank",
               file_path_.string() + ", " + site.module, "Pad them with zeros to one rank.");
      }
      shared = shared && gate.a->values == up.a->values;
    }
    site.rank = shared ? rank : 2 * rank;
    site.alpha = alpha_of(site.module + ".0.gate_proj") * (shared    ? 1
                                                           : rslora_ ? std::sqrt(2.0)
                                                                     : 2.0);
    for (std::int64_t e = 0; e < site.experts; ++e) {
      const FactorPair& gate = expert_pair(site, e, "gate_proj", site.in, F);
      const FactorPair& up = expert_pair(site, e, "up_proj", site.in, F);
      a.insert(a.end(), gate.a->values.begin(), gate.a->values.end());
      if (!shared) a.insert(a.end(), up.a->values.begin(), up.a->values.end());
      for (std::int64_t r = 0; r < site.rank; ++r) {
        for (std::int64_t o = 0; o < 2 * F; ++o) {
          const bool is_up = o >= F;
          const bool own = shared || is_up == (r >= rank);
          const FactorPair& pair = is_up ? up : gate;
          b.push_back(own ? pair.b->at(is_up ? o - F : o, r % rank) : 0.0F);
        }
      }
    }
  }

  void check_finite(const std::vector<float>& a, const std::vector<float>& b,
                    const LoraSite& site) const {
    const auto finite = [](float value) { return std::isfinite(value); };
    if (std::all_of(a.begin(), a.end(), finite) && std::all_of(b.begin(), b.end(), finite)) return;
    refuse("factors hold NaN or infinite values", file_path_.string() + ", " + site.module,
           "The run that wrote this adapter diverged; take an earlier checkpoint.");
  }

  void refuse_left_over() const {
    for (const auto& [module, pair] : pairs_) {
      if (used_.contains(module)) continue;
      refuse(
          "factors of '" + module + "' belong to no matrix of this model", file_path_.string(),
          "This adapter belongs to another base model, or adapts something Tailor does not train.");
    }
  }

  const ModelSpec& spec_;
  fs::path file_path_, config_path_;
  Json config_;
  std::int64_t rank_ = 8;
  double alpha_ = 16;
  bool rslora_ = false;
  std::string version_;
  std::vector<std::pair<std::string, double>> alpha_pattern_;
  std::map<std::string, FactorPair> pairs_;
  std::set<std::string> used_;
};

/// "0.19.1" -> (0, 19, 1); missing or odd parts are -1.
std::tuple<int, int, int> version_parts(const std::string& version) {
  std::array<int, 3> parts = {-1, -1, -1};
  std::sscanf(version.c_str(), "%d.%d.%d", &parts[0], &parts[1], &parts[2]);
  return {parts[0], parts[1], parts[2]};
}

std::vector<std::byte> bytes_of(std::span<const float> x) {
  const auto bytes = std::as_bytes(x);
  return {bytes.begin(), bytes.end()};
}

/// x[rows, columns] -> [columns, rows].
std::vector<std::byte> transposed(std::span<const float> x, std::int64_t rows,
                                  std::int64_t columns) {
  std::vector<float> out;
  out.reserve(x.size());
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t r = 0; r < rows; ++r)
      out.push_back(x[static_cast<std::size_t>(r * columns + c)]);
  }
  return bytes_of(out);
}

/// [E, r, n] -> [n, r * E], expert fastest.
std::vector<std::byte> folded(std::span<const float> x, std::int64_t E, std::int64_t rank,
                              std::int64_t n) {
  std::vector<float> out;
  out.reserve(x.size());
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t r = 0; r < rank; ++r) {
      for (std::int64_t e = 0; e < E; ++e)
        out.push_back(x[static_cast<std::size_t>((e * rank + r) * n + i)]);
    }
  }
  return bytes_of(out);
}

/// PEFT's from 0.19.1 on: an adapter's product follows the parameter as transformers holds it,
/// inputs first for Llama 4, outputs first for the others.
ExpertLayout written_layout(const ModelSpec& spec) {
  return spec.family == Family::llama4 ? ExpertLayout::swapped : ExpertLayout::straight;
}

/// Plain matrices that PEFT must be told of as parameters. DeepSeek's router is one. Its dense and
/// shared MLPs are linear layers, but PEFT (0.21.2) takes gate_proj, up_proj and down_proj among an
/// adapter's modules, in a list or an expression, to mean the routed experts of that architecture:
/// it doubles their rank and gives the MLPs nothing.
bool by_parameter(const LoraSite& site, const ModelSpec& spec) {
  return spec.family == Family::deepseek_v3 && !site.is_experts() &&
         site.module.find(".mlp.") != std::string::npos;
}

std::string parameter_name(const LoraSite& site) {
  if (!site.is_experts()) return site.module + ".weight";
  return site.module +
         (site.projection == Projection::experts_gate_up ? ".gate_up_proj" : ".down_proj");
}

/// "model.layers.3.mlp.gate" -> "mlp.gate"
std::string below_layer(const std::string& module) {
  return module.substr(module.find('.', std::string_view("model.layers.").size()) + 1);
}

/// Factors of `each` elements an expert with a zero factor for every expert that has none: servers
/// want all experts of a layer, at one rank. A is zero as well, so that who trains the file on
/// leaves those experts as they are: with both factors zero neither gets a gradient.
std::vector<float> with_zero_experts(const LoraSite& site, std::span<const float> x,
                                     std::int64_t each) {
  std::vector<float> out(static_cast<std::size_t>(site.experts * each), 0.0F);
  for (std::int64_t e = 0; e < site.experts; ++e) {
    const std::int64_t slot = site.slot(e);
    if (slot < 0) continue;
    std::copy_n(x.begin() + slot * each, each, out.begin() + e * each);
  }
  return out;
}

/// The file's tensors by name, each made when it is written: factors may be larger than memory.
std::vector<TensorToWrite> peft_tensors(const Adapter& adapter, const ModelSpec& spec,
                                        const std::string& prefix) {
  std::vector<TensorToWrite> out;
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape,
                       std::function<std::vector<std::byte>()> make) {
    out.push_back({name, Dtype::f32, std::move(shape), {}, std::move(make)});
  };
  for (const LoraSite& site : adapter.sites()) {
    const std::span<const float> a = adapter.a_of(site), b = adapter.b_of(site);
    const std::int64_t E = site.experts, rank = site.rank, in = site.in, width = site.out;
    std::string key = std::string(kKeyPrefix) + prefix + site.module;
    if (!site.is_experts()) {
      add(key + ".lora_A.weight", {rank, in}, [a] { return bytes_of(a); });
      add(key + ".lora_B.weight", {width, rank}, [=] { return transposed(b, rank, width); });
      continue;
    }
    if (site.projection == Projection::experts_gate_up &&
        adapter.find(site.layer, Projection::experts_down) != nullptr) {
      key += ".base_layer";  // see fused_key
    }
    const bool straight = written_layout(spec) == ExpertLayout::straight;
    const std::span<const float> rows = straight ? a : b, columns = straight ? b : a;
    const std::int64_t across = straight ? in : width, down = straight ? width : in;
    if (site.slot_of.empty()) {
      add(key + ".lora_A.weight", {E * rank, across}, [rows] { return bytes_of(rows); });
      add(key + ".lora_B.weight", {down, rank * E}, [=] { return folded(columns, E, rank, down); });
      continue;
    }
    const LoraSite* chosen = &site;
    add(key + ".lora_A.weight", {E * rank, across},
        [=] { return bytes_of(with_zero_experts(*chosen, rows, rank * across)); });
    add(key + ".lora_B.weight", {down, rank * E},
        [=] { return folded(with_zero_experts(*chosen, columns, rank * down), E, rank, down); });
  }
  std::sort(out.begin(), out.end(), [](const auto& x, const auto& y) { return x.name < y.name; });
  return out;
}

/// Throws unless the file holds what was to be written, tensor by tensor.
void compare_written(const fs::path& path, const std::vector<TensorToWrite>& tensors) {
  const MappedFile file(path);
  const SafetensorsHeader header = parse_safetensors_header(file.bytes(), path);
  for (const TensorToWrite& tensor : tensors) {
    const auto found = header.tensors.find(tensor.name);
    const std::vector<std::byte> wanted = tensor.make();
    const bool same =
        found != header.tensors.end() && found->second.shape == tensor.shape &&
        found->second.bytes == static_cast<std::int64_t>(wanted.size()) &&
        std::memcmp(file.bytes().data() + found->second.offset, wanted.data(), wanted.size()) == 0;
    if (!same) {
      throw Error(Fault::io,
                  {"the adapter reads back different from what was written",
                   path.string() + ", tensor " + tensor.name,
                   "The disk may be failing. Write it again, to another disk if you can."});
    }
    file.drop(static_cast<std::size_t>(found->second.offset), wanted.size());
  }
}

/// target_modules for PEFT: the short names when they match exactly the matrices that are adapted,
/// else every module in full, so that PEFT never wraps one more or one less.
std::vector<std::string> target_modules(const Adapter& adapter, const ModelSpec& spec) {
  std::set<std::string> short_names, full_names;
  for (const LoraSite& site : adapter.sites()) {
    if (site.is_experts() || by_parameter(site, spec)) continue;
    full_names.insert(site.module);
    short_names.insert(site.module.substr(site.module.rfind('.') + 1));
  }
  bool exact = true;
  for (const LoraSite& site : all_sites(spec)) {
    if (site.is_experts() || by_parameter(site, spec)) continue;
    const bool matched = short_names.contains(site.module.substr(site.module.rfind('.') + 1));
    exact = exact && matched == full_names.contains(site.module);
  }
  const std::set<std::string>& names = exact ? short_names : full_names;
  return {names.begin(), names.end()};
}

/// target_parameters for PEFT: a name below the layer where all layers that have such a parameter
/// adapt it, else names in full.
std::vector<std::string> target_parameters(const Adapter& adapter, const ModelSpec& spec) {
  std::map<std::string, std::size_t> in_model;
  for (const LoraSite& site : all_sites(spec)) ++in_model[below_layer(parameter_name(site))];
  std::map<std::string, std::vector<std::string>> adapted;
  for (const LoraSite& site : adapter.sites()) {
    if (!site.is_experts() && !by_parameter(site, spec)) continue;
    adapted[below_layer(parameter_name(site))].push_back(parameter_name(site));
  }
  std::vector<std::string> out;
  for (const auto& [name, full_names] : adapted) {
    if (full_names.size() == in_model.at(name)) {
      out.push_back(name);
    } else {
      out.insert(out.end(), full_names.begin(), full_names.end());
    }
  }
  return out;
}

Json peft_config(const Adapter& adapter, const ModelSpec& spec, const PeftWriteOptions& options) {
  // The most common rank and alpha are the config's own; the rest are patterns.
  std::map<std::pair<std::int64_t, double>, int> counts;
  bool parameters = false;
  for (const LoraSite& site : adapter.sites()) {
    ++counts[{site.rank, site.alpha}];
    parameters = parameters || site.is_experts() || by_parameter(site, spec);
  }
  const auto common =
      std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) {
        return a.second < b.second;
      })->first;
  Json rank_pattern = Json::object(), alpha_pattern = Json::object();
  for (const LoraSite& site : adapter.sites()) {
    const bool parameter = site.is_experts() || by_parameter(site, spec);
    const std::string name = parameter ? parameter_name(site) : site.module;
    if (site.rank != common.first) rank_pattern[name] = site.rank;
    if (site.alpha != common.second) alpha_pattern[name] = site.alpha;
  }
  Json config = {{"peft_type", "LORA"},
                 {"task_type", "CAUSAL_LM"},
                 {"base_model_name_or_path", options.base_model},
                 {"revision", nullptr},
                 {"peft_version", kPeftVersion},
                 {"r", common.first},
                 {"lora_alpha", common.second},
                 {"lora_dropout", adapter.options().dropout},
                 {"bias", "none"},
                 {"fan_in_fan_out", false},
                 {"inference_mode", true},
                 {"init_lora_weights", true},
                 {"modules_to_save", nullptr},
                 {"use_dora", false},
                 {"use_rslora", adapter.options().rslora},
                 {"target_modules", target_modules(adapter, spec)},
                 {"target_parameters", nullptr},
                 {"rank_pattern", rank_pattern},
                 {"alpha_pattern", alpha_pattern}};
  if (common.second == std::floor(common.second)) {
    config["lora_alpha"] = static_cast<std::int64_t>(common.second);
  }
  if (parameters) {
    config["target_parameters"] = target_parameters(adapter, spec);
  }
  return config;
}

}  // namespace

ExpertLayout detect_expert_layout(const ModelSpec& spec, std::int64_t gate_up_a_columns,
                                  std::int64_t down_a_columns, const std::string& peft_version,
                                  const std::string& where) {
  const std::int64_t D = spec.hidden, F = spec.expert_width;
  // Columns of A: its input when straight, its output when swapped.
  const auto decide = [](std::int64_t columns, std::int64_t in,
                         std::int64_t out) -> std::optional<ExpertLayout> {
    if (columns == 0 || in == out) return std::nullopt;
    if (columns == in) return ExpertLayout::straight;
    if (columns == out) return ExpertLayout::swapped;
    return std::nullopt;
  };
  if (const auto layout = decide(gate_up_a_columns, D, 2 * F)) return *layout;
  if (const auto layout = decide(down_a_columns, F, D)) return *layout;
  const auto version = version_parts(peft_version);
  if (spec.family != Family::llama4) return ExpertLayout::straight;
  if (std::get<1>(version) >= 0) {
    return version >= std::tuple(0, 19, 1) ? ExpertLayout::swapped : ExpertLayout::straight;
  }
  throw Error(Fault::bad_file,
              {"which side of the experts' factors is the input cannot be told", where,
               "PEFT changed this between versions. Add the version that wrote the file to "
               "adapter_config.json as \"peft_version\"."});
}

Adapter read_peft_adapter(const fs::path& folder, const ModelSpec& spec) {
  return PeftReader(folder, spec).read();
}

void write_peft_adapter(const fs::path& folder, const Adapter& adapter, const ModelSpec& spec,
                        const PeftWriteOptions& options) {
  make_folders(folder);
  const std::vector<TensorToWrite> tensors = peft_tensors(adapter, spec, options.module_prefix);
  const fs::path path = folder / "adapter_model.safetensors";
  write_safetensors(path, tensors, {{"format", "pt"}});
  write_atomically(folder / "adapter_config.json",
                   peft_config(adapter, spec, options).dump(2) + "\n");
  compare_written(path, tensors);
}

}  // namespace tailor
