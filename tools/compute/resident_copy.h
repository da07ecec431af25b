#pragma once

#include <memory>

#include "trainer/stream/store_weights.h"

namespace tailor {

/// A store's weights, all of them decoded into the blocks' dtype, where load_weights() puts those
/// of a checkpoint: what a run that reads no store computes with.
std::unique_ptr<FrozenWeights> resident_copy(StoreWeights& from, at::ScalarType dtype);

}  // namespace tailor
