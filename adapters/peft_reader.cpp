#include "adapters/peft_reader.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <regex>

#include "base/error.h"
#include "data/checkpoint/safetensors.h"
#include "data/store/halves.h"

namespace tailor {
namespace {

constexpr std::string_view kKeyPrefix = "base_model.model.";
constexpr std::string_view kWrapper = "language_model.";
constexpr std::int64_t kStripBytes = std::int64_t{4} << 20;  ///< of the file, touched at once

/// `count` numbers of the file as floats; F16 and BF16 are exact in them.
void widen(const std::byte* from, Dtype dtype, std::int64_t count, float* out) {
  if (dtype == Dtype::f32) {
    std::memcpy(out, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint16_t raw = 0;
    std::memcpy(&raw, from + 2 * i, sizeof raw);
    out[i] =
        dtype == Dtype::bf16 ? std::bit_cast<float>(std::uint32_t{raw} << 16U) : half_to_float(raw);
  }
}

}  // namespace

std::int64_t PeftReader::Factor::bytes() const { return rows * columns * dtype_bytes(dtype); }

PeftReader::PeftReader(const fs::path& folder, const ModelSpec& spec)
    : spec_(spec),
      file_path_(folder / "adapter_model.safetensors"),
      config_path_(folder / "adapter_config.json") {
  read_config();
  read_header();
  for (LoraSite& site : all_sites(spec_)) {
    const bool found = site.is_experts() ? find_experts(site) : find_plain(site);
    if (!found) continue;
    const auto rank = static_cast<double>(site.rank);
    site.scale = site.alpha / (rslora_ ? std::sqrt(rank) : rank);
    sites_.push_back(site);
  }
  refuse_left_over();
  if (sites_.empty()) {
    refuse("the adapter holds no factors", file_path_.string(),
           "An empty adapter file is the mark of a save that went wrong; save it again.");
  }
  options_.rank = rank_;
  options_.alpha = alpha_;
  options_.rslora = rslora_;
}

void PeftReader::refuse(const std::string& what, const std::string& where,
                        const std::string& mend) {
  throw Error(Fault::bad_file, {what, where, mend});
}

// ---------------------------------------------------------------- config and header

void PeftReader::read_config() {
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
        refuse("alpha_pattern['" + key.substr(0, 80) + "'] is not a number", config_path_.string(),
               "Repair adapter_config.json.");
      }
      alpha_pattern_.emplace_back(key, value.get<double>());
    }
  }
}

/// PEFT's get_pattern_key: the first pattern that matches the end of the module's name, or of its
/// weight's where PEFT was told of the parameter.
double PeftReader::alpha_of(const std::string& module) const {
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

void PeftReader::read_header() {
  std::error_code error;
  if (!fs::exists(file_path_, error)) {
    refuse("adapter_model.safetensors is missing", file_path_.parent_path().string(),
           "Tailor reads safetensors only. An adapter_model.bin is a pickle file, which can run "
           "code: convert it with PEFT's save_pretrained(safe_serialization=True).");
  }
  file_.emplace(file_path_);
  for (const auto& [key, info] : parse_safetensors_header(file_->bytes(), file_path_).tensors) {
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
    const std::string module =
        name.substr(0, name.size() - std::string_view(".lora_A.weight").size());
    (is_a ? pairs_[module].a : pairs_[module].b) =
        Factor{info.shape[0], info.shape[1], info.dtype, info.offset};
  }
  for (const auto& [module, pair] : pairs_) {
    if (pair.a && pair.b) continue;
    refuse(std::string("factor lora_") + (pair.a ? "B" : "A") + " of '" + module + "' is missing",
           file_path_.string(), "The file is incomplete; save the adapter again.");
  }
}

// ---------------------------------------------------------------- which factors are whose

const PeftReader::FactorPair* PeftReader::find(const std::string& module) {
  const auto found = pairs_.find(module);
  if (found == pairs_.end()) return nullptr;
  used_.insert(module);
  return &found->second;
}

void PeftReader::need_shape(const Factor& factor, std::int64_t rows, std::int64_t columns,
                            const std::string& name) const {
  if (factor.rows == rows && factor.columns == columns) return;
  refuse("factor has shape [" + std::to_string(factor.rows) + ", " +
             std::to_string(factor.columns) + "], the model asks for [" + std::to_string(rows) +
             ", " + std::to_string(columns) + "]",
         file_path_.string() + ", " + name, "This adapter belongs to another base model.");
}

bool PeftReader::find_plain(LoraSite& site) {
  const FactorPair* pair = find(site.module);
  if (pair == nullptr) return false;
  site.rank = pair->a->rows;
  site.alpha = alpha_of(site.module);
  need_shape(*pair->a, site.rank, site.in, site.module + ".lora_A");
  need_shape(*pair->b, site.out, site.rank, site.module + ".lora_B");
  forms_[{site.layer, site.projection}] = {Form::plain, site.module};
  return true;
}

/// Name of the fused pair of gate_up or down, or nothing. PEFT wraps the parameters of a module
/// one in another: the first is "base_layer", unless it is the only one. Gate_up alone therefore
/// has the name that down has beside it, and its shapes tell it: 2 F is never F.
std::string PeftReader::fused_key(const std::string& module, bool gate_up) const {
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

bool PeftReader::find_experts(LoraSite& site) {
  const bool gate_up = site.projection == Projection::experts_gate_up;
  const std::string key = fused_key(site.module, gate_up);
  if (!key.empty()) {
    find_fused(*find(key), key, site);
    return true;
  }
  if (!pairs_.contains(site.module + ".0." + (gate_up ? "gate_proj" : "down_proj"))) return false;
  if (gate_up) {
    find_each_gate_up(site);
  } else {
    find_each_down(site);
  }
  return true;
}

void PeftReader::find_fused(const FactorPair& pair, const std::string& key, LoraSite& site) {
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
  forms_[{site.layer, site.projection}] = {swapped ? Form::swapped : Form::straight, key};
}

const PeftReader::FactorPair& PeftReader::expert_pair(const LoraSite& site, std::int64_t expert,
                                                      const char* projection, std::int64_t in,
                                                      std::int64_t out) {
  const std::string name = site.module + "." + std::to_string(expert) + "." + projection;
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

void PeftReader::find_each_down(LoraSite& site) {
  for (std::int64_t e = 0; e < site.experts; ++e) {
    const FactorPair& pair = expert_pair(site, e, "down_proj", site.in, site.out);
    if (e == 0) site.rank = pair.a->rows;
    need_shape(*pair.a, site.rank, site.in, site.module + " expert " + std::to_string(e));
  }
  site.alpha = alpha_of(site.module + ".0.down_proj");
  forms_[{site.layer, site.projection}] = {Form::each_down, site.module};
}

/// Gate and up with one A become one site of that rank; with two, one of the summed rank whose B
/// is block-diagonal. The scale stays what it was for each.
void PeftReader::find_each_gate_up(LoraSite& site) {
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
    shared = shared && same_values(*gate.a, *up.a);
  }
  site.rank = shared ? rank : 2 * rank;
  site.alpha = alpha_of(site.module + ".0.gate_proj") * (shared    ? 1
                                                         : rslora_ ? std::sqrt(2.0)
                                                                   : 2.0);
  forms_[{site.layer, site.projection}] = {
      shared ? Form::each_gate_up_shared : Form::each_gate_up_apart, site.module};
}

void PeftReader::refuse_left_over() const {
  for (const auto& [module, pair] : pairs_) {
    if (used_.contains(module)) continue;
    refuse(
        "factors of '" + module + "' belong to no matrix of this model", file_path_.string(),
        "This adapter belongs to another base model, or adapts something Tailor does not train.");
  }
}

// ---------------------------------------------------------------- numbers

const std::byte* PeftReader::bytes_of(const Factor& factor) const {
  return file_->bytes().data() + factor.offset;
}

void PeftReader::drop(const Factor& factor, std::int64_t offset, std::int64_t bytes) const {
  file_->drop(static_cast<std::size_t>(factor.offset + offset), static_cast<std::size_t>(bytes));
}

bool PeftReader::same_values(const Factor& x, const Factor& y) const {
  if (x.rows != y.rows || x.columns != y.columns || x.dtype != y.dtype) return false;
  const bool same = std::memcmp(bytes_of(x), bytes_of(y), static_cast<std::size_t>(x.bytes())) == 0;
  drop(x, 0, x.bytes());
  drop(y, 0, y.bytes());
  return same;
}

void PeftReader::rows(const Factor& factor, std::int64_t first, std::int64_t count,
                      float* out) const {
  const std::int64_t row_bytes = factor.columns * dtype_bytes(factor.dtype);
  widen(bytes_of(factor) + first * row_bytes, factor.dtype, count * factor.columns, out);
  drop(factor, first * row_bytes, count * row_bytes);
}

void PeftReader::unfold(const Factor& factor, std::int64_t rank, std::int64_t experts,
                        std::int64_t first, std::int64_t count, float* out) const {
  constexpr std::int64_t kTile = 16;  // rows that are turned together: a cache line of each output
  const std::int64_t wide = factor.rows, across = factor.columns;
  const std::int64_t row_bytes = across * dtype_bytes(factor.dtype);
  std::vector<float> tile(static_cast<std::size_t>(kTile * across));
  std::int64_t dropped = 0;
  for (std::int64_t begin = 0; begin < wide; begin += kTile) {
    const std::int64_t end = std::min(wide, begin + kTile);
    widen(bytes_of(factor) + begin * row_bytes, factor.dtype, (end - begin) * across, tile.data());
    for (std::int64_t e = 0; e < count; ++e) {
      for (std::int64_t r = 0; r < rank; ++r) {
        const float* from = tile.data() + r * experts + first + e;
        float* to = out + (e * rank + r) * wide;
        for (std::int64_t i = begin; i < end; ++i) to[i] = from[(i - begin) * across];
      }
    }
    if ((end - dropped) * row_bytes >= kStripBytes || end == wide) {
      drop(factor, dropped * row_bytes, (end - dropped) * row_bytes);
      dropped = end;
    }
  }
}

void PeftReader::read(const LoraSite& site, std::int64_t first, std::int64_t count, float* a,
                      float* b) const {
  const auto& [form, module] = forms_.at({site.layer, site.projection});
  const std::int64_t rank = site.rank, E = site.experts;
  const auto pair = [&, &name = module](const std::string& rest = {}) -> const FactorPair& {
    return pairs_.at(name + rest);
  };
  switch (form) {
    case Form::plain:
      rows(*pair().a, 0, rank, a);
      unfold(*pair().b, rank, 1, 0, 1, b);
      return;
    case Form::straight:
      rows(*pair().a, first * rank, count * rank, a);
      unfold(*pair().b, rank, E, first, count, b);
      return;
    case Form::swapped:
      unfold(*pair().b, rank, E, first, count, a);
      rows(*pair().a, first * rank, count * rank, b);
      return;
    case Form::each_down:
      for (std::int64_t e = 0; e < count; ++e) {
        const FactorPair& one = pair("." + std::to_string(first + e) + ".down_proj");
        rows(*one.a, 0, rank, a + e * rank * site.in);
        unfold(*one.b, rank, 1, 0, 1, b + e * rank * site.out);
      }
      return;
    case Form::each_gate_up_shared:
    case Form::each_gate_up_apart:
      break;
  }
  const bool shared = form == Form::each_gate_up_shared;
  const std::int64_t F = site.out / 2, each = shared ? rank : rank / 2;
  std::vector<float> half(static_cast<std::size_t>(each * F));
  for (std::int64_t e = 0; e < count; ++e) {
    float* to_a = a + e * rank * site.in;
    float* to_b = b + e * rank * site.out;
    std::fill_n(to_b, rank * site.out, 0.0F);
    for (const bool up : {false, true}) {
      const FactorPair& one =
          pair("." + std::to_string(first + e) + (up ? ".up_proj" : ".gate_proj"));
      const std::int64_t begin = up && !shared ? each : 0;
      if (!up || !shared) rows(*one.a, 0, each, to_a + begin * site.in);
      unfold(*one.b, each, 1, 0, 1, half.data());
      for (std::int64_t r = 0; r < each; ++r) {
        std::copy_n(half.data() + r * F, F, to_b + (begin + r) * site.out + (up ? F : 0));
      }
    }
  }
}

void PeftReader::check_finite() const {
  for (const auto& [module, pair] : pairs_) {
    for (const Factor* factor : {&*pair.a, &*pair.b}) {
      const std::int64_t step =
          std::max<std::int64_t>(1, kStripBytes / (factor->columns * dtype_bytes(factor->dtype)));
      std::vector<float> values;
      for (std::int64_t row = 0; row < factor->rows; row += step) {
        const std::int64_t count = std::min(step, factor->rows - row);
        values.resize(static_cast<std::size_t>(count * factor->columns));
        rows(*factor, row, count, values.data());
        if (std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); }))
          continue;
        refuse("factors hold NaN or infinite values", file_path_.string() + ", " + module,
               "The run that wrote this adapter diverged; take an earlier checkpoint.");
      }
    }
  }
}

}  // namespace tailor
