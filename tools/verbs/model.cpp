#include "data/gguf/model.h"

#include <cmath>
#include <iostream>
#include <map>
#include <optional>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/store/store.h"
#include "tools/model_check.h"
#include "tools/model_sizes.h"
#include "tools/paths.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

const char* layout_name(PublishedLayout layout) {
  return layout == PublishedLayout::fused        ? "fused"
         : layout == PublishedLayout::one_by_one ? "one_by_one"
                                                 : "none";
}

/// What there is of a model's weights.
enum class Weights { none, safetensors, gguf, store };
const char* weights_name(Weights weights) {
  return weights == Weights::safetensors ? "safetensors"
         : weights == Weights::gguf      ? "gguf"
         : weights == Weights::store     ? "store"
                                         : "none";
}

/// What was found of one model.
struct Inspected {
  fs::path folder;  ///< or the config file, where nothing else is there
  ModelSpec spec;
  ModelFacts facts;
  Weights weights = Weights::none;
  bool shipped = false;  ///< a published config that comes with Tailor
  PublishedLayout layout = PublishedLayout::none;
  std::size_t tensors = 0;
  std::int64_t bytes = 0;
  std::map<std::string, std::int64_t> parameters_by_dtype;
  std::vector<std::string> unused;
  bool tokenizer = false;
  std::string expert_format, other_format, source;  ///< of a store
};

bool has_published_weights(const Inspected& model) {
  return model.weights == Weights::safetensors || model.weights == Weights::gguf;
}

/// Whether a folder holds anything that could be weights, whole or not.
bool has_weight_files(const fs::path& folder) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename(), extension = entry.path().extension();
    if (extension == ".safetensors" || name.ends_with(".safetensors.index.json") ||
        extension == ".bin" || extension == ".pt" || extension == ".pth")
      return true;
  }
  return false;
}

void read_weights(Inspected& out) {
  const Checkpoint checkpoint = Checkpoint::open(out.folder);
  out.weights = Weights::safetensors;
  out.unused = check_tensors(out.spec, checkpoint);
  out.layout = expert_layout(out.spec, checkpoint);
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    out.bytes += tensor.info.bytes;
    out.parameters_by_dtype[std::string(dtype_name(tensor.info.dtype))] += tensor.info.elements();
  }
  out.tensors = checkpoint.tensors().size();
}

/// Its head alone: the file is not unpacked for this.
Json read_gguf(Inspected& out, const fs::path& path) {
  const GgufModel model = GgufModel::open(path);
  out.folder = path;
  out.weights = Weights::gguf;
  out.spec = model.spec();
  out.layout = out.spec.experts > 0 ? PublishedLayout::one_by_one : PublishedLayout::none;
  for (const auto& [name, tensor] : model.header().tensors) {
    out.bytes += tensor.bytes;
    out.parameters_by_dtype[std::string(ggml_layout(tensor.type).name)] += tensor.elements();
  }
  out.tensors = model.header().tensors.size();
  out.tokenizer = !model.tokenizer_files().empty();
  return model.config();
}

void read_store(Inspected& out) {
  const Store store = Store::open(out.folder);
  out.weights = Weights::store;
  out.expert_format = format_text(store.expert_format());
  out.other_format = format_text(store.other_format());
  out.source = store.source();
  for (const StoredUnit& unit : store.layout().units) out.bytes += unit.bytes;
}

Inspected inspect(const std::string& model) {
  Inspected out;
  std::error_code error;
  fs::path config_path;
  if (const auto gguf = find_gguf_file(model)) {
    const Json config = read_gguf(out, *gguf);
    out.facts = model_facts(config, gguf->string(), model);
    return out;
  }
  if (fs::is_regular_file(model, error)) {
    out.folder = config_path = model;
  } else {
    try {
      out.folder = find_model_folder(model);
      config_path = out.folder / "config.json";
    } catch (const Error&) {
      const std::optional<fs::path> shipped = shipped_config(model, recipes_folder() / "models");
      if (!shipped) throw;
      out.folder = config_path = *shipped;
      out.shipped = true;
    }
  }
  const bool folder = fs::is_directory(out.folder, error);
  if (folder && Store::is_store(out.folder)) {
    read_store(out);  // first: an unfinished store is told as that
  } else if (folder) {
    out.spec = read_model_spec(out.folder);  // names a config.json that is missing
    if (has_weight_files(out.folder)) read_weights(out);
    out.tokenizer = fs::exists(out.folder / "tokenizer.json", error);
  }
  const Json config = read_json(config_path);
  out.spec = model_spec_from_config(config, config_path.string());
  out.facts = model_facts(config, config_path.string(), model);
  return out;
}

std::int64_t whole_bytes(double bytes) { return std::llround(bytes); }

Json to_json(const Inspected& model) {
  const ModelSpec& spec = model.spec;
  Json targets = Json::array();
  for (const LoraTarget& target : lora_targets(spec)) {
    targets.push_back({{"group", target.group},
                       {"module", target.module},
                       {"in", target.in},
                       {"out", target.out},
                       {"layers", target.layers},
                       {"matrices", target.matrices}});
  }
  Json formats = Json::object(), adapter = Json::object();
  for (const FormatSizes& sizes : format_sizes(model.facts)) {
    formats[sizes.format] = {
        {"expert", whole_bytes(sizes.expert)},         {"layer_experts", whole_bytes(sizes.layer)},
        {"experts", whole_bytes(sizes.experts)},       {"other", whole_bytes(sizes.other)},
        {"vocabulary", whole_bytes(sizes.vocabulary)}, {"total", whole_bytes(sizes.total())}};
  }
  for (const AdapterSize& size : adapter_sizes(model.facts)) {
    adapter[size.target] = size.parameters;
  }
  Json out = {{"folder", model.folder.string()},
              {"weights", weights_name(model.weights)},
              {"architecture", spec.architecture},
              {"family", family_name(spec.family)},
              {"parameters", spec.parameters()},
              {"active_parameters", spec.active_parameters()},
              {"bytes", model.bytes},
              {"dtypes", model.parameters_by_dtype},
              {"tensors", model.tensors},
              {"tensors_not_used", model.unused},
              {"layers", spec.layer_count()},
              {"moe_layers", spec.moe_layer_count()},
              {"prediction_layers", spec.prediction_layers},
              {"hidden", spec.hidden},
              {"heads", spec.heads},
              {"kv_heads", spec.kv_heads},
              {"head_dim", spec.head_dim},
              {"vocab", spec.vocab},
              {"dense_width", spec.dense_width},
              {"experts", spec.experts},
              {"experts_per_token", spec.experts_per_token},
              {"expert_width", spec.expert_width},
              {"shared_width", spec.shared_width},
              {"expert_layout", layout_name(model.layout)},
              {"positions_max", spec.positions_max},
              {"tied_head", spec.tied_head},
              {"tokenizer", model.tokenizer},
              {"lora_targets", targets},
              {"format_bytes", formats},
              {"adapter_parameters_per_rank", adapter}};
  if (spec.is_latent()) {
    out["latent"] = {{"q_rank", spec.latent.q_rank},
                     {"kv_rank", spec.latent.kv_rank},
                     {"nope_dim", spec.latent.nope_dim},
                     {"rope_dim", spec.latent.rope_dim},
                     {"value_dim", spec.latent.value_dim}};
  }
  if (model.weights == Weights::store) {
    out["store"] = {{"expert_format", model.expert_format},
                    {"other_format", model.other_format},
                    {"source", model.source}};
  }
  return out;
}

std::string attention_text(const ModelSpec& spec) {
  const std::string heads = count_text(spec.heads) + " heads of ";
  if (!spec.is_latent()) {
    return heads + count_text(spec.head_dim) + ", " + count_text(spec.kv_heads) +
           " key-value heads" + (spec.qkv_bias ? ", biases on q, k and v" : "");
  }
  const LatentSpec& latent = spec.latent;
  return heads + count_text(latent.nope_dim) + " + " + count_text(latent.rope_dim) +
         " rotary, values of " + count_text(latent.value_dim) + "; latents of " +
         (latent.q_rank > 0 ? count_text(latent.q_rank) + " (queries) and " : std::string()) +
         count_text(latent.kv_rank) + " (keys and values)";
}

std::string experts_text(const Inspected& model) {
  const ModelSpec& spec = model.spec;
  std::string out = count_text(spec.experts) + " a layer of width " +
                    count_text(spec.expert_width) + ", " + count_text(spec.experts_per_token) +
                    " a token, and a shared one";
  if (spec.shared_width != spec.expert_width) out += " of width " + count_text(spec.shared_width);
  if (spec.router.groups > 1) {
    out += "; from the best " + count_text(spec.router.groups_kept) + " of " +
           count_text(spec.router.groups) + " groups";
  }
  if (has_published_weights(model)) {
    const bool fused = model.layout == PublishedLayout::fused || model.weights == Weights::gguf;
    out += fused ? "; stored as one tensor a layer" : "; stored one by one";
  }
  return out;
}

/// What is known of the weights.
void print_weights(const Inspected& model, std::ostream& out) {
  out << "\n";
  if (model.weights == Weights::store) {
    out << "The manifest is whole and every file has its length. Weights are not read here: tailor "
           "model verify "
        << model.folder.string() << "\n";
    return;
  }
  if (model.weights == Weights::none) {
    out << "No weights are there; what follows is worked out from the config.";
    if (model.shipped) out << " To train: hf download " << model.facts.name;
    out << "\n";
    return;
  }
  out << "Every tensor is there and has the shape "
      << (model.weights == Weights::gguf ? "the file's values ask for." : "config.json asks for.");
  if (!model.unused.empty()) {
    out << " Not used: " << model.unused.front();
    if (model.unused.size() > 1) {
      out << " and " << count_text(static_cast<std::int64_t>(model.unused.size() - 1)) << " more";
    }
    out << ".";
  }
  out << "\n";
}

void print(const Inspected& model, std::ostream& out) {
  const ModelSpec& spec = model.spec;
  out << heading(spec.architecture)
      << (model.folder.filename() == "config.json" || model.shipped ? ", " : " in ")
      << model.folder.string() << "\n";
  TextTable table({"", ""});
  table.add({"parameters", count_text(spec.parameters()) + ", a token meets " +
                               count_text(spec.active_parameters())});
  if (has_published_weights(model)) {
    std::vector<std::string> dtypes;
    for (const auto& [name, count] : model.parameters_by_dtype) {
      dtypes.push_back(name + " " + count_text(count));
    }
    table.add({"files", bytes_text(model.bytes) + ", " +
                            count_text(static_cast<std::int64_t>(model.tensors)) + " tensors (" +
                            join(dtypes, ", ") + ")"});
  } else if (model.weights == Weights::store) {
    table.add({"store", bytes_text(model.bytes) + ", " +
                            (spec.experts > 0 ? "experts " + model.expert_format + ", the rest "
                                              : std::string()) +
                            model.other_format + "; made from " + model.source});
  } else {
    table.add({"weights", "none: this is a config alone"});
  }
  table.add({"layers", count_text(spec.layer_count()) + " of width " + count_text(spec.hidden) +
                           (spec.experts > 0 ? ", " + count_text(spec.moe_layer_count()) +
                                                   " of them mixtures of experts"
                                             : "")});
  if (spec.prediction_layers > 0) {
    table.add({"prediction layers", count_text(spec.prediction_layers) +
                                        " behind them (multi-token prediction): skipped"});
  }
  table.add({"attention", attention_text(spec)});
  if (spec.layer_count() > spec.moe_layer_count()) {
    table.add({"dense MLP", "width " + count_text(spec.dense_width)});
  }
  if (spec.experts > 0) table.add({"experts", experts_text(model)});
  table.add({"vocabulary", count_text(spec.vocab) + (spec.tied_head ? ", head tied" : "")});
  table.add({"positions", count_text(spec.positions_max)});
  if (has_published_weights(model)) {
    table.add({"tokenizer", !model.tokenizer ? "none: only tokenised data can be trained on"
                            : model.weights == Weights::gguf ? "in the file"
                                                             : "tokenizer.json"});
  }
  out << rows_text(table, "  ");
  print_weights(model, out);
  out << "\n" << heading("lora.targets") << "\n";
  TextTable targets({"group", "module", ">in", ">out", ">layers", ">matrices"});
  for (const LoraTarget& target : lora_targets(spec)) {
    targets.add({target.group, target.module, count_text(target.in), count_text(target.out),
                 count_text(target.layers), count_text(target.matrices)});
  }
  out << targets.text("  ");
  out << "\n" << sizes_text(model.facts);
}

}  // namespace

int run_model_inspect(const ModelInspectArguments& arguments) {
  const Inspected model = inspect(arguments.model);
  if (arguments.json) {
    std::cout << to_json(model).dump(2) << "\n";
  } else {
    print(model, std::cout);
  }
  return 0;
}

}  // namespace tailor
