#include "recipes/model_facts.h"

#include <algorithm>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "base/units.h"
#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/published.h"
#include "recipes/lora_targets.h"

namespace tailor {
namespace {

bool is_target(const LoraTargets& targets, const FactorMatrix& matrix) {
  const std::pair<const char*, bool> groups[] = {{"attention", targets.attention},
                                                 {"dense_mlp", targets.dense_mlp},
                                                 {"shared_expert", targets.shared_expert},
                                                 {"experts", targets.experts},
                                                 {"router", targets.router}};
  for (const auto& [group, wanted] : groups) {
    if (wanted && matrix.group == group) return true;
  }
  return std::any_of(
      targets.modules.begin(), targets.modules.end(), [&](const std::string& target) {
        return target_means(target, {matrix.group, matrix.name, matrix.path, matrix.routed});
      });
}

/// What config.json says of the stored form.
void read_published_form(const Json& config, ModelFacts& facts) {
  const Json* text = config.contains("text_config") ? &config.at("text_config") : &config;
  for (const Json* part : {text, &config}) {
    for (const char* key : {"dtype", "torch_dtype"}) {
      if (part->contains(key) && part->at(key) == "float32") facts.published_bytes = 4;
      if (part->contains(key)) break;
    }
    if (part->contains("quantization_config") && part->at("quantization_config").is_object()) {
      const Json& quant = part->at("quantization_config");
      if (quant.contains("quant_method") && quant.at("quant_method") == "fp8") {
        facts.published = BaseFormat::fp8;
      }
    }
  }
}

}  // namespace

std::int64_t ModelFacts::attention_parameters() const {
  std::int64_t total = 0;
  for (const MatrixShape& shape : attention) total += shape.parameters();
  return total;
}

std::int64_t ModelFacts::other_parameters() const {
  return layers * attention_parameters() + dense_layers * dense_mlp_parameters() +
         moe_layers * (shared_experts * expert_parameters() + hidden * experts);
}

std::int64_t ModelFacts::total_parameters() const {
  return routed_parameters() + other_parameters() + head_parameters() * (tied_head ? 1 : 2);
}

std::int64_t ModelFacts::active_parameters() const {
  return other_parameters() + moe_layers * top_k * expert_parameters() + head_parameters();
}

LoraCounts count_lora(const Recipe& recipe, const ModelFacts& model) {
  LoraCounts counts;
  std::int64_t routed = 0;
  for (const FactorMatrix& matrix : model.factors) {
    if (!is_target(recipe.lora.targets, matrix)) continue;
    if (matrix.routed) {
      TAILOR_CHECK(recipe.lora.expert_rank.has_value(), "resolve() the recipe first");
      routed += *recipe.lora.expert_rank * matrix.parameters();
      continue;
    }
    std::int64_t& count = matrix.group == "dense_mlp"       ? counts.dense_mlp
                          : matrix.group == "shared_expert" ? counts.shared_expert
                          : matrix.group == "router"        ? counts.router
                                                            : counts.attention;
    count += recipe.lora.rank * matrix.parameters();
  }
  if (routed > 0) {
    counts.per_expert = div_ceil(routed, model.moe_layers);
    counts.all_experts = model.experts * routed;
    const auto& chosen = recipe.lora.chosen_experts;
    counts.experts = chosen ? chosen->experts * counts.per_expert : counts.all_experts;
  }
  return counts;
}

double matrix_bytes(const ModelFacts& model, const MatrixShape& shape, BaseFormat format,
                    std::optional<int> group_size) {
  if (format == BaseFormat::as_is) format = model.published;
  const double parameters = static_cast<double>(shape.parameters());
  switch (format) {
    case BaseFormat::as_is:
    case BaseFormat::bf16:
      return parameters * (format == model.published ? model.published_bytes : 2.0);
    case BaseFormat::fp8:
      return parameters +
             4.0 * static_cast<double>(div_ceil(shape.out, 128) * div_ceil(shape.in, 128));
    case BaseFormat::nf4: {
      constexpr double kBits = 4 + 8.0 / 64 + 32.0 / (64 * 256);
      return parameters * kBits / 8;
    }
    case BaseFormat::int4:
      break;
  }
  std::int64_t group = group_size.value_or(0);
  if (group == 0) {
    for (const std::int64_t size :
         {std::int64_t{128}, std::int64_t{64}, std::int64_t{32}, shape.in}) {
      group = size;
      if (shape.in % size == 0) break;
    }
  }
  return static_cast<double>(shape.out *
                             (align_up(shape.in, 8) / 2 + 2 * div_ceil(shape.in, group)));
}

namespace {

void add_attention(const ModelSpec& spec, ModelFacts& facts) {
  for (const PublishedMatrix& matrix : attention_projections(spec, 0)) {
    facts.attention.push_back({matrix.rows, matrix.columns});
    facts.attention_names.push_back(matrix.module_name());
  }
  facts.attention_kept = spec.qkv_width() + spec.attention_width() + spec.hidden;
  if (spec.is_latent()) facts.attention_expanded = spec.query_width() + spec.attention_width();
}

void add_factors(const ModelSpec& spec, ModelFacts& facts) {
  const auto add = [&](std::string group, std::string name, const PublishedMatrix& matrix) {
    facts.factors.push_back({std::move(group), std::move(name), module_of(matrix.name), false,
                             matrix.rows, matrix.columns, 1});
  };
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    const bool moe = spec.layers[static_cast<std::size_t>(l)].moe;
    for (const PublishedMatrix& matrix : attention_projections(spec, l)) {
      const std::string name = matrix.module_name();
      add(matrix.role == MatrixRole::kv_b ? name : "attention", name, matrix);
    }
    for (const PublishedMatrix& matrix : feed_forward_matrices(spec, l)) {
      if (matrix.is_vector()) continue;
      const bool router = matrix.role == MatrixRole::router;
      add(router ? "router"
          : moe  ? "shared_expert"
                 : "dense_mlp",
          router ? "router" : matrix.module_name(), matrix);
    }
    if (!moe) continue;
    const auto expert = expert_matrices(spec, l, 0, true);  // gate, up, down
    for (const PublishedMatrix* matrix : {&expert[0], &expert[2]}) {
      facts.factors.push_back({"experts", "experts." + matrix->module_name(), matrix->name, true,
                               matrix->width, matrix->columns, matrix->width / matrix->rows});
    }
  }
}

}  // namespace

ModelFacts model_facts(const ModelSpec& spec, const std::string& name) {
  ModelFacts facts;
  facts.name = name;
  facts.layers = spec.layer_count();
  facts.hidden = spec.hidden;
  facts.vocab = spec.vocab;
  facts.heads = spec.heads;
  facts.qk_dim = spec.head_dim;
  facts.v_dim = spec.is_latent() ? spec.latent.value_dim : spec.head_dim;
  add_attention(spec, facts);
  add_factors(spec, facts);
  facts.moe_layers = spec.moe_layer_count();
  facts.dense_layers = facts.layers - facts.moe_layers;
  facts.dense_width = spec.dense_width;
  facts.tied_head = spec.tied_head;
  facts.routed = routed_model(spec);
  if (facts.moe_layers > 0) {
    facts.experts = spec.experts;
    facts.top_k = spec.experts_per_token;
    facts.expert_width = spec.expert_width;
    TAILOR_CHECK(spec.shared_width % spec.expert_width == 0,
                 "shared experts are as wide as routed ones");
    facts.shared_experts = spec.shared_width / spec.expert_width;
  }
  return facts;
}

ModelFacts model_facts(const Json& config, const std::string& where, const std::string& name) {
  ModelFacts facts = model_facts(model_spec_from_config(config, where), name);
  read_published_form(config, facts);
  return facts;
}

std::optional<fs::path> shipped_config(const std::string& repository,
                                       const fs::path& models_folder) {
  std::string file = repository;
  for (std::size_t at = file.find('/'); at != std::string::npos; at = file.find('/', at + 2)) {
    file.replace(at, 1, "--");
  }
  fs::path path = models_folder / (file + ".json");
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return std::nullopt;
  return path;
}

fs::path model_config_path(const std::string& base_model, const fs::path& models_folder) {
  try {
    return find_model_folder(base_model) / "config.json";
  } catch (const Error&) {
    const std::optional<fs::path> shipped = shipped_config(base_model, models_folder);
    if (!shipped) throw;
    return *shipped;
  }
}

ModelFacts read_model_facts(const std::string& base_model, const fs::path& models_folder) {
  const fs::path path = model_config_path(base_model, models_folder);
  return model_facts(read_json(path), path.string(), base_model);
}

}  // namespace tailor
