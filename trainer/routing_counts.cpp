#include "trainer/routing_counts.h"

#include <algorithm>

#include "base/error.h"
#include "trainer/filled_batch.h"
#include "trainer/trainer.h"

namespace tailor {

ExpertLoad empty_load(const ModelSpec& spec) {
  ExpertLoad load;
  load.experts_per_token = spec.experts_per_token;
  const auto E = static_cast<std::size_t>(spec.experts);
  for (std::size_t l = 0; l < spec.layers.size(); ++l) {
    if (!spec.layers[l].moe) continue;
    load.layers.push_back({static_cast<std::int64_t>(l), std::vector<std::int64_t>(E, 0),
                           std::vector<double>(E, 0.0)});
  }
  return load;
}

void count_routing(Decoder& decoder, const Batch& batch, CountedTokens counted,
                   bool another_follows, ExpertLoad& load) {
  const auto counts = [&](std::size_t token) {
    return counted == CountedTokens::all || batch.target[token] >= 0;
  };
  std::int64_t tokens = 0;
  for (std::size_t t = 0; t < batch.ids.size(); ++t) tokens += counts(t) ? 1 : 0;
  const auto K = static_cast<std::size_t>(load.experts_per_token);
  const FilledBatch filled(batch);
  decoder.observe_routing(
      filled.input(),
      [&](int layer, std::span<const std::int32_t> expert, std::span<const double> gate) {
        const auto mine = std::find_if(load.layers.begin(), load.layers.end(),
                                       [&](const LayerLoad& l) { return l.layer == layer; });
        TAILOR_CHECK(mine != load.layers.end() && expert.size() == batch.ids.size() * K &&
                     gate.size() == expert.size());
        for (std::size_t slot = 0; slot < expert.size(); ++slot) {
          if (!counts(slot / K)) continue;
          const auto e = static_cast<std::size_t>(expert[slot]);
          ++mine->tokens[e];
          mine->gate[e] += gate[slot];
        }
      },
      another_follows);
  load.tokens += tokens;
}

}  // namespace tailor
