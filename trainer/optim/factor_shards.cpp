#include "trainer/optim/factor_shards.h"

#include <algorithm>

#include "base/error.h"

namespace tailor {

FactorShards::FactorShards(const Adapter& adapter, int rank, int ranks)
    : rank_(rank), ranks_(ranks) {
  TAILOR_CHECK(rank >= 0 && rank < ranks);
  std::int64_t end = 0;
  for (const LoraSite& site : adapter.sites()) {
    const auto at = static_cast<std::size_t>(site.layer);
    while (layers_.size() <= at) layers_.push_back({end, end});
    const std::int64_t begin = std::min(site.a_offset, site.b_offset);
    FactorRange& range = layers_[at];
    TAILOR_CHECK(at + 1 == layers_.size() && begin >= range.begin, "a layer lies in one piece");
    range.end = std::max({range.end, site.a_offset + site.a_size(), site.b_offset + site.b_size()});
    end = range.end;
  }
  TAILOR_CHECK(end == adapter.parameter_count());
}

FactorRange FactorShards::shared(int layer) const {
  const FactorRange all = this->layer(layer);
  return {all.begin, all.begin + all.size() / ranks_ * ranks_};
}

FactorRange FactorShards::part(int layer, int rank) const {
  const FactorRange all = this->layer(layer);
  const std::int64_t size = all.size() / ranks_;
  return {all.begin + rank * size, all.begin + (rank + 1) * size};
}

std::int64_t FactorShards::count() const {
  std::int64_t out = 0;
  for (int l = 0; l < layers(); ++l) out += mine(l).size() + tail(l).size();
  return out;
}

void FactorShards::drop_others(const Arena& arena, FactorRange range,
                               std::int64_t element_bytes) const {
  const auto drop = [&](std::int64_t begin, std::int64_t end) {
    begin = std::max(begin, range.begin);
    end = std::min(end, range.end);
    if (begin < end) arena.drop(begin * element_bytes, (end - begin) * element_bytes);
  };
  for (int l = 0; l < layers(); ++l) {
    if (layer(l).end <= range.begin || layer(l).begin >= range.end) continue;
    drop(shared(l).begin, mine(l).begin);
    drop(mine(l).end, shared(l).end);
  }
}

}  // namespace tailor
