#include "tools/step_memo.h"

#include <algorithm>
#include <array>

#include "base/log.h"
#include "base/text.h"
#include "recipes/choices.h"
#include "recipes/machine.h"
#include "tools/compute_program.h"
#include "tools/machine_facts.h"
#include "tools/paths.h"
#include "tools/planning.h"

namespace tailor {
namespace {

/// 2: the head once a step, micro-batches filled up.
constexpr int kMemoVersion = 2;

Json numbers(std::initializer_list<std::int64_t> values) { return Json(values); }

/// All that a step's time follows from, in words and numbers.
Json step_key(const Recipe& recipe, const ModelFacts& model) {
  const LoraCounts lora = count_lora(recipe, model);
  const BaseRecipe& base = recipe.base;
  Json attention = Json::array();
  for (const MatrixShape& shape : model.attention) attention.push_back({shape.out, shape.in});
  return {
      {"version", kMemoVersion},
      {"program", TAILOR_VERSION},
      {"processor", cpu_facts().name},
      {"cores", this_machine(".").cores},
      {"threads", recipe.compute.threads.value_or(0)},
      {"dtype", choice_word(recipe.compute.dtype)},
      {"keep", choice_word(recipe.compute.keep_activations)},
      {"model",
       numbers({model.layers, model.hidden, model.vocab, model.heads, model.qk_dim, model.v_dim,
                model.dense_layers, model.dense_width, model.moe_layers, model.experts, model.top_k,
                model.expert_width, model.shared_experts, model.tied_head ? 1 : 0})},
      {"published", choice_word(model.published)},
      {"published_bytes", model.published_bytes},
      {"attention", std::move(attention)},
      {"base",
       {choice_word(base.format), choice_word(base.non_expert_format),
        std::to_string(base.group_size.value_or(0)), choice_word(base.activations),
        recipe_store(recipe).empty() ? "published" : "store"}},
      {"budgets", numbers({base.device_memory.value_or(-1), base.host_memory.value_or(-1)})},
      {"lora", numbers({lora.attention, lora.dense_mlp, lora.shared_expert, lora.router,
                        lora.per_expert, lora.experts, recipe.lora.rank,
                        recipe.lora.expert_rank.value_or(0), recipe.lora.dropout > 0 ? 1 : 0})},
      {"expert_state", choice_word(recipe.lora.expert_state)},
      {"rows",
       numbers({recipe.global_batch_rows(), recipe.training.micro_batch_size,
                recipe.data.sequence_len, recipe.data.packing ? 1 : 0, recipe.machine.ranks})},
  };
}

}  // namespace

fs::path step_memo_path(const Recipe& recipe, const ModelFacts& model) {
  return cache_folder() / "steps" /
         (sha256_hex(step_key(recipe, model).dump()).substr(0, 32) + ".json");
}

std::optional<MeasuredStep> recall_step(const Recipe& recipe, const ModelFacts& model) {
  const fs::path path = step_memo_path(recipe, model);
  std::error_code error;
  if (!fs::exists(path, error)) return std::nullopt;
  try {
    return read_measured_step(read_json(path), path.string());
  } catch (const Error& broken) {
    log_warning("leaving " + path.string() + " aside: " + broken.parts().what);
    return std::nullopt;
  }
}

bool remember_step(const Recipe& recipe, const ModelFacts& model, const MeasuredStep& step) {
  if (step.busy_share > kBusyShare) {
    const auto before = recall_step(recipe, model);
    if (before && before->busy_share <= kBusyShare) return false;
  }
  const fs::path path = step_memo_path(recipe, model);
  make_folders(path.parent_path());
  write_atomically(path, to_json(step).dump(2) + "\n");
  return true;
}

void measure_step(const std::string& recipe, const std::vector<std::string>& overrides) {
  std::vector<std::string> words = {"calibrate", recipe};
  words.insert(words.end(), overrides.begin(), overrides.end());
  const int code = run_compute(std::move(words));
  if (code == 0) return;
  constexpr std::array kFaults = {Fault::usage,  Fault::bad_file, Fault::does_not_fit,
                                  Fault::device, Fault::io,       Fault::stopped};
  const auto fault = std::find_if(kFaults.begin(), kFaults.end(),
                                  [&](Fault known) { return static_cast<int>(known) == code; });
  throw Error(fault == kFaults.end() ? Fault::internal : *fault,
              {"measuring steps of " + recipe + " failed", "tailor calibrate " + recipe,
               "Its own message stands above. Without --probe the plan takes what is known."});
}

}  // namespace tailor
