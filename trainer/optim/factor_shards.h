#pragma once

#include <cstdint>
#include <vector>

#include "adapters/lora.h"

namespace tailor {

/// Who of N ranks keeps which factors: of a layer's n factors, rank r those from r * (n / N) on,
/// n / N of them; the last n % N are kept by every rank, so that parts are of one size and a layer
/// is exchanged where it lies. A function of the adapter's layout and N alone.
class FactorShards {
 public:
  FactorShards(const Adapter& adapter, int rank, int ranks);

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  int layers() const { return static_cast<int>(layers_.size()); }
  /// All factors of a layer; may be empty.
  FactorRange layer(int layer) const { return layers_[static_cast<std::size_t>(layer)]; }
  /// The part of a layer that all ranks' parts make up, in rank order.
  FactorRange shared(int layer) const;
  FactorRange part(int layer, int rank) const;
  FactorRange mine(int layer) const { return part(layer, rank_); }
  /// What every rank keeps of a layer: fewer factors than ranks.
  FactorRange tail(int layer) const { return {shared(layer).end, this->layer(layer).end}; }
  /// Factors this rank keeps.
  std::int64_t count() const;

  /// Lets go of what of `range` is other ranks'. `element_bytes`: of the arena's values.
  void drop_others(const Arena& arena, FactorRange range, std::int64_t element_bytes) const;

 private:
  int rank_, ranks_;
  std::vector<FactorRange> layers_;
};

}  // namespace tailor
