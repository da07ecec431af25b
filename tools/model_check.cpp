#include "tools/model_check.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/text.h"
#include "data/checkpoint/published.h"
#include "data/store/source_form.h"

namespace tailor {
namespace {

constexpr std::size_t kProblemsShown = 8;

}  // namespace

std::vector<ExpectedTensor> expected_tensors(const ModelSpec& spec, PublishedLayout layout) {
  std::vector<ExpectedTensor> out;
  const auto add = [&](const std::vector<PublishedMatrix>& matrices) {
    for (const PublishedMatrix& matrix : matrices) {
      if (!out.empty() && out.back().name == matrix.name) continue;  // gate and up in one tensor
      out.push_back({matrix.name, matrix.tensor_shape(spec.experts)});
    }
  };
  add({embedding_matrix(spec)});
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    add(attention_matrices(spec, l));
    add(feed_forward_matrices(spec, l));
    if (!spec.layers[static_cast<std::size_t>(l)].moe) continue;
    const bool fused = layout != PublishedLayout::one_by_one;
    for (std::int64_t e = 0; e < (fused ? 1 : spec.experts); ++e) {
      add(expert_matrices(spec, l, e, fused));
    }
  }
  add({final_norm_matrix(spec)});
  if (!spec.tied_head) add({head_matrix(spec)});
  return out;
}

PublishedLayout expert_layout(const ModelSpec& spec, const Checkpoint& checkpoint) {
  for (std::size_t l = 0; l < spec.layers.size(); ++l) {
    if (!spec.layers[l].moe) continue;
    const std::string one =
        expert_matrices(spec, static_cast<std::int64_t>(l), 0, false).front().name;
    return checkpoint.has(one) || checkpoint.has(module_of(one) + ".weight_packed")
               ? PublishedLayout::one_by_one
               : PublishedLayout::fused;
  }
  return PublishedLayout::none;
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
    for (const std::string& scales : scale_names(tensor.name)) used.insert(scales);
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
  const std::int64_t D = spec.hidden;
  std::vector<LoraTarget> out;
  const auto add = [&](const char* group, const std::string& module, std::int64_t in,
                       std::int64_t width, std::int64_t layers, std::int64_t each = 1) {
    if (layers > 0) out.push_back({group, module, in, width, layers, layers * each});
  };
  for (const PublishedMatrix& matrix : attention_projections(spec, 0)) {
    const bool named = matrix.role == MatrixRole::kv_b;  // a target by its own name only
    add(named ? "kv_b_proj" : "attention", matrix.module_name(), matrix.columns, matrix.rows, all);
  }
  add("dense_mlp", "gate_proj", D, spec.dense_width, dense);
  add("dense_mlp", "up_proj", D, spec.dense_width, dense);
  add("dense_mlp", "down_proj", spec.dense_width, D, dense);
  const std::int64_t F = spec.expert_width, shared = spec.shared_width;
  add("shared_expert", "gate_proj", D, shared, moe);
  add("shared_expert", "up_proj", D, shared, moe);
  add("shared_expert", "down_proj", shared, D, moe);
  add("router", spec.family == Family::llama4 ? "router" : "gate", D, spec.experts, moe);
  add("experts", "experts.gate_up_proj", D, 2 * F, moe, spec.experts);
  add("experts", "experts.down_proj", F, D, moe, spec.experts);
  return out;
}

}  // namespace tailor
