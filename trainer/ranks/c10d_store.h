#pragma once

// For the .cpp files that see c10d only.

#include <torch/csrc/distributed/c10d/Store.hpp>

#include "trainer/ranks/rank_store.h"

namespace tailor {

/// The c10d store below a store of meet_ranks(), its keys under the run's prefix.
c10::intrusive_ptr<c10d::Store> c10d_store(RankStore& store);

}  // namespace tailor
