#include "tools/model_sizes.h"

#include <algorithm>
#include <cmath>

#include "base/text.h"
#include "recipes/choices.h"
#include "recipes/step_cost.h"
#include "tools/table.h"
#include "tools/terminal.h"

namespace tailor {
namespace {

std::string size_text(double bytes) {
  if (bytes < 1e6) return bytes_text(std::llround(bytes));
  return bytes < 1e9 ? number_text(bytes / 1e6, 4) + " MB" : number_text(bytes / 1e9, 5) + " GB";
}

std::string formats_text(const ModelFacts& facts) {
  TextTable sizes(
      facts.experts > 0
          ? std::vector<std::string>{"format", ">one expert", ">a layer's", ">all experts",
                                     ">the rest", ">embedding, head", ">in all"}
          : std::vector<std::string>{"format", ">matrices", ">embedding, head", ">in all"});
  for (const FormatSizes& size : format_sizes(facts)) {
    std::vector<std::string> row = {size.format};
    if (facts.experts > 0) {
      for (const double bytes : {size.expert, size.layer, size.experts})
        row.push_back(size_text(bytes));
    }
    for (const double bytes : {size.other, size.vocabulary, size.total()})
      row.push_back(size_text(bytes));
    sizes.add(row);
  }
  return sizes.text("  ");
}

}  // namespace

std::vector<FormatSizes> format_sizes(const ModelFacts& model) {
  std::vector<FormatSizes> out;
  for (const BaseFormat format :
       {BaseFormat::bf16, BaseFormat::fp8, BaseFormat::int4, BaseFormat::nf4}) {
    Recipe recipe;
    recipe.base.format = recipe.base.non_expert_format = format;
    const BaseBytes bytes = base_bytes(recipe, model);
    const auto experts = static_cast<double>(model.experts);
    out.push_back({std::string(choice_word(format)), bytes.expert, bytes.expert * experts,
                   bytes.routed, bytes.other, bytes.head + bytes.embedding});
  }
  return out;
}

std::vector<AdapterSize> adapter_sizes(const ModelFacts& model) {
  std::vector<AdapterSize> out;
  const auto add = [&](const char* target, const LoraTargets& targets) {
    Recipe recipe;
    recipe.lora.rank = 1;
    recipe.lora.expert_rank = 1;
    recipe.lora.targets = targets;
    const std::int64_t parameters = count_lora(recipe, model).total();
    if (parameters > 0) out.push_back({target, parameters});
  };
  LoraTargets none{false, false, false, false, false, {}};
  const auto group = [&](bool LoraTargets::*flag) {
    LoraTargets targets = none;
    targets.*flag = true;
    return targets;
  };
  add("attention", group(&LoraTargets::attention));
  const auto& names = model.attention_names;
  if (std::find(names.begin(), names.end(), "kv_b_proj") != names.end()) {
    LoraTargets targets = none;
    targets.modules = {"kv_b_proj"};
    add("kv_b_proj", targets);
  }
  if (model.dense_layers > 0) add("dense_mlp", group(&LoraTargets::dense_mlp));
  if (model.shared_experts > 0) add("shared_expert", group(&LoraTargets::shared_expert));
  if (model.experts > 0) {
    add("router", group(&LoraTargets::router));
    add("experts", group(&LoraTargets::experts));
  }
  return out;
}

std::int64_t trained_expert_parameters(const ModelFacts& model) {
  return model.moe_layers * model.experts * (2 * model.hidden + 3 * model.expert_width);
}

std::string sizes_text(const ModelFacts& facts) {
  std::string out = heading("bytes by format") + "\n" + formats_text(facts);
  TextTable adapter({"lora.targets", ">parameters for each unit of rank"});
  bool kv_b = false;
  for (const AdapterSize& size : adapter_sizes(facts)) {
    adapter.add({size.target, count_text(size.parameters)});
    kv_b = kv_b || size.target == "kv_b_proj";
  }
  out += "\n" + heading("adapter") + "\n" + adapter.text("  ");
  if (facts.experts > 0) {
    out +=
        "  Experts as servers hold them, gate and up with an A each; in training the two share "
        "one: " +
        count_text(trained_expert_parameters(facts)) + ".\n";
  }
  if (kv_b) {
    out +=
        "  kv_b_proj is in no group and has to be named: vLLM folds it into attention and "
        "ignores factors on it.\n";
  }
  return out;
}

}  // namespace tailor
