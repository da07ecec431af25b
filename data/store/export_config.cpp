#include "data/store/export_config.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "base/error.h"

namespace tailor {
namespace {

bool quantised(const WeightFormat& format) {
  return format.kind != WeightKind::f32 && format.kind != WeightKind::bf16;
}

/// The quantised formats, in order of appearance.
std::vector<WeightFormat> schemes_of(const std::vector<ExportedLinear>& linears) {
  std::vector<WeightFormat> out;
  for (const ExportedLinear& linear : linears) {
    if (!quantised(linear.format)) continue;
    if (std::find(out.begin(), out.end(), linear.format) == out.end()) out.push_back(linear.format);
  }
  return out;
}

/// As a regular expression that matches the name alone.
std::string escaped(const std::string& name) {
  std::string out;
  for (const char c : name) {
    if (c == '.') out += '\\';
    out += c;
  }
  return out;
}

/// A projection of a layer's experts.
std::string siblings_of(const ExportedLinear& linear) {
  return linear.experts.empty() ? "" : linear.experts + "." + linear.projection;
}

/// Names of the linears with `wanted(format)`, as compressed-tensors matches them: a module's name,
/// or "re:" and an expression for a projection of all experts of a layer, where all are wanted.
template <class Wanted>
std::vector<std::string> names_of(const std::vector<ExportedLinear>& linears, Wanted&& wanted) {
  std::map<std::string, bool> all_wanted;
  for (const ExportedLinear& linear : linears) {
    const auto found = all_wanted.emplace(siblings_of(linear), true).first;
    found->second = found->second && wanted(linear.format);
  }
  std::vector<std::string> out;
  std::set<std::string> named;
  for (const ExportedLinear& linear : linears) {
    if (!wanted(linear.format)) continue;
    const std::string siblings = siblings_of(linear);
    if (siblings.empty() || !all_wanted.at(siblings)) {
      out.push_back(linear.module);
    } else if (named.insert(siblings).second) {
      out.push_back("re:" + escaped(linear.experts) + "\\.[0-9]+\\." + linear.projection + "$");
    }
  }
  return out;
}

/// The fields of compressed-tensors' QuantizationScheme; fp8's are its presets FP8_DYNAMIC and
/// FP8_BLOCK, int4's W4A16.
Json scheme_json(const WeightFormat& format) {
  Json weights, inputs;
  if (format.kind == WeightKind::int4) {
    weights = {{"num_bits", 4},
               {"type", "int"},
               {"symmetric", true},
               {"strategy", "group"},
               {"group_size", format.group},
               {"dynamic", false}};
  } else {
    const bool blocks = format.block_columns != 0;
    weights = {{"num_bits", 8},
               {"type", "float"},
               {"symmetric", true},
               {"strategy", blocks ? "block" : "channel"},
               {"dynamic", false}};
    if (blocks) weights["block_structure"] = {format.block_rows, format.block_columns};
    inputs = {{"num_bits", 8},
              {"type", "float"},
              {"symmetric", true},
              {"strategy", blocks ? "group" : "token"},
              {"dynamic", true}};
    if (blocks) inputs["group_size"] = format.block_columns;
  }
  return {{"weights", weights}, {"input_activations", inputs}, {"output_activations", Json()}};
}

const char* scheme_format(const WeightFormat& format) {
  return format.kind == WeightKind::int4 ? "pack-quantized" : "float-quantized";
}

Json compressed_tensors_config(const std::vector<ExportedLinear>& linears, bool wrapper) {
  const std::vector<WeightFormat> schemes = schemes_of(linears);
  const std::string format = quantization_format(linears);
  Json groups = Json::object();
  for (std::size_t i = 0; i < schemes.size(); ++i) {
    Json group;
    // The class stands for all that is not ignored, and is what every reader tries.
    group["targets"] = schemes.size() == 1
                           ? Json::array({"Linear"})
                           : Json(names_of(linears, [&](const WeightFormat& of_linear) {
                               return of_linear == schemes[i];
                             }));
    group.update(scheme_json(schemes[i]));
    // Only where they differ: compressed-tensors before 0.11 refuses the key in a group.
    if (format == "mixed-precision") group["format"] = scheme_format(schemes[i]);
    groups["group_" + std::to_string(i)] = std::move(group);
  }
  std::vector<std::string> ignore =
      names_of(linears, [](const WeightFormat& of_linear) { return !quantised(of_linear); });
  if (wrapper) {
    ignore.emplace_back("re:vision_model.*");
    ignore.emplace_back("re:multi_modal_projector.*");
  }
  return {{"quant_method", "compressed-tensors"},
          {"format", format},
          {"quantization_status", "compressed"},
          {"config_groups", groups},
          {"ignore", ignore},
          {"kv_cache_scheme", Json()},
          {"global_compression_ratio", Json()}};
}

/// As DeepSeek publishes V3 and R1; transformers' FineGrainedFP8Config and vLLM's Fp8Config read
/// the names of what is not converted, without expressions.
Json deepseek_config(const std::vector<ExportedLinear>& linears, bool wrapper) {
  std::set<std::string> mixed, named;
  for (const ExportedLinear& linear : linears) {
    if (quantised(linear.format)) mixed.insert(linear.experts);
  }
  std::vector<std::string> plain;
  for (const ExportedLinear& linear : linears) {
    if (quantised(linear.format)) continue;
    const bool one = linear.experts.empty() || mixed.count(linear.experts) > 0;
    const std::string& name = one ? linear.module : linear.experts;
    if (named.insert(name).second) plain.push_back(name);
  }
  if (wrapper) {
    plain.emplace_back("vision_model");
    plain.emplace_back("multi_modal_projector");
  }
  return {{"quant_method", "fp8"},
          {"fmt", "e4m3"},
          {"activation_scheme", "dynamic"},
          {"weight_block_size", {128, 128}},
          {"modules_to_not_convert", plain}};
}

}  // namespace

std::string quantization_format(const std::vector<ExportedLinear>& linears) {
  const std::vector<WeightFormat> schemes = schemes_of(linears);
  if (schemes.empty()) return "";
  if (schemes.size() == 1 && schemes.front() == WeightFormat::fp8_blocks()) return "fp8";
  const std::string first = scheme_format(schemes.front());
  const bool alike = std::all_of(schemes.begin(), schemes.end(), [&](const WeightFormat& scheme) {
    return scheme_format(scheme) == first;
  });
  return alike ? first : "mixed-precision";
}

Json quantization_config(const std::vector<ExportedLinear>& linears, bool wrapper) {
  const std::string format = quantization_format(linears);
  if (format.empty()) return {};
  return format == "fp8" ? deepseek_config(linears, wrapper)
                         : compressed_tensors_config(linears, wrapper);
}

}  // namespace tailor
