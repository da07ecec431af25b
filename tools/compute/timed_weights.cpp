#include "tools/compute/timed_weights.h"

#include <numeric>

#include "base/clock.h"

namespace tailor {

double TimedWeights::Passes::all() const {
  return std::accumulate(forward.begin(), forward.end(), 0.0) +
         std::accumulate(backward.begin(), backward.end(), 0.0) + embedding + head;
}

TimedWeights::TimedWeights(std::unique_ptr<FrozenWeights> weights) : weights_(std::move(weights)) {}

void TimedWeights::begin(Pass pass, bool again) {
  const bool trains = pass == Pass::train_kept || pass == Pass::train_recompute;
  if (trains) {
    const auto layers = static_cast<std::size_t>(spec().layer_count());
    passes_ = {std::vector<double>(layers), std::vector<double>(layers)};
    part_ = Part::embedding;
    since_ = seconds_now();
  } else {
    part_ = Part::none;
  }
  weights_->begin(pass, again);
}

void TimedWeights::enter(Part part, std::int64_t layer) const {
  const double now = seconds_now();
  const auto index = static_cast<std::size_t>(layer_);
  switch (part_) {
    case Part::none:
      return;
    case Part::embedding:
      passes_.embedding = now - since_;
      break;
    case Part::forward:
      passes_.forward[index] = now - since_;
      break;
    case Part::head:
      passes_.head = now - since_;
      break;
    case Part::backward:
      passes_.backward[index] = now - since_;
      break;
  }
  part_ = part;
  layer_ = layer;
  since_ = now;
}

void TimedWeights::meet(std::int64_t layer) const {
  if (part_ == Part::embedding) return enter(Part::forward, layer);
  if (part_ == Part::head) return enter(Part::backward, layer);
  if (layer != layer_) enter(part_, layer);
}

FrozenWeights::Lease TimedWeights::attention(std::int64_t layer, LayerWeights& out,
                                             TensorStack& scratch) {
  meet(layer);
  return weights_->attention(layer, out, scratch);
}
FrozenWeights::Lease TimedWeights::feed_forward(std::int64_t layer, LayerWeights& out,
                                                TensorStack& scratch) {
  meet(layer);
  return weights_->feed_forward(layer, out, scratch);
}
FrozenWeights::HeadRun TimedWeights::head(std::int64_t run, TensorStack& scratch) {
  if (part_ == Part::forward) enter(Part::head, 0);
  return weights_->head(run, scratch);
}
RingCounters TimedWeights::counters() const {
  if (part_ == Part::backward) enter(Part::none, 0);
  return weights_->counters();
}

}  // namespace tailor
