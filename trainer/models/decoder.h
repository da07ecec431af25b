#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "adapters/lora.h"
#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/model_spec.h"
#include "trainer/models/head_loss.h"
#include "trainer/models/token_layout.h"
#include "trainer/optim/cast_factors.h"
#include "trainer/optim/factor_pager.h"
#include "trainer/stream/frozen_weights.h"

namespace tailor {

/// What a layer's forward pass leaves for its backward pass.
enum class Activations {
  kept,        ///< everything backward wants: fastest
  recomputed,  ///< the layer's input and its routing; the rest is computed again, to the same bits
};

struct TrainPass {
  double gradient_scale = 1;  ///< 1 / trained tokens of the whole step over all ranks
  Activations keep = Activations::kept;
  double dropout = 0;
  std::uint64_t seed = 0;
  std::uint64_t step = 0;
  bool another_follows = false;  ///< a pass like this one comes next: weights may be read ahead
  /// Set: gets the rows that each expert of each layer was given, [moe layers * E].
  std::vector<std::int64_t>* expert_rows = nullptr;
};

/// Everything a parity test looks at.
struct Trace {
  std::vector<at::Tensor> hidden_TD;  ///< input of each layer, then the stream after the final norm
  at::Tensor logits_TV;
  std::vector<std::vector<std::int32_t>> expert;  ///< per layer [T * K]; empty for dense layers
  std::vector<std::vector<double>> gate;
};

/// Told how a layer's tokens were routed: experts and the router's weights, both [T * K], of token
/// t's slot k at t * K + k, filler left out. Valid during the call.
using RoutingObserver = std::function<void(int layer, std::span<const std::int32_t> expert,
                                           std::span<const double> gate)>;

/// Keys, values and the position reached, of one sequence being generated.
struct GenerationState {
  std::vector<at::Tensor> kv;  ///< per layer [positions_max, cache_width]
  std::int64_t position = 0;
};

/// A frozen decoder with LoRA factors on top: forward and backward by the pooled layer pass. All
/// micro-batches of a step go through a layer before the next layer begins, so that a layer's
/// weights are met once forward and once backward, and routed experts see the rows of all
/// micro-batches at once. Written without autograd: what is kept and what is computed again is
/// decided here, and no graph ever crosses a layer.
class Decoder {
 public:
  /// dtype: float64 (gradient checks), float32 or bfloat16.
  static std::unique_ptr<Decoder> create(std::unique_ptr<FrozenWeights> weights,
                                         at::ScalarType dtype);
  virtual ~Decoder() = default;

  virtual const ModelSpec& spec() const = 0;
  virtual FrozenWeights& weights() = 0;
  /// The factors to add; null: the base model alone. Casts them to the blocks' dtype: call it again
  /// after every change (once a step). `adapter` must outlive its use.
  /// With a pager, that of this adapter, it flushes, and casts only what the pager has not.
  virtual void set_adapter(const Adapter* adapter) = 0;
  virtual const Adapter* adapter() const = 0;
  /// Tells `pager`, which must outlive its use, of every pass's way through the layers from now on,
  /// and keeps the cast factors in an arena of `home`; null: nobody, and in memory. Either way the
  /// decoder is without an adapter until set_adapter() comes.
  virtual void set_pager(FactorPager* pager, const ArenaHome& home) = 0;
  virtual CastFactors& cast_factors() = 0;
  /// Where what layers keep for their backward pass waits for it.
  virtual void keep_in(const ArenaHome& home) = 0;
  /// The cast factors, flat; a gradient check moves these.
  virtual at::Tensor factors() = 0;

  /// Loss of the step's tokens; adds factor gradients to `gradients`, flat, float32 (float64 for a
  /// float64 decoder).
  virtual LossResult forward_backward(const TokenInput& input, const TrainPass& pass,
                                      const at::Tensor& gradients) = 0;
  /// `another_follows`: so does another evaluation, and weights may be read ahead for it.
  virtual LossResult evaluate(const TokenInput& input, bool another_follows = false) = 0;
  virtual Trace trace(const TokenInput& input) = 0;
  /// A forward pass for the sake of its routing: every layer with routed experts is told to
  /// `observer`, the head is left out, and no layer's activations outlive it.
  virtual void observe_routing(const TokenInput& input, const RoutingObserver& observer,
                               bool another_follows = false) = 0;

  /// Most bytes of activations and scratch that were alive at once in any pass so far, paged out or
  /// not.
  virtual std::int64_t pass_bytes_peak() const = 0;

  virtual GenerationState start_generation(std::int64_t positions_max) = 0;
  /// Appends `ids` and returns the logits [V] after the last of them.
  virtual at::Tensor next_logits(GenerationState& state, std::span<const std::int32_t> ids) = 0;
};

}  // namespace tailor
