#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/arena.h"
#include "data/checkpoint/model_spec.h"

namespace tailor {

/// The matrices of a layer that can carry LoRA factors, by the names people know.
enum class Projection {
  q_proj,
  k_proj,
  v_proj,
  q_a_proj,   ///< latent attention
  kv_a_proj,  ///< "kv_a_proj_with_mqa"
  q_b_proj,
  kv_b_proj,
  o_proj,
  gate_proj,
  up_proj,
  down_proj,
  shared_gate_proj,
  shared_up_proj,
  shared_down_proj,
  router,
  experts_gate_up,
  experts_down,
};
constexpr int kProjectionCount = 17;

/// One adapted matrix y = x W^T, or one for every expert of a layer:
///     y += scale * (x A^T) B^T        Hu et al., "LoRA", arXiv 2106.09685, eq. 3
/// In memory every factor is 2-D per expert: A [slots, rank, in], and B transposed,
/// B [slots, rank, out], so that both are read along their wide side. Gate and up of routed
/// experts share one A, which is what every server's layout can express. Experts that are not
/// chosen have no slot: no factors, gradients or moments anywhere.
struct LoraSite {
  std::string
      module;  ///< as in the model: "model.layers.0.self_attn.q_proj"; experts: "...experts"
  int layer = 0;
  Projection projection = Projection::q_proj;
  std::int64_t experts = 1;  ///< of the layer
  /// [experts] where an expert's factors are, by ascending expert; -1: it has none. Empty: all
  /// have, in order.
  std::vector<std::int32_t> slot_of;
  std::int64_t rank = 0, in = 0, out = 0;
  double scale = 1;  ///< alpha / rank, or alpha / sqrt(rank) with rsLoRA
  double alpha = 1;
  std::int64_t a_offset = 0;  ///< of A in the flat arena, in elements
  std::int64_t b_offset = 0;

  std::int64_t slots() const;  ///< experts with factors
  std::int64_t slot(std::int64_t expert) const {
    return slot_of.empty() ? expert : slot_of[static_cast<std::size_t>(expert)];
  }
  std::vector<std::int32_t> chosen() const;  ///< the experts with factors, ascending
  /// Leaves factors to `chosen` alone: ascending, below `experts`.
  void keep_experts(const std::vector<std::int32_t>& chosen);
  std::int64_t a_size() const { return slots() * rank * in; }
  std::int64_t b_size() const { return slots() * rank * out; }
  bool is_experts() const {
    return projection == Projection::experts_gate_up || projection == Projection::experts_down;
  }
};

/// The routed experts with factors, ascending, by layer; a layer that is not named has none. Null:
/// all of every layer.
using ChosenByLayer = std::optional<std::map<int, std::vector<std::int32_t>>>;

struct LoraOptions {
  std::int64_t rank = 8;
  double alpha = 16;
  double dropout = 0;
  bool rslora = false;
  std::int64_t expert_rank = 8;
  double expert_alpha = 16;
  /// attention, dense_mlp, shared_expert, experts, router, all, or module names as PEFT writes
  /// them. kv_b_proj only by its own name: servers fold it into attention and ignore factors on it.
  std::vector<std::string> targets;
  ChosenByLayer chosen_experts{};
};

/// Elements [begin, end) of the flat arenas.
struct FactorRange {
  std::int64_t begin = 0, end = 0;
  std::int64_t size() const { return end - begin; }
  bool empty() const { return begin >= end; }
};

/// The factors of a run: which matrices carry them and the flat float32 arena they live in.
/// Factors, their gradients and their moments are arenas of equal layout, so that the norm, AdamW,
/// a checkpoint and a shard are loops over one array.
class Adapter {
 public:
  /// Sites for `options.targets` on a model. Throws Error{usage} for a target that matches nothing,
  /// naming what this model has; B is zero, A uniform in +-1/sqrt(in) (PEFT's kaiming_uniform with
  /// a = sqrt 5) from Philox of (seed, module, index), so that a site's start does not depend on
  /// which other sites are trained. `home`: where the factors' arena is made. `filled`: called
  /// after every site, for who keeps only a part.
  static Adapter create(const ModelSpec& spec, const LoraOptions& options, std::uint64_t seed,
                        const ArenaHome& home = {},
                        const std::function<void(const Adapter&, const LoraSite&)>& filled = {});
  /// From sites read from a file; factors are zero.
  static Adapter from_sites(std::vector<LoraSite> sites, const LoraOptions& options,
                            const ArenaHome& home = {});

  std::span<const LoraSite> sites() const noexcept { return sites_; }
  const LoraSite* find(int layer, Projection projection) const;
  const LoraOptions& options() const noexcept { return options_; }

  /// Where the factors of a layer's routed experts lie, one after the other; empty for none.
  FactorRange experts_of(int layer) const;
  /// The layers that have such a range, and anything in it, from the first.
  std::vector<int> expert_layers() const;

  std::span<float> factors() noexcept { return arena_.as<float>(); }
  std::span<const float> factors() const noexcept { return arena_.as<float>(); }
  const Arena& arena() const noexcept { return arena_; }
  std::span<float> a_of(const LoraSite& site);
  std::span<float> b_of(const LoraSite& site);
  std::span<const float> a_of(const LoraSite& site) const;
  std::span<const float> b_of(const LoraSite& site) const;
  std::int64_t parameter_count() const { return static_cast<std::int64_t>(factors().size()); }

 private:
  void lay_out(const ArenaHome& home);

  LoraOptions options_;
  std::vector<LoraSite> sites_;
  std::vector<std::vector<int>> index_;  ///< [layer][projection] -> site, or -1
  Arena arena_;
};

/// Every matrix of the model that can carry factors, in the order the arena keeps them.
std::vector<LoraSite> all_sites(const ModelSpec& spec);

/// Those of them that `options` puts factors on, with their ranks and scales: what Adapter::create
/// begins with, and throws as it does. Offsets are not set.
std::vector<LoraSite> choose_sites(const ModelSpec& spec, const LoraOptions& options);

/// "attention: q_proj, k_proj, v_proj, o_proj x 30 layers (rank 8, 0.92 M parameters)", a line a
/// group: what a run prints, so that nobody trains less than they think.
std::vector<std::string> describe_sites(std::span<const LoraSite> sites);
inline std::vector<std::string> describe_sites(const Adapter& adapter) {
  return describe_sites(adapter.sites());
}

/// The last part of a module's name for a projection: "q_proj", "experts.gate_up_proj".
std::string_view projection_name(Projection projection);

}  // namespace tailor
