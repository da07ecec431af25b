#pragma once

#include <functional>

#include "data/tokens/token_source.h"
#include "recipes/expert_choice.h"
#include "trainer/models/decoder.h"

namespace tailor {

/// Which of the data's tokens a scan counts.
enum class CountedTokens {
  all,      ///< every token of every document
  trained,  ///< those whose successor carries loss: whose output the loss is taken of
};

/// Counts a batch's routing into `load`, which must have a layer for each of the model's layers
/// with routed experts (see empty_load). Only counts are kept, so memory does not grow with data.
void count_routing(Decoder& decoder, const Batch& batch, CountedTokens counted,
                   bool another_follows, ExpertLoad& load);

/// All counts zero.
ExpertLoad empty_load(const ModelSpec& spec);

}  // namespace tailor
