#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <span>

#include "data/checkpoint/model_spec.h"
#include "trainer/models/weights.h"
#include "trainer/ops.h"
#include "trainer/stream/tile_ring.h"
#include "trainer/workspace.h"

namespace tailor {

/// One routed expert's matrices as products x W want them.
struct ExpertWeights {
  ops::ProductWeights gate_up_DO;  ///< [D, 2F], gate then up
  ops::ProductWeights down_FD;     ///< [F, D]
};

/// The frozen base, part by part. A part is asked for when it is needed and let go right after: it
/// may lie in memory all the time (resident) or come from a store just ahead of its use (streamed).
/// Both give the same bits for one store. Tensors are in the blocks' dtype and valid while their
/// lease lives and the scratch stack is not released to before the call.
///
/// Parts are asked for in the order that begin() announces.
class FrozenWeights {
 public:
  enum class Pass {
    forward,          ///< layers up, then the head once
    train_kept,       ///< then per layer down: feed-forward, experts, attention
    train_recompute,  ///< as train_kept, but attention first
    generate,         ///< as forward; the head may be left out
    layers,           ///< layers up, and no head
  };
  using Lease = TileRing::Lease;

  virtual ~FrozenWeights() = default;

  virtual const ModelSpec& spec() const = 0;
  /// A pass begins. `again`: another one of its kind will follow, so reading ahead may go on.
  virtual void begin(Pass pass, bool again) = 0;

  /// Sets input norm, qkv and o of `out`.
  virtual Lease attention(std::int64_t layer, LayerWeights& out, TensorStack& scratch) = 0;
  /// Sets post norm, router, gate_up and down of `out`.
  virtual Lease feed_forward(std::int64_t layer, LayerWeights& out, TensorStack& scratch) = 0;

  /// Routed experts come in tiles of neighbours.
  struct ExpertTile {
    Lease lease;
    std::int64_t layer = 0, first = 0, count = 0;
  };
  virtual std::int64_t expert_tiles() const = 0;  ///< of a layer
  virtual ExpertTile experts(std::int64_t layer, std::int64_t tile) = 0;
  /// Expert `expert` of a tile that is leased, for products with `rows` rows.
  virtual ExpertWeights expert(const ExpertTile& tile, std::int64_t expert, std::int64_t rows,
                               TensorStack& scratch) = 0;

  virtual at::Tensor final_norm_D() = 0;
  /// The head comes in runs of vocabulary rows.
  struct HeadRun {
    Lease lease;
    at::Tensor w_VD;  ///< [rows of the run, D]
    std::int64_t first = 0;
  };
  virtual std::int64_t head_runs() const = 0;
  virtual HeadRun head(std::int64_t run, TensorStack& scratch) = 0;

  /// Rows of the embedding: out[t] = E[ids[t]]. Ids must lie within the vocabulary.
  virtual void embed(std::span<const std::int32_t> ids, const at::Tensor& out_TD) = 0;

  /// Of weights held in memory: resident ones and the ring's slots.
  virtual std::int64_t memory_bytes() const = 0;
  /// Since the beginning; a step's share is a difference.
  virtual RingCounters counters() const { return {}; }
};

/// All weights in memory, as load_weights() gives them.
std::unique_ptr<FrozenWeights> resident_weights(const ModelSpec& spec, ModelWeights weights);

}  // namespace tailor
