#include "tools/model_check.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

constexpr std::size_t kProblemsShown = 8;

}  // namespace

std::vector<ExpectedTensor> expected_tensors(const ModelSpec& spec, ExpertLayout layout) {
  std::vector<ExpectedTensor> out;
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape) {
    out.push_back({name, std::move(shape)});
  };
  const std::int64_t D = spec.hidden, Q = spec.query_width(), KV = spec.kv_width();
  const auto add_mlp = [&](const std::string& base, std::int64_t width) {
    add(base + "gate_proj.weight", {width, D});
    add(base + "up_proj.weight", {width, D});
    add(base + "down_proj.weight", {D, width});
  };
  add("model.embed_tokens.weight", {spec.vocab, D});
  for (std::size_t l = 0; l < spec.layers.size(); ++l) {
    const std::string base = "model.layers." + std::to_string(l) + ".";
    add(base + "input_layernorm.weight", {D});
    add(base + "self_attn.q_proj.weight", {Q, D});
    add(base + "self_attn.k_proj.weight", {KV, D});
    add(base + "self_attn.v_proj.weight", {KV, D});
    add(base + "self_attn.o_proj.weight", {D, Q});
    add(base + "post_attention_layernorm.weight", {D});
    const std::string mlp = base + (spec.family == Family::llama4 ? "feed_forward." : "mlp.");
    if (!spec.layers[l].moe) {
      add_mlp(mlp, spec.dense_width);
      continue;
    }
    const std::int64_t E = spec.experts, F = spec.expert_width;
    add(mlp + "router.weight", {E, D});
    add_mlp(mlp + "shared_expert.", F);
    if (layout == ExpertLayout::one_by_one) {
      for (std::int64_t e = 0; e < E; ++e) add_mlp(mlp + "experts." + std::to_string(e) + ".", F);
    } else {
      add(mlp + "experts.gate_up_proj", {E, D, 2 * F});
      add(mlp + "experts.down_proj", {E, F, D});
    }
  }
  add("model.norm.weight", {D});
  if (!spec.tied_head) add("lm_head.weight", {spec.vocab, D});
  return out;
}

ExpertLayout expert_layout(const ModelSpec& spec, const Checkpoint& checkpoint) {
  for (std::size_t l = 0; l < spec.layers.size(); ++l) {
    if (!spec.layers[l].moe) continue;
    const std::string one =
        "model.layers." + std::to_string(l) + ".feed_forward.experts.0.gate_proj.weight";
    return checkpoint.has(one) ? ExpertLayout::one_by_one : ExpertLayout::fused;
  }
  return ExpertLayout::none;
}

std::vector<std::string> check_tensors(const ModelSpec& spec, const Checkpoint& checkpoint) {
  std::vector<Error> problems;
  std::set<std::string, std::less<>> used;
  for (const ExpectedTensor& tensor : expected_tensors(spec, expert_layout(spec, checkpoint))) {
    try {
      checkpoint.find(tensor.name, tensor.shape);
    } catch (const Error& error) {
      problems.push_back(error);
    }
    used.insert(tensor.name);
  }
  if (problems.size() == 1) throw problems.front();
  if (!problems.empty()) {
    std::string where = checkpoint.folder().string();
    for (std::size_t i = 0; i < std::min(kProblemsShown, problems.size()); ++i) {
      where += "\n" + problems[i].parts().what;
    }
    if (problems.size() > kProblemsShown) {
      where += "\nand " + count_text(static_cast<std::int64_t>(problems.size() - kProblemsShown)) +
               " more";
    }
    throw Error(Fault::bad_file,
                {count_text(static_cast<std::int64_t>(problems.size())) +
                     " tensors are missing or have another shape than config.json asks for",
                 where,
                 "Check that config.json belongs to these weights and that every shard is "
                 "complete."});
  }
  std::vector<std::string> unused;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    if (!used.contains(name)) unused.push_back(name);
  }
  return unused;
}

std::vector<LoraTarget> lora_targets(const ModelSpec& spec) {
  const std::int64_t moe = spec.moe_layer_count(), all = spec.layer_count(), dense = all - moe;
  const std::int64_t D = spec.hidden, Q = spec.query_width(), KV = spec.kv_width();
  std::vector<LoraTarget> out;
  const auto add = [&](const char* group, const char* module, std::int64_t in, std::int64_t width,
                       std::int64_t layers, std::int64_t each = 1) {
    if (layers > 0) out.push_back({group, module, in, width, layers, layers * each});
  };
  add("attention", "q_proj", D, Q, all);
  add("attention", "k_proj", D, KV, all);
  add("attention", "v_proj", D, KV, all);
  add("attention", "o_proj", Q, D, all);
  add("dense_mlp", "gate_proj", D, spec.dense_width, dense);
  add("dense_mlp", "up_proj", D, spec.dense_width, dense);
  add("dense_mlp", "down_proj", spec.dense_width, D, dense);
  const std::int64_t F = spec.expert_width;
  add("shared_expert", "gate_proj", D, F, moe);
  add("shared_expert", "up_proj", D, F, moe);
  add("shared_expert", "down_proj", F, D, moe);
  add("router", "router", D, spec.experts, moe);
  add("experts", "experts.gate_up_proj", D, 2 * F, moe, spec.experts);
  add("experts", "experts.down_proj", F, D, moe, spec.experts);
  return out;
}

}  // namespace tailor
