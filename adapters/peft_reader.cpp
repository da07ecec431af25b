#include "adapters/peft_reader.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace tailor {
PeftReader::PeftReader(const fs::path& folder, const ModelSpec& spec)
    : spec_(spec), folder_(folder), config_(folder_.config()) {
  for (LoraSite& site : all_sites(spec_)) {
    const bool found = site.is_experts() ? find_experts(site) : find_plain(site);
    if (!found) continue;
    site.scale = config_.scale(site.alpha, site.rank);
    sites_.push_back(site);
  }
  refuse_left_over();
  options_.rank = config_.rank;
  options_.alpha = config_.alpha;
  options_.rslora = config_.rslora;
}

void PeftReader::refuse(const std::string& what, const std::string& name,
                        const std::string& mend) const {
  throw Error(Fault::bad_file,
              {what, weights_path().string() + (name.empty() ? "" : ", " + name), mend});
}

void PeftReader::need_rank(std::int64_t rank, const std::string& module) const {
  const std::int64_t said = config_.rank_of(module);
  if (said == rank) return;
  refuse("factors of '" + module + "' have rank " + std::to_string(rank) +
             ", adapter_config.json says " + std::to_string(said),
         module,
         "Correct r or rank_pattern in adapter_config.json, if you know that the scale was alpha "
         "/ " +
             std::to_string(rank) + " in training; else save the adapter again.");
}

// ---------------------------------------------------------------- which factors are whose

const StoredPair* PeftReader::find(const std::string& module) {
  const StoredPair* pair = folder_.find(module);
  if (pair != nullptr) used_.insert(module);
  return pair;
}

void PeftReader::need_shape(const TensorInfo& factor, std::int64_t rows, std::int64_t columns,
                            const std::string& name) const {
  if (rows_of(factor) == rows && columns_of(factor) == columns) return;
  refuse("factor has shape " + factor.shape_text() + ", the model asks for [" +
             std::to_string(rows) + ", " + std::to_string(columns) + "]",
         name, "This adapter belongs to another base model.");
}

bool PeftReader::find_plain(LoraSite& site) {
  const StoredPair* pair = find(site.module);
  if (pair == nullptr) return false;
  site.rank = rows_of(pair->a);
  site.alpha = config_.alpha_of(site.module);
  need_shape(pair->a, site.rank, site.in, site.module + ".lora_A");
  need_shape(pair->b, site.out, site.rank, site.module + ".lora_B");
  need_rank(site.rank, site.module);
  forms_[{site.layer, site.projection}] = {Form::plain, site.module};
  return true;
}

/// Name of the fused pair of gate_up or down, or nothing. PEFT wraps the parameters of a module
/// one in another: the first is "base_layer", unless it is the only one. Gate_up alone therefore
/// has the name that down has beside it, and its shapes tell it: 2 F is never F.
std::string PeftReader::fused_key(const std::string& module, bool gate_up) const {
  const std::string inner = module + ".base_layer";
  if (folder_.find(inner) != nullptr) {
    if (gate_up) return inner;
    return folder_.find(module) != nullptr ? module : std::string();
  }
  const StoredPair* alone = folder_.find(module);
  if (alone == nullptr) return {};
  const std::int64_t a_side = columns_of(alone->a), b_side = rows_of(alone->b);
  const std::int64_t D = spec_.hidden, wide = 2 * spec_.expert_width;
  const bool is_gate_up = (a_side == D && b_side == wide) || (a_side == wide && b_side == D);
  return is_gate_up == gate_up ? module : std::string();
}

bool PeftReader::find_experts(LoraSite& site) {
  const bool gate_up = site.projection == Projection::experts_gate_up;
  const std::string key = fused_key(site.module, gate_up);
  if (!key.empty()) {
    find_fused(*find(key), key, site);
    return true;
  }
  if (folder_.find(site.module + ".0." + (gate_up ? "gate_proj" : "down_proj")) == nullptr)
    return false;
  if (gate_up) {
    find_each_gate_up(site);
  } else {
    find_each_down(site);
  }
  return true;
}

void PeftReader::find_fused(const StoredPair& pair, const std::string& key, LoraSite& site) {
  const std::int64_t E = site.experts;
  const auto columns = [&](bool gate_up) {
    const StoredPair* other = folder_.find(fused_key(site.module, gate_up));
    return other == nullptr ? std::int64_t{0} : columns_of(other->a);
  };
  const ExpertLayout layout =
      detect_expert_layout(spec_, columns(true), columns(false), config_.version, key);
  if (rows_of(pair.a) % E != 0) {
    refuse("factor A has " + std::to_string(rows_of(pair.a)) + " rows, which " + std::to_string(E) +
               " experts do not divide",
           key, "This adapter belongs to another base model.");
  }
  site.rank = rows_of(pair.a) / E;
  const std::string parameter =
      site.module +
      (site.projection == Projection::experts_gate_up ? ".gate_up_proj" : ".down_proj");
  site.alpha = config_.alpha_of(parameter);
  const bool swapped = layout == ExpertLayout::swapped;
  const std::int64_t wide_a = swapped ? site.out : site.in, wide_b = swapped ? site.in : site.out;
  need_shape(pair.a, E * site.rank, wide_a, key + ".lora_A");
  need_shape(pair.b, wide_b, site.rank * E, key + ".lora_B");
  need_rank(site.rank, parameter);
  forms_[{site.layer, site.projection}] = {swapped ? Form::swapped : Form::straight, key};
}

const StoredPair& PeftReader::expert_pair(const LoraSite& site, std::int64_t expert,
                                          const char* projection, std::int64_t in,
                                          std::int64_t out) {
  const std::string name = site.module + "." + std::to_string(expert) + "." + projection;
  const StoredPair* pair = find(name);
  if (pair == nullptr) {
    refuse("factors of '" + name + "' are missing", "",
           "Every expert of a layer needs factors; those that were not trained are zero.");
  }
  need_shape(pair->a, rows_of(pair->a), in, name + ".lora_A");
  need_shape(pair->b, out, rows_of(pair->a), name + ".lora_B");
  const bool down = site.projection == Projection::experts_down;
  const std::string first = site.module + (down ? ".0.down_proj" : ".0.gate_proj");
  if (config_.alpha_of(name) != config_.alpha_of(first)) {
    throw Error(Fault::bad_file,
                {"alpha_pattern gives '" + name + "' another alpha than '" + first + "'",
                 config_path().string(), "Scale the B of each expert so that one alpha fits all."});
  }
  return *pair;
}

void PeftReader::find_each_down(LoraSite& site) {
  for (std::int64_t e = 0; e < site.experts; ++e) {
    const StoredPair& pair = expert_pair(site, e, "down_proj", site.in, site.out);
    if (e == 0) site.rank = rows_of(pair.a);
    need_shape(pair.a, site.rank, site.in, site.module + " expert " + std::to_string(e));
    need_rank(site.rank, site.module + "." + std::to_string(e) + ".down_proj");
  }
  site.alpha = config_.alpha_of(site.module + ".0.down_proj");
  forms_[{site.layer, site.projection}] = {Form::each_down, site.module};
}

/// Gate and up with one A become one site of that rank; with two, one of the summed rank whose B
/// is block-diagonal. The scale stays what it was for each.
void PeftReader::find_each_gate_up(LoraSite& site) {
  const std::int64_t F = site.out / 2;
  bool shared = true;
  std::int64_t rank = 0;
  for (std::int64_t e = 0; e < site.experts; ++e) {
    const StoredPair& gate = expert_pair(site, e, "gate_proj", site.in, F);
    const StoredPair& up = expert_pair(site, e, "up_proj", site.in, F);
    if (e == 0) rank = rows_of(gate.a);
    if (rows_of(gate.a) != rank || rows_of(up.a) != rank) {
      refuse("gate and up factors of the experts differ in rank", site.module,
             "Pad them with zeros to one rank.");
    }
    const std::string expert = site.module + "." + std::to_string(e);
    need_rank(rank, expert + ".gate_proj");
    need_rank(rank, expert + ".up_proj");
    shared = shared && folder_.same_values(gate.a, up.a);
  }
  site.rank = shared ? rank : 2 * rank;
  site.alpha = config_.alpha_of(site.module + ".0.gate_proj") * (shared           ? 1
                                                                 : config_.rslora ? std::sqrt(2.0)
                                                                                  : 2.0);
  forms_[{site.layer, site.projection}] = {
      shared ? Form::each_gate_up_shared : Form::each_gate_up_apart, site.module};
}

void PeftReader::refuse_left_over() const {
  for (const auto& [module, pair] : folder_.pairs()) {
    if (used_.contains(module)) continue;
    refuse(
        "factors of '" + module + "' belong to no matrix of this model", "",
        "This adapter belongs to another base model, or adapts something Tailor does not train.");
  }
}

// ---------------------------------------------------------------- numbers

void PeftReader::read(const LoraSite& site, std::int64_t first, std::int64_t count, float* a,
                      float* b) const {
  const auto& [form, module] = forms_.at({site.layer, site.projection});
  const std::int64_t rank = site.rank, E = site.experts;
  const auto pair = [&, &name = module](const std::string& rest = {}) -> const StoredPair& {
    return *folder_.find(name + rest);
  };
  switch (form) {
    case Form::plain:
      folder_.rows(pair().a, 0, rank, a);
      folder_.unfold(pair().b, rank, 1, 0, 1, b);
      return;
    case Form::straight:
      folder_.rows(pair().a, first * rank, count * rank, a);
      folder_.unfold(pair().b, rank, E, first, count, b);
      return;
    case Form::swapped:
      folder_.unfold(pair().b, rank, E, first, count, a);
      folder_.rows(pair().a, first * rank, count * rank, b);
      return;
    case Form::each_down:
      for (std::int64_t e = 0; e < count; ++e) {
        const StoredPair& one = pair("." + std::to_string(first + e) + ".down_proj");
        folder_.rows(one.a, 0, rank, a + e * rank * site.in);
        folder_.unfold(one.b, rank, 1, 0, 1, b + e * rank * site.out);
      }
      return;
    case Form::each_gate_up_shared:
    case Form::each_gate_up_apart:
      break;
  }
  const bool shared = form == Form::each_gate_up_shared;
  const std::int64_t F = site.out / 2, each = shared ? rank : rank / 2;
  std::vector<float> half(static_cast<std::size_t>(each * F));
  for (std::int64_t e = 0; e < count; ++e) {
    float* to_a = a + e * rank * site.in;
    float* to_b = b + e * rank * site.out;
    std::fill_n(to_b, rank * site.out, 0.0F);
    for (const bool up : {false, true}) {
      const StoredPair& one =
          pair("." + std::to_string(first + e) + (up ? ".up_proj" : ".gate_proj"));
      const std::int64_t begin = up && !shared ? each : 0;
      if (!up || !shared) folder_.rows(one.a, 0, each, to_a + begin * site.in);
      folder_.unfold(one.b, each, 1, 0, 1, half.data());
      for (std::int64_t r = 0; r < each; ++r) {
        std::copy_n(half.data() + r * F, F, to_b + (begin + r) * site.out + (up ? F : 0));
      }
    }
  }
}

LoadedFactors PeftReader::read(const LoraSite& site) const {
  LoadedFactors factors{std::vector<float>(static_cast<std::size_t>(site.a_size())),
                        std::vector<float>(static_cast<std::size_t>(site.b_size()))};
  read(site, 0, site.experts, factors.a.data(), factors.b.data());
  return factors;
}

}  // namespace tailor
