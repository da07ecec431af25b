#include <iostream>
#include <map>

#include "base/json.h"
#include "base/text.h"
#include "tools/model_check.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

const char* layout_name(ExpertLayout layout) {
  return layout == ExpertLayout::fused        ? "fused"
         : layout == ExpertLayout::one_by_one ? "one_by_one"
                                              : "none";
}

/// What was found of one model.
struct Inspected {
  fs::path folder;
  ModelSpec spec;
  ExpertLayout layout = ExpertLayout::none;
  std::size_t tensors = 0;
  std::int64_t bytes = 0;
  std::map<std::string, std::int64_t> parameters_by_dtype;
  std::vector<std::string> unused;
  bool tokenizer = false;
};

Inspected inspect(const std::string& model) {
  Inspected out;
  out.folder = find_model_folder(model);
  out.spec = read_model_spec(out.folder);
  const Checkpoint checkpoint = Checkpoint::open(out.folder);
  out.unused = check_tensors(out.spec, checkpoint);
  out.layout = expert_layout(out.spec, checkpoint);
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    out.bytes += tensor.info.bytes;
    out.parameters_by_dtype[std::string(dtype_name(tensor.info.dtype))] += tensor.info.elements();
  }
  out.tensors = checkpoint.tensors().size();
  std::error_code error;
  out.tokenizer = fs::exists(out.folder / "tokenizer.json", error);
  return out;
}

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
  return {{"folder", model.folder.string()},
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
          {"hidden", spec.hidden},
          {"heads", spec.heads},
          {"kv_heads", spec.kv_heads},
          {"head_dim", spec.head_dim},
          {"vocab", spec.vocab},
          {"dense_width", spec.dense_width},
          {"experts", spec.experts},
          {"experts_per_token", spec.experts_per_token},
          {"expert_width", spec.expert_width},
          {"expert_layout", layout_name(model.layout)},
          {"positions_max", spec.positions_max},
          {"tied_head", spec.tied_head},
          {"tokenizer", model.tokenizer},
          {"lora_targets", targets}};
}

void print(const Inspected& model, std::ostream& out) {
  const ModelSpec& spec = model.spec;
  out << heading(spec.architecture) << " in " << model.folder.string() << "\n";
  TextTable table({"", ""});
  table.add({"parameters", count_text(spec.parameters()) + ", a token meets " +
                               count_text(spec.active_parameters())});
  std::vector<std::string> dtypes;
  for (const auto& [name, count] : model.parameters_by_dtype) {
    dtypes.push_back(name + " " + count_text(count));
  }
  table.add({"files", bytes_text(model.bytes) + ", " +
                          count_text(static_cast<std::int64_t>(model.tensors)) + " tensors (" +
                          join(dtypes, ", ") + ")"});
  table.add({"layers", count_text(spec.layer_count()) + " of width " + count_text(spec.hidden) +
                           (spec.experts > 0 ? ", " + count_text(spec.moe_layer_count()) +
                                                   " of them mixtures of experts"
                                             : "")});
  table.add({"attention", count_text(spec.heads) + " heads of " + count_text(spec.head_dim) + ", " +
                              count_text(spec.kv_heads) + " key-value heads"});
  if (spec.layer_count() > spec.moe_layer_count()) {
    table.add({"dense MLP", "width " + count_text(spec.dense_width)});
  }
  if (spec.experts > 0) {
    table.add({"experts", count_text(spec.experts) + " a layer of width " +
                              count_text(spec.expert_width) + ", " +
                              count_text(spec.experts_per_token) + " a token, and a shared one; " +
                              (model.layout == ExpertLayout::fused ? "stored as one tensor a layer"
                                                                   : "stored one by one")});
  }
  table.add({"vocabulary", count_text(spec.vocab) + (spec.tied_head ? ", head tied" : "")});
  table.add({"positions", count_text(spec.positions_max)});
  table.add({"tokenizer",
             model.tokenizer ? "tokenizer.json" : "none: only tokenised data can be trained on"});
  out << rows_text(table, "  ");
  out << "\nEvery tensor is there and has the shape config.json asks for.";
  if (!model.unused.empty()) {
    out << " Not used: " << model.unused.front();
    if (model.unused.size() > 1) {
      out << " and " << count_text(static_cast<std::int64_t>(model.unused.size() - 1)) << " more";
    }
    out << ".";
  }
  out << "\n\n" << heading("lora.targets") << "\n";
  TextTable targets({"group", "module", ">in", ">out", ">layers", ">matrices"});
  for (const LoraTarget& target : lora_targets(spec)) {
    targets.add({target.group, target.module, count_text(target.in), count_text(target.out),
                 count_text(target.layers), count_text(target.matrices)});
  }
  out << targets.text("  ");
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
