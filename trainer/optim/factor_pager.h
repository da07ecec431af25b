#pragma once

#include <cstddef>

#include "adapters/lora.h"

namespace tailor {

/// What stands behind factors that are not all in memory or not all up to date. A decoder tells it
/// of its way through the layers and finds a layer's cast factors ready, and its gradients zero,
/// when it needs them.
class FactorPager {
 public:
  enum class Way { forward, backward };

  virtual ~FactorPager() = default;
  /// Returns once the layer's cast factors are those of this pass (and, on the way back, its
  /// routed experts' gradients are zero). Throws what stopped them from becoming so.
  virtual void before_layer(int layer, Way way) = 0;
  /// The layer's factors and gradients are not needed soon.
  virtual void after_layer(int layer, Way way) noexcept = 0;
  /// Makes the decoder's cast factors of `adapter`, all but what comes with each layer, when the
  /// decoder begins to use them.
  virtual void first_cast(const Adapter& adapter) = 0;
  /// Returns once nothing is left to do: factors, moments and cast factors are of the last step.
  virtual void flush() = 0;
};

/// A pass's stay in a layer: before_layer() at its beginning, after_layer() at its end. Without a
/// pager, nothing.
class LayerVisit {
 public:
  LayerVisit(FactorPager* pager, std::size_t layer, FactorPager::Way way)
      : pager_(pager), layer_(static_cast<int>(layer)), way_(way) {
    if (pager_ != nullptr) pager_->before_layer(layer_, way_);
  }
  ~LayerVisit() {
    if (pager_ != nullptr) pager_->after_layer(layer_, way_);
  }
  LayerVisit(const LayerVisit&) = delete;
  LayerVisit& operator=(const LayerVisit&) = delete;

 private:
  FactorPager* pager_;
  int layer_;
  FactorPager::Way way_;
};

}  // namespace tailor
