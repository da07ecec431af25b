#pragma once

#include <ATen/ATen.h>

#include "adapters/lora.h"
#include "trainer/optim/factor_shards.h"

namespace tailor {

/// An adapter's factors in the dtype the blocks compute in, flat, in the adapter's layout.
class CastFactors {
 public:
  explicit CastFactors(at::ScalarType dtype) : dtype_(dtype) {}

  /// Where the copy is made from now on. What was cast before is gone.
  void move_to(ArenaHome home);
  /// Casts all factors of `adapter`, which must outlive its use here.
  void cast_all(const Adapter& adapter);
  /// Room for all factors of `adapter`, none of them cast yet.
  void prepare(const Adapter& adapter);
  /// Casts a range again, by the calling thread alone: ranges without a common element may be cast
  /// at the same time, and while other parts are read.
  void cast(FactorRange range) const;
  /// The adapter of the last cast_all(); null before that.
  const Adapter* adapter() const { return adapter_; }
  /// All of them, [parameter_count]. Undefined before cast_all().
  const at::Tensor& tensor() const { return tensor_; }

  /// As Arena has them. discard(): the range is cast again before it is read.
  void release(FactorRange range) const;
  void prefetch(FactorRange range) const;
  void discard(FactorRange range) const;
  /// The range as it lies in memory.
  std::span<std::byte> bytes(FactorRange range) const;
  void drop_others(const FactorShards& shards, FactorRange range) const;

 private:
  at::ScalarType dtype_;
  ArenaHome home_;
  const Adapter* adapter_ = nullptr;
  Arena arena_;
  at::Tensor tensor_;  ///< of arena_
};

}  // namespace tailor
