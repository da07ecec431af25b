#pragma once

#include <memory>
#include <vector>

#include "trainer/stream/frozen_weights.h"

namespace tailor {

/// Frozen weights that note when they are asked for: a layer's time is what passes between its
/// first part being asked for and the next layer's. So the trainer's own step is taken apart
/// without a line in it that measures.
class TimedWeights final : public FrozenWeights {
 public:
  /// Seconds of one training pass.
  struct Passes {
    std::vector<double> forward, backward;  ///< of each layer, waiting for weights included
    double embedding = 0, head = 0;         ///< head and loss: forward and backward
    double all() const;
  };

  explicit TimedWeights(std::unique_ptr<FrozenWeights> weights);

  /// Of the last training pass, which ended when the trainer asked for the counters.
  const Passes& passes() const { return passes_; }

  const ModelSpec& spec() const override { return weights_->spec(); }
  void begin(Pass pass, bool again) override;
  Lease attention(std::int64_t layer, LayerWeights& out, TensorStack& scratch) override;
  Lease feed_forward(std::int64_t layer, LayerWeights& out, TensorStack& scratch) override;
  std::int64_t expert_tiles() const override { return weights_->expert_tiles(); }
  ExpertTile experts(std::int64_t layer, std::int64_t tile) override {
    return weights_->experts(layer, tile);
  }
  ExpertWeights expert(const ExpertTile& tile, std::int64_t expert, std::int64_t rows,
                       TensorStack& scratch) override {
    return weights_->expert(tile, expert, rows, scratch);
  }
  at::Tensor final_norm_D() override { return weights_->final_norm_D(); }
  std::int64_t head_runs() const override { return weights_->head_runs(); }
  HeadRun head(std::int64_t run, TensorStack& scratch) override;
  void embed(std::span<const std::int32_t> ids, const at::Tensor& out_TD) override {
    weights_->embed(ids, out_TD);
  }
  std::int64_t memory_bytes() const override { return weights_->memory_bytes(); }
  RingCounters counters() const override;

 private:
  enum class Part { none, embedding, forward, head, backward };

  /// The part that was going on ends now, and `part` of `layer` begins.
  void enter(Part part, std::int64_t layer) const;
  void meet(std::int64_t layer) const;

  std::unique_ptr<FrozenWeights> weights_;
  mutable Passes passes_;  // counters() is const, and ends a pass
  mutable Part part_ = Part::none;
  mutable std::int64_t layer_ = 0;
  mutable double since_ = 0;
};

}  // namespace tailor
