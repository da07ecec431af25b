#include "adapters/peft_files.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <tuple>

#include "adapters/peft_reader.h"
#include "base/error.h"
#include "base/json.h"
#include "data/checkpoint/safetensors.h"

namespace tailor {
namespace {

constexpr std::string_view kKeyPrefix = "base_model.model.";

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
    const bool straight = peft_layout(spec.family, kPeftVersion) == ExpertLayout::straight;
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

ExpertLayout peft_layout(Family family, const std::string& peft_version) {
  const bool held_inputs_first = family == Family::llama4;
  const bool read_inputs_first = version_parts(peft_version) < std::tuple(0, 19, 1);
  return held_inputs_first == read_inputs_first ? ExpertLayout::straight : ExpertLayout::swapped;
}

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
  if (std::get<1>(version_parts(peft_version)) >= 0) return peft_layout(spec.family, peft_version);
  throw Error(Fault::bad_file,
              {"which side of the experts' factors is the input cannot be told", where,
               "PEFT changed this between versions. Add the version that wrote the file to "
               "adapter_config.json as \"peft_version\"."});
}

Adapter read_peft_adapter(const PeftReader& reader) {
  reader.check_finite();
  Adapter adapter =
      Adapter::from_sites({reader.sites().begin(), reader.sites().end()}, reader.options());
  for (const LoraSite& site : adapter.sites()) {
    reader.read(site, 0, site.experts, adapter.a_of(site).data(), adapter.b_of(site).data());
  }
  return adapter;
}

Adapter read_peft_adapter(const fs::path& folder, const ModelSpec& spec) {
  return read_peft_adapter(PeftReader(folder, spec));
}

void write_peft_adapter(const fs::path& folder, const Adapter& adapter, const ModelSpec& spec,
                        const PeftWriteOptions& options) {
  make_folders(folder);
  const std::vector<TensorToWrite> tensors = peft_tensors(adapter, spec, options.module_prefix);
  const fs::path path = folder / "adapter_model.safetensors";
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (!options.base_fingerprint.empty()) metadata[kBaseFingerprintKey] = options.base_fingerprint;
  write_safetensors(path, tensors, metadata);
  write_atomically(folder / "adapter_config.json",
                   peft_config(adapter, spec, options).dump(2) + "\n");
  compare_written(path, tensors);
}

}  // namespace tailor
