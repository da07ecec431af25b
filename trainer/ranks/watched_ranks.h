#pragma once

#include "trainer/ranks/rank_watch.h"
#include "trainer/ranks/ranks.h"

namespace tailor {

/// Ranks with a watch over them: what connect_ranks() makes.
class WatchedRanks : public Ranks {
 public:
  virtual RankWatch* watch() const = 0;
};

}  // namespace tailor
