#include "recipes/expert_selection.h"

#include <algorithm>
#include <cctype>
#include <set>

#include "base/error.h"
#include "base/text.h"
#include "recipes/fields.h"

namespace tailor {
namespace {

constexpr std::int64_t kFormat = 1;
constexpr std::int64_t kMost = std::int64_t{1} << 40;
constexpr std::int64_t kExpertsMost = 1 << 16;

const std::vector<std::string> kKeys = {"format", "model", "scan", "choice", "layers"};
const std::vector<std::string> kModelKeys = {"name",         "family",     "layers",
                                             "hidden",       "experts",    "experts_per_token",
                                             "expert_width", "fingerprint"};
const std::vector<std::string> kScanKeys = {"data", "counted", "tokens"};
const std::vector<std::string> kChoiceKeys = {"by", "rule", "value", "expert_rank", "bytes"};
const std::vector<std::string> kLayerKeys = {"layer", "experts", "tokens_covered", "gate_covered"};

/// Members of one map, reported to `problems` under their dotted names.
class MapReader {
 public:
  MapReader(const YamlNode& map, std::string path, const std::vector<std::string>& known,
            Problems& problems)
      : map_(map), path_(std::move(path)), problems_(problems) {
    if (!map.is_map()) {
      problems.add(
          (path_.empty() ? "the file" : path_) + " is " + map.shown() + ", a section is needed",
          map.place, path_, "Write its keys below it: " + join(known, ", ") + ".");
      return;
    }
    refuse_unknown_keys(map, path_, known, problems);
  }

  const YamlNode* find(const std::string& key) {
    if (!map_.is_map()) return nullptr;  // said already
    const YamlNode* node = map_.find(key);
    if (node == nullptr) {
      problems_.add(dotted(key) + " is missing", map_.place, dotted(key),
                    "Make the file again: tailor experts scan.");
    }
    return node;
  }
  std::int64_t integer(const std::string& key, std::int64_t low, std::int64_t high) {
    const YamlNode* node = find(key);
    if (node == nullptr) return low;
    return read_integer(*node, dotted(key), low, high, problems_).value_or(low);
  }
  double number(const std::string& key, const NumberRange& range) {
    const YamlNode* node = find(key);
    return node == nullptr ? 0 : read_number(*node, dotted(key), range, problems_).value_or(0);
  }
  std::string text(const std::string& key) {
    const YamlNode* node = find(key);
    return node == nullptr ? "" : read_string(*node, dotted(key), problems_).value_or("");
  }
  std::string word(const std::string& key, const std::vector<std::string>& words) {
    const YamlNode* node = find(key);
    if (node == nullptr) return words.front();
    const auto index = read_word(*node, dotted(key), words, problems_);
    return words[index.value_or(0)];
  }
  const YamlNode* optional(const std::string& key) const {
    const YamlNode* node = map_.is_map() ? map_.find(key) : nullptr;
    return node == nullptr || node->is_null() ? nullptr : node;
  }
  std::string dotted(const std::string& key) const {
    return path_.empty() ? key : path_ + "." + key;
  }

 private:
  const YamlNode& map_;
  std::string path_;
  Problems& problems_;
};

/// "7" or "0-3"; both ends within [0, experts).
void read_run(const YamlNode& node, const std::string& key, std::int64_t experts,
              std::set<std::int32_t>& out, Problems& problems) {
  const std::string& text = node.text;
  const std::size_t dash = text.find('-');
  const auto first = parse_integer(text.substr(0, dash));
  const auto last =
      dash == std::string::npos ? first : parse_integer(std::string_view(text).substr(dash + 1));
  const bool digits = text.find_first_not_of("0123456789-") == std::string::npos;
  if (node.kind != YamlNode::Kind::scalar || !digits || !first || !last || *last < *first) {
    problems.add(key + " holds " + node.shown() + ", an expert or a run of them is needed",
                 node.place, key, "Write numbers and runs: [0-3, 7].");
    return;
  }
  if (*last >= experts) {
    problems.add("expert " + std::to_string(*last) + " is out of range, the model has " +
                     std::to_string(experts) + " a layer",
                 node.place, key,
                 "Experts are numbered from 0 to " + std::to_string(experts - 1) + ".");
    return;
  }
  for (std::int64_t e = *first; e <= *last; ++e) {
    if (out.insert(static_cast<std::int32_t>(e)).second) continue;
    problems.add("expert " + std::to_string(e) + " is named twice", node.place, key,
                 "Name each expert of a layer once.");
    return;
  }
}

ExpertSelection::Layer read_layer(const YamlNode& node, const ExpertSelection& selection,
                                  Problems& problems) {
  ExpertSelection::Layer out;
  MapReader layer(node, "layers", kLayerKeys, problems);
  out.layer = layer.integer("layer", 0, std::max<std::int64_t>(0, selection.model.layers - 1));
  const NumberRange share{0, 1, false, false};
  out.tokens_covered = layer.number("tokens_covered", share);
  out.gate_covered = layer.number("gate_covered", share);
  const YamlNode* experts = layer.find("experts");
  if (experts == nullptr) return out;
  if (experts->kind != YamlNode::Kind::sequence) {  // read_list() would refuse an empty one
    problems.add("layers.experts is " + experts->shown() + ", a list is needed", experts->place,
                 "layers.experts", "Write numbers and runs: [0-3, 7]; for none [].");
    return out;
  }
  std::set<std::int32_t> chosen;
  for (const YamlNode& item : experts->items) {
    read_run(item, "layers.experts", selection.model.experts, chosen, problems);
  }
  out.experts.assign(chosen.begin(), chosen.end());
  return out;
}

void read_layers(const YamlNode* node, ExpertSelection& selection, Problems& problems) {
  if (node == nullptr) return;
  const auto items = read_list(*node, "layers", false, problems);
  if (!items) return;
  for (const YamlNode* item : *items) {
    const std::size_t before = problems.count();
    selection.layers.push_back(read_layer(*item, selection, problems));
    if (problems.count() > before || selection.layers.size() < 2) continue;
    const std::int64_t last = selection.layers[selection.layers.size() - 2].layer;
    if (selection.layers.back().layer > last) continue;
    problems.add("layer " + std::to_string(selection.layers.back().layer) + " comes after layer " +
                     std::to_string(last),
                 item->place, "layers", "Name each layer once, from the first to the last.");
  }
  if (!problems.any() && selection.expert_count() == 0) {
    problems.add("no expert is chosen", node->place, "layers",
                 "Choose at least one, or leave experts out of lora.targets.");
  }
}

/// "layer 3" or "layers 3, 5, ...".
std::string layers_text(const std::vector<std::int64_t>& layers) {
  std::vector<std::string> words;
  for (std::size_t i = 0; i < layers.size() && i < 4; ++i)
    words.push_back(std::to_string(layers[i]));
  if (layers.size() > 4) words.emplace_back("...");
  return (layers.size() == 1 ? "layer " : "layers ") + join(words, ", ");
}

std::string share_text(double share) {
  return exact_text(std::min(1.0, static_cast<double>(std::llround(share * 1e6)) / 1e6));
}

}  // namespace

RoutedModel routed_model(const ModelSpec& spec) {
  RoutedModel out;
  // "DeepseekV3ForCausalLM" is "deepseek_v3": the name every config of the family shares, whatever
  // model is built around it.
  const std::string name = spec.architecture.substr(0, spec.architecture.find("For"));
  for (std::size_t i = 0; i < name.size(); ++i) {
    const auto letter = static_cast<unsigned char>(name[i]);
    const bool word = i > 0 && std::isupper(letter) != 0 &&
                      std::islower(static_cast<unsigned char>(name[i - 1])) != 0;
    if (word) out.family += '_';
    out.family += static_cast<char>(std::tolower(letter));
  }
  out.layers = spec.layer_count();
  out.hidden = spec.hidden;
  out.experts = spec.experts;
  out.experts_per_token = spec.experts_per_token;
  out.expert_width = spec.expert_width;
  for (std::size_t l = 0; l < spec.layers.size(); ++l) {
    if (spec.layers[l].moe) out.moe_layers.push_back(static_cast<std::int64_t>(l));
  }
  return out;
}

std::int64_t ExpertSelection::expert_count() const {
  std::int64_t total = 0;
  for (const Layer& layer : layers) total += static_cast<std::int64_t>(layer.experts.size());
  return total;
}

double ExpertSelection::tokens_covered() const {
  double sum = 0;
  for (const Layer& layer : layers) sum += layer.tokens_covered;
  return layers.empty() ? 0 : sum / static_cast<double>(layers.size());
}

std::map<int, std::vector<std::int32_t>> ExpertSelection::by_layer() const {
  std::map<int, std::vector<std::int32_t>> out;
  for (const Layer& layer : layers) out[static_cast<int>(layer.layer)] = layer.experts;
  return out;
}

std::string runs_text(const std::vector<std::int32_t>& numbers) {
  std::vector<std::string> runs;
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    const std::string first = std::to_string(numbers[i]);
    runs.push_back(end - i == 1 ? first : first + "-" + std::to_string(numbers[end - 1]));
    i = end;
  }
  return join(runs, ", ");
}

std::string selection_text(const ExpertSelection& s) {
  std::string out =
      "# Routed experts that get LoRA factors, written by `tailor experts scan`.\n"
      "# A recipe uses it with lora.experts: THIS FILE.\n"
      "format: " +
      std::to_string(kFormat) + "\nmodel:\n";
  const auto line = [&](const std::string& key, const std::string& value) {
    out += "  " + key + ": " + value + "\n";
  };
  line("name", yaml_text(s.model_name));
  line("family", yaml_text(s.model.family));
  line("layers", std::to_string(s.model.layers));
  line("hidden", std::to_string(s.model.hidden));
  line("experts", std::to_string(s.model.experts));
  line("experts_per_token", std::to_string(s.model.experts_per_token));
  line("expert_width", std::to_string(s.model.expert_width));
  if (!s.model.fingerprint.empty()) line("fingerprint", "\"" + s.model.fingerprint + "\"");
  out += "scan:\n";
  std::vector<std::string> data;
  for (const std::string& path : s.data) data.push_back(yaml_text(path));
  line("data", "[" + join(data, ", ") + "]");
  line("counted", s.counted);
  line("tokens", std::to_string(s.tokens));
  out += "choice:\n";
  line("by", s.by);
  line("rule", s.rule);
  line("value", exact_text(s.value));
  line("expert_rank", std::to_string(s.expert_rank));
  line("bytes", std::to_string(s.bytes));
  out += "layers:\n";
  for (const ExpertSelection::Layer& layer : s.layers) {
    out += "  - {layer: " + std::to_string(layer.layer) +
           ", tokens_covered: " + share_text(layer.tokens_covered) +
           ", gate_covered: " + share_text(layer.gate_covered) + ", experts: [" +
           runs_text(layer.experts) + "]}\n";
  }
  return out;
}

ExpertSelection parse_selection(std::string_view text, const std::string& name) {
  const auto source =
      std::make_shared<const TextSource>(TextSource{name, std::string(text), false});
  Problems problems;
  ExpertSelection out;
  constexpr const char* kMend = "Make the file again: tailor experts scan.";
  const std::optional<YamlNode> root = parse_yaml(source, problems);
  problems.throw_if_any(Fault::bad_file, "expert selection " + name, kMend);
  TAILOR_CHECK(root.has_value());
  MapReader file(*root, "", kKeys, problems);
  const std::int64_t format = file.integer("format", 1, kMost);
  if (!problems.any() && format != kFormat) {
    throw Error(Fault::bad_file,
                {"expert selection format " + std::to_string(format) + " is not known", name,
                 "It was written by another version of Tailor: use that one, or scan again."});
  }
  if (const YamlNode* node = file.find("model")) {
    MapReader model(*node, "model", kModelKeys, problems);
    out.model_name = model.text("name");
    out.model.family = model.text("family");
    out.model.layers = model.integer("layers", 1, kExpertsMost);
    out.model.hidden = model.integer("hidden", 1, kMost);
    out.model.experts = model.integer("experts", 1, kExpertsMost);
    out.model.experts_per_token = model.integer("experts_per_token", 1, kExpertsMost);
    out.model.expert_width = model.integer("expert_width", 1, kMost);
    if (const YamlNode* print = model.optional("fingerprint")) {
      out.model.fingerprint = read_string(*print, "model.fingerprint", problems).value_or("");
    }
  }
  if (const YamlNode* node = file.find("scan")) {
    MapReader scan(*node, "scan", kScanKeys, problems);
    if (const YamlNode* data = scan.find("data")) {
      if (const auto items = read_list(*data, "scan.data", false, problems)) {
        for (const YamlNode* item : *items) {
          out.data.push_back(read_string(*item, "scan.data", problems).value_or(""));
        }
      }
    }
    out.counted = scan.word("counted", {"all", "trained"});
    out.tokens = scan.integer("tokens", 0, kMost);
  }
  if (const YamlNode* node = file.find("choice")) {
    MapReader choice(*node, "choice", kChoiceKeys, problems);
    out.by = choice.word("by", {"gate", "token"});
    out.rule = choice.word("rule", {"top_p", "count", "max_bytes", "max_usd"});
    out.value = choice.number("value", {0, static_cast<double>(kMost) * 1e6, false, false});
    out.expert_rank = choice.integer("expert_rank", 1, kExpertsMost);
    out.bytes = choice.integer("bytes", 0, kMost * 1024);
  }
  // Numbers of experts mean nothing while the model's are not known.
  const bool model_known = !problems.any();
  if (const YamlNode* layers = file.find("layers"); model_known) {
    read_layers(layers, out, problems);
  }
  problems.throw_if_any(Fault::bad_file, "expert selection " + name, kMend);
  for (const ExpertSelection::Layer& layer : out.layers)
    out.model.moe_layers.push_back(layer.layer);
  return out;
}

ExpertSelection read_selection(const fs::path& path) {
  return parse_selection(read_source(path.string(), "expert selection")->text, path.string());
}

void check_selection(const ExpertSelection& selection, const RoutedModel& model,
                     const std::string& name) {
  const RoutedModel& of = selection.model;
  std::vector<std::string> differences;
  const auto differ = [&](const std::string& what, std::int64_t theirs, std::int64_t ours) {
    if (theirs == ours) return;
    differences.push_back(what + " " + std::to_string(theirs) + ", this model has " +
                          std::to_string(ours));
  };
  if (of.family != model.family) {
    differences.push_back("family " + of.family + ", this model is of " + model.family);
  }
  differ("layers", of.layers, model.layers);
  differ("hidden", of.hidden, model.hidden);
  differ("experts", of.experts, model.experts);
  differ("experts_per_token", of.experts_per_token, model.experts_per_token);
  differ("expert_width", of.expert_width, model.expert_width);
  const std::string mend =
      "Name the selection that was scanned on this base_model, or scan again: tailor experts scan.";
  if (!differences.empty()) {
    throw Error(Fault::bad_file,
                {"the expert selection was made for another model: " + join(differences, "; "),
                 name + " (lora.experts)", mend});
  }
  std::vector<std::int64_t> missing, extra;
  std::set_difference(model.moe_layers.begin(), model.moe_layers.end(), of.moe_layers.begin(),
                      of.moe_layers.end(), std::back_inserter(missing));
  std::set_difference(of.moe_layers.begin(), of.moe_layers.end(), model.moe_layers.begin(),
                      model.moe_layers.end(), std::back_inserter(extra));
  if (!extra.empty()) {
    throw Error(Fault::bad_file, {"the expert selection names " + layers_text(extra) +
                                      ", which this model gives no routed experts",
                                  name + " (lora.experts)", mend});
  }
  if (!missing.empty()) {
    throw Error(Fault::bad_file,
                {"the expert selection leaves out " + layers_text(missing) + " with routed experts",
                 name + " (lora.experts)",
                 "A layer without a chosen expert is written as experts: []. " + mend});
  }
  if (of.fingerprint.empty() || model.fingerprint.empty() || of.fingerprint == model.fingerprint) {
    return;
  }
  throw Error(
      Fault::bad_file,
      {"the expert selection was made for another model of the same shape: " + selection.model_name,
       name + " (lora.experts)",
       "Scan this one: tailor experts scan. To use the selection all the same, remove "
       "model.fingerprint from the file."});
}

}  // namespace tailor
