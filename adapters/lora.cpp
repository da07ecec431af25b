#include "adapters/lora.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>

#include "base/error.h"
#include "base/random.h"
#include "base/text.h"
#include "base/units.h"
#include "data/checkpoint/published.h"
#include "recipes/lora_targets.h"

namespace tailor {
namespace {

struct ProjectionRow {
  Projection projection;
  std::string_view group;  ///< the name a recipe uses
  std::string_view name;
};
constexpr std::array<ProjectionRow, kProjectionCount> kProjections = {{
    {Projection::q_proj, "attention", "q_proj"},
    {Projection::k_proj, "attention", "k_proj"},
    {Projection::v_proj, "attention", "v_proj"},
    {Projection::q_a_proj, "attention", "q_a_proj"},
    {Projection::kv_a_proj, "attention", "kv_a_proj_with_mqa"},
    {Projection::q_b_proj, "attention", "q_b_proj"},
    {Projection::kv_b_proj, "kv_b_proj", "kv_b_proj"},
    {Projection::o_proj, "attention", "o_proj"},
    {Projection::gate_proj, "dense_mlp", "gate_proj"},
    {Projection::up_proj, "dense_mlp", "up_proj"},
    {Projection::down_proj, "dense_mlp", "down_proj"},
    {Projection::shared_gate_proj, "shared_expert", "gate_proj"},
    {Projection::shared_up_proj, "shared_expert", "up_proj"},
    {Projection::shared_down_proj, "shared_expert", "down_proj"},
    {Projection::router, "router", "router"},
    {Projection::experts_gate_up, "experts", "experts.gate_up_proj"},
    {Projection::experts_down, "experts", "experts.down_proj"},
}};

const ProjectionRow& row_of(Projection projection) {
  return kProjections[static_cast<std::size_t>(projection)];
}

/// What a published matrix outside the routed experts is to an adapter; nothing for vectors.
std::optional<Projection> projection_of(MatrixRole role, bool moe) {
  switch (role) {
    case MatrixRole::q:
      return Projection::q_proj;
    case MatrixRole::k:
      return Projection::k_proj;
    case MatrixRole::v:
      return Projection::v_proj;
    case MatrixRole::q_a:
      return Projection::q_a_proj;
    case MatrixRole::kv_a:
      return Projection::kv_a_proj;
    case MatrixRole::q_b:
      return Projection::q_b_proj;
    case MatrixRole::kv_b:
      return Projection::kv_b_proj;
    case MatrixRole::o:
      return Projection::o_proj;
    case MatrixRole::router:
      return Projection::router;
    case MatrixRole::gate:
      return moe ? Projection::shared_gate_proj : Projection::gate_proj;
    case MatrixRole::up:
      return moe ? Projection::shared_up_proj : Projection::up_proj;
    case MatrixRole::down:
      return moe ? Projection::shared_down_proj : Projection::down_proj;
    default:
      return std::nullopt;
  }
}

bool matches(std::string_view target, const LoraSite& site) {
  const ProjectionRow& row = row_of(site.projection);
  std::string path = site.module;
  if (site.projection == Projection::experts_gate_up) path += ".gate_up_proj";
  if (site.projection == Projection::experts_down) path += ".down_proj";
  return target_means(target, {row.group, row.name, path, site.is_experts()});
}

}  // namespace

std::string_view projection_name(Projection projection) { return row_of(projection).name; }

std::int64_t LoraSite::slots() const {
  if (slot_of.empty()) return experts;
  return static_cast<std::int64_t>(slot_of.size()) -
         std::count(slot_of.begin(), slot_of.end(), std::int32_t{-1});
}

std::vector<std::int32_t> LoraSite::chosen() const {
  std::vector<std::int32_t> list;
  for (std::int32_t e = 0; e < experts; ++e) {
    if (slot(e) >= 0) list.push_back(e);
  }
  return list;
}

void LoraSite::keep_experts(const std::vector<std::int32_t>& chosen) {
  if (static_cast<std::int64_t>(chosen.size()) == experts) {
    slot_of.clear();
    return;
  }
  slot_of.assign(static_cast<std::size_t>(experts), -1);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    TAILOR_CHECK(chosen[i] >= 0 && chosen[i] < experts && (i == 0 || chosen[i] > chosen[i - 1]));
    slot_of[static_cast<std::size_t>(chosen[i])] = static_cast<std::int32_t>(i);
  }
}

std::vector<LoraSite> all_sites(const ModelSpec& spec) {
  std::vector<LoraSite> sites;
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    const bool moe = spec.layers[static_cast<std::size_t>(l)].moe;
    const auto add = [&](std::string module, Projection projection, std::int64_t in,
                         std::int64_t out) {
      LoraSite site;
      site.module = std::move(module);
      site.layer = static_cast<int>(l);
      site.projection = projection;
      site.in = in;
      site.out = out;
      if (site.is_experts()) site.experts = spec.experts;
      sites.push_back(std::move(site));
    };
    for (const auto& matrices : {attention_matrices(spec, l), feed_forward_matrices(spec, l)}) {
      for (const PublishedMatrix& matrix : matrices) {
        const auto projection = projection_of(matrix.role, moe);
        if (projection) add(module_of(matrix.name), *projection, matrix.columns, matrix.rows);
      }
    }
    if (!moe) continue;
    const auto expert = expert_matrices(spec, l, 0, true);  // gate, up, down
    const std::string& fused = expert[0].name;              // "...experts.gate_up_proj"
    const std::string module = fused.substr(0, fused.rfind('.'));
    add(module, Projection::experts_gate_up, expert[0].columns, expert[0].width);
    add(module, Projection::experts_down, expert[2].columns, expert[2].width);
  }
  std::stable_sort(sites.begin(), sites.end(), [](const LoraSite& a, const LoraSite& b) {
    return std::pair(a.layer, a.projection) < std::pair(b.layer, b.projection);
  });
  return sites;
}

std::vector<LoraSite> choose_sites(const ModelSpec& spec, const LoraOptions& options) {
  std::vector<LoraSite> chosen;
  std::set<std::string> used;
  for (LoraSite& site : all_sites(spec)) {
    bool wanted = false;
    for (const std::string& target : options.targets) {
      if (!matches(target, site)) continue;
      wanted = true;
      used.insert(target);
    }
    if (!wanted) continue;
    site.rank = site.is_experts() ? options.expert_rank : options.rank;
    site.alpha = site.is_experts() ? options.expert_alpha : options.alpha;
    if (site.is_experts() && options.chosen_experts) {
      const auto found = options.chosen_experts->find(site.layer);
      site.keep_experts(found == options.chosen_experts->end() ? std::vector<std::int32_t>()
                                                               : found->second);
    }
    const auto rank = static_cast<double>(site.rank);
    site.scale = site.alpha / (options.rslora ? std::sqrt(rank) : rank);
    chosen.push_back(std::move(site));
  }
  for (const std::string& target : options.targets) {
    if (used.contains(target)) continue;
    std::set<std::string> names;
    for (const LoraSite& site : all_sites(spec)) {
      names.insert(std::string(row_of(site.projection).group));
      names.insert(std::string(row_of(site.projection).name));
    }
    const std::vector<std::string> known(names.begin(), names.end());
    const std::string near = nearest_name(target, known);
    throw Error(Fault::usage, {"LoRA target '" + target + "' matches no matrix of this model",
                               "lora.targets, for architecture " + spec.architecture,
                               (near.empty() ? std::string() : "Did you mean '" + near + "'? ") +
                                   "This model has: " + join(known, ", ") + "."});
  }
  return chosen;
}

Adapter Adapter::create(const ModelSpec& spec, const LoraOptions& options, std::uint64_t seed,
                        const ArenaHome& home,
                        const std::function<void(const Adapter&, const LoraSite&)>& filled) {
  Adapter adapter = from_sites(choose_sites(spec, options), options, home);
  for (const LoraSite& site : adapter.sites_) {
    const std::uint64_t name =
        name_hash((site.module + "/" + std::string(row_of(site.projection).name)).c_str());
    const double bound = 1 / std::sqrt(static_cast<double>(site.in));
    // Numbered over all experts: one's start does not depend on which others are chosen.
    const auto each = static_cast<std::size_t>(site.rank * site.in);
    float* a = adapter.a_of(site).data();
    for (std::size_t e = 0; e < static_cast<std::size_t>(site.experts); ++e) {
      if (site.slot(static_cast<std::int64_t>(e)) < 0) continue;
      for (std::size_t i = e * each; i < (e + 1) * each; ++i) {
        *a++ = static_cast<float>((2 * random_unit(seed, RandomStream::lora_init, i, name) - 1) *
                                  bound);
      }
    }
    constexpr auto kBytes = static_cast<std::int64_t>(sizeof(float));
    adapter.arena_.release(site.a_offset * kBytes, site.a_size() * kBytes);
    if (filled) filled(adapter, site);
  }
  return adapter;
}

Adapter Adapter::from_sites(std::vector<LoraSite> sites, const LoraOptions& options,
                            const ArenaHome& home) {
  TAILOR_CHECK(!sites.empty());
  Adapter adapter;
  adapter.options_ = options;
  adapter.sites_ = std::move(sites);
  adapter.lay_out(home);
  return adapter;
}

// Sites that share their input lie with their A side by side (q, k, v; gate, up), so that one pass
// over the input serves all of them: A A A B B B. Routed experts come last in a layer, so that
// their factors are one range of the arena, which experts_of() names and paging moves.
void Adapter::lay_out(const ArenaHome& home) {
  std::sort(sites_.begin(), sites_.end(), [](const LoraSite& a, const LoraSite& b) {
    return std::pair(a.layer, static_cast<int>(a.projection)) <
           std::pair(b.layer, static_cast<int>(b.projection));
  });
  const auto input_of = [](const LoraSite& site) {
    switch (site.projection) {
      case Projection::k_proj:
      case Projection::v_proj:
      case Projection::q_a_proj:
      case Projection::kv_a_proj:
        return Projection::q_proj;
      case Projection::up_proj:
        return Projection::gate_proj;
      case Projection::shared_up_proj:
        return Projection::shared_gate_proj;
      default:
        return site.projection;
    }
  };
  std::int64_t offset = 0;
  for (std::size_t begin = 0; begin < sites_.size();) {
    std::size_t end = begin + 1;
    while (end < sites_.size() && sites_[end].layer == sites_[begin].layer &&
           input_of(sites_[end]) == input_of(sites_[begin])) {
      ++end;
    }
    for (std::size_t i = begin; i < end; ++i) {
      sites_[i].a_offset = offset;
      offset += sites_[i].a_size();
    }
    for (std::size_t i = begin; i < end; ++i) {
      sites_[i].b_offset = offset;
      offset += sites_[i].b_size();
    }
    begin = end;
  }
  arena_ = home.make(checked_multiply(offset, static_cast<std::int64_t>(sizeof(float))));
  index_.assign(static_cast<std::size_t>(sites_.back().layer) + 1,
                std::vector<int>(kProjectionCount, -1));
  for (std::size_t i = 0; i < sites_.size(); ++i) {
    index_[static_cast<std::size_t>(sites_[i].layer)]
          [static_cast<std::size_t>(sites_[i].projection)] = static_cast<int>(i);
  }
}

FactorRange Adapter::experts_of(int layer) const {
  FactorRange range;
  for (const Projection projection : {Projection::experts_gate_up, Projection::experts_down}) {
    const LoraSite* site = find(layer, projection);
    if (site == nullptr) continue;
    if (range.empty()) range = {site->a_offset, site->a_offset};
    TAILOR_CHECK(site->a_offset == range.end && site->b_offset == range.end + site->a_size());
    range.end = site->b_offset + site->b_size();
  }
  return range;
}

std::vector<int> Adapter::expert_layers() const {
  std::vector<int> layers;
  for (const LoraSite& site : sites_) {
    if (site.is_experts() && site.slots() > 0 && (layers.empty() || layers.back() != site.layer))
      layers.push_back(site.layer);
  }
  return layers;
}

const LoraSite* Adapter::find(int layer, Projection projection) const {
  if (static_cast<std::size_t>(layer) >= index_.size()) return nullptr;
  const int at = index_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(projection)];
  return at < 0 ? nullptr : &sites_[static_cast<std::size_t>(at)];
}

std::span<float> Adapter::a_of(const LoraSite& site) {
  return factors().subspan(static_cast<std::size_t>(site.a_offset),
                           static_cast<std::size_t>(site.a_size()));
}
std::span<float> Adapter::b_of(const LoraSite& site) {
  return factors().subspan(static_cast<std::size_t>(site.b_offset),
                           static_cast<std::size_t>(site.b_size()));
}
std::span<const float> Adapter::a_of(const LoraSite& site) const {
  return factors().subspan(static_cast<std::size_t>(site.a_offset),
                           static_cast<std::size_t>(site.a_size()));
}
std::span<const float> Adapter::b_of(const LoraSite& site) const {
  return factors().subspan(static_cast<std::size_t>(site.b_offset),
                           static_cast<std::size_t>(site.b_size()));
}

std::vector<std::string> describe_sites(std::span<const LoraSite> sites) {
  struct Group {
    std::vector<std::string> names;
    std::set<int> layers;
    std::int64_t rank = 0, parameters = 0, experts = 1;
    std::map<int, std::int64_t> slots;  ///< by layer
  };
  std::map<std::string, Group> groups;
  std::vector<std::string> order;
  for (const LoraSite& site : sites) {
    const ProjectionRow& row = row_of(site.projection);
    const std::string key(row.group);
    if (!groups.contains(key)) order.push_back(key);
    Group& group = groups[key];
    const std::string name(row.name);
    if (std::find(group.names.begin(), group.names.end(), name) == group.names.end())
      group.names.push_back(name);
    group.layers.insert(site.layer);
    group.rank = site.rank;
    group.experts = site.experts;
    group.slots[site.layer] = site.slots();
    group.parameters += site.a_size() + site.b_size();
  }
  std::vector<std::string> lines;
  for (const std::string& key : order) {
    const Group& group = groups[key];
    std::int64_t slots = 0;
    for (const auto& [layer, count] : group.slots) slots += count;
    const auto layers = static_cast<std::int64_t>(group.layers.size());
    std::string experts;
    if (slots < layers * group.experts) {
      const double mean = static_cast<double>(slots) / static_cast<double>(layers);
      experts = ", " + exact_text(std::round(10 * mean) / 10) + " of " +
                std::to_string(group.experts) + " experts on average";
    } else if (group.experts > 1) {
      experts = " of " + std::to_string(group.experts) + " experts";
    }
    lines.push_back(key + ": " + join(group.names, ", ") + " in " + std::to_string(layers) +
                    " layers" + experts + ", rank " + std::to_string(group.rank) + ", " +
                    count_text(group.parameters) + " parameters");
  }
  return lines;
}

}  // namespace tailor
