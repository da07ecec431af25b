#include "adapters/peft_writer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "base/error.h"
#include "data/quant/numbers.h"

namespace tailor {
namespace {

/// [E, r, n] -> [n, r * E], expert fastest.
std::vector<float> folded(std::span<const float> x, std::int64_t E, std::int64_t rank,
                          std::int64_t n) {
  std::vector<float> out(x.size());
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t r = 0; r < rank; ++r) {
      float* to = out.data() + (i * rank + r) * E;
      for (std::int64_t e = 0; e < E; ++e)
        to[e] = x[static_cast<std::size_t>((e * rank + r) * n + i)];
    }
  }
  return out;
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

/// Throws unless the file holds what was to be written, tensor by tensor.
void compare_written(const fs::path& path, const std::vector<TensorToWrite>& tensors,
                     const std::function<void(std::int64_t)>& done) {
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
    done(static_cast<std::int64_t>(wanted.size()));
  }
}

/// target_modules for PEFT: the short names when they match exactly the matrices that are adapted,
/// else every module in full, so that PEFT never wraps one more or one less.
std::vector<std::string> target_modules(std::span<const LoraSite> sites, const ModelSpec& spec) {
  std::set<std::string> short_names, full_names;
  for (const LoraSite& site : sites) {
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
std::vector<std::string> target_parameters(std::span<const LoraSite> sites, const ModelSpec& spec) {
  std::map<std::string, std::size_t> in_model;
  for (const LoraSite& site : all_sites(spec)) ++in_model[below_layer(parameter_name(site))];
  std::map<std::string, std::vector<std::string>> adapted;
  for (const LoraSite& site : sites) {
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

}  // namespace

std::vector<std::byte> factor_bytes(std::span<const float> x, Dtype dtype) {
  TAILOR_CHECK(dtype == Dtype::f32 || dtype == Dtype::bf16);
  if (dtype == Dtype::f32) {
    const auto bytes = std::as_bytes(x);
    return {bytes.begin(), bytes.end()};
  }
  std::vector<std::byte> out(2 * x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::uint16_t bits = bf16_from_float(x[i]);
    std::memcpy(out.data() + 2 * i, &bits, sizeof bits);
  }
  return out;
}

std::vector<float> transposed(std::span<const float> x, std::int64_t rows, std::int64_t columns) {
  std::vector<float> out;
  out.reserve(x.size());
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t r = 0; r < rows; ++r)
      out.push_back(x[static_cast<std::size_t>(r * columns + c)]);
  }
  return out;
}

std::vector<TensorToWrite> fused_tensors(std::span<const LoraSite> sites, const FactorsOf& factors,
                                         ExpertLayout layout, const std::string& module_prefix,
                                         Dtype dtype) {
  TAILOR_CHECK(layout != ExpertLayout::per_expert);
  const bool straight = layout == ExpertLayout::straight;
  std::set<int> layers_with_down;
  for (const LoraSite& site : sites) {
    if (site.projection == Projection::experts_down) layers_with_down.insert(site.layer);
  }
  std::vector<TensorToWrite> out;
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape,
                       std::function<std::vector<std::byte>()> make) {
    out.push_back({name, dtype, std::move(shape), {}, std::move(make)});
  };
  for (const LoraSite& each : sites) {
    const LoraSite* site = &each;
    const std::int64_t E = site->experts, rank = site->rank, in = site->in, width = site->out;
    std::string key = std::string(kPeftKeyPrefix) + module_prefix + site->module;
    if (!site->is_experts()) {
      add(key + ".lora_A.weight", {rank, in},
          [=] { return factor_bytes(factors(*site).a, dtype); });
      add(key + ".lora_B.weight", {width, rank},
          [=] { return factor_bytes(transposed(factors(*site).b, rank, width), dtype); });
      continue;
    }
    if (site->projection == Projection::experts_gate_up && layers_with_down.contains(site->layer))
      key += ".base_layer";  // see PeftReader::fused_key
    const std::int64_t across = straight ? in : width, down = straight ? width : in;
    add(key + ".lora_A.weight", {E * rank, across}, [=] {
      const SiteFactors own = factors(*site);
      const std::span<const float> rows = straight ? own.a : own.b;
      if (site->slot_of.empty()) return factor_bytes(rows, dtype);
      return factor_bytes(with_zero_experts(*site, rows, rank * across), dtype);
    });
    add(key + ".lora_B.weight", {down, rank * E}, [=] {
      const SiteFactors own = factors(*site);
      const std::span<const float> columns = straight ? own.b : own.a;
      if (site->slot_of.empty()) return factor_bytes(folded(columns, E, rank, down), dtype);
      return factor_bytes(folded(with_zero_experts(*site, columns, rank * down), E, rank, down),
                          dtype);
    });
  }
  std::sort(out.begin(), out.end(), [](const auto& x, const auto& y) { return x.name < y.name; });
  return out;
}

Json lora_config(const std::string& base_model, const std::string& version, std::int64_t rank,
                 double alpha) {
  Json config = {{"peft_type", "LORA"},
                 {"task_type", "CAUSAL_LM"},
                 {"base_model_name_or_path", base_model},
                 {"revision", nullptr},
                 {"peft_version", version},
                 {"r", rank},
                 {"lora_alpha", alpha},
                 {"lora_dropout", 0.0},
                 {"bias", "none"},
                 {"fan_in_fan_out", false},
                 {"inference_mode", true},
                 {"init_lora_weights", true},
                 {"modules_to_save", nullptr},
                 {"use_dora", false},
                 {"use_rslora", false},
                 {"target_modules", Json::array()},
                 {"target_parameters", nullptr},
                 {"rank_pattern", Json::object()},
                 {"alpha_pattern", Json::object()}};
  if (alpha == std::floor(alpha)) config["lora_alpha"] = static_cast<std::int64_t>(alpha);
  return config;
}

Json peft_config(std::span<const LoraSite> sites, const ModelSpec& spec,
                 const std::string& base_model, const std::string& version, double dropout,
                 bool rslora) {
  // The most common rank and alpha are the config's own; the rest are patterns.
  std::map<std::pair<std::int64_t, double>, int> counts;
  bool parameters = false;
  for (const LoraSite& site : sites) {
    ++counts[{site.rank, site.alpha}];
    parameters = parameters || site.is_experts() || by_parameter(site, spec);
  }
  const auto common =
      std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) {
        return a.second < b.second;
      })->first;
  Json rank_pattern = Json::object(), alpha_pattern = Json::object();
  for (const LoraSite& site : sites) {
    const bool parameter = site.is_experts() || by_parameter(site, spec);
    const std::string name = parameter ? parameter_name(site) : site.module;
    if (site.rank != common.first) rank_pattern[name] = site.rank;
    if (site.alpha != common.second) alpha_pattern[name] = site.alpha;
  }
  Json config = lora_config(base_model, version, common.first, common.second);
  config["lora_dropout"] = dropout;
  config["use_rslora"] = rslora;
  config["target_modules"] = target_modules(sites, spec);
  config["rank_pattern"] = rank_pattern;
  config["alpha_pattern"] = alpha_pattern;
  if (parameters) {
    config["target_parameters"] = target_parameters(sites, spec);
  }
  return config;
}

void write_adapter_files(const fs::path& folder, const std::vector<TensorToWrite>& tensors,
                         const Json& config, const std::string& base_fingerprint,
                         const std::function<void(std::int64_t done)>& progress) {
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (!base_fingerprint.empty()) metadata[kBaseFingerprintKey] = base_fingerprint;
  std::int64_t bytes_done = 0;
  const auto done = [&](std::int64_t bytes) {
    bytes_done += bytes;
    if (progress) progress(bytes_done);
  };
  std::vector<TensorToWrite> counted = tensors;
  for (TensorToWrite& tensor : counted) {
    tensor.make = [make = tensor.make, &done] {
      std::vector<std::byte> bytes = make();
      done(static_cast<std::int64_t>(bytes.size()));
      return bytes;
    };
  }
  const fs::path path = folder / "adapter_model.safetensors";
  write_safetensors(path, counted, metadata);
  write_atomically(folder / "adapter_config.json", config.dump(2) + "\n");
  compare_written(path, tensors, done);
}

}  // namespace tailor
