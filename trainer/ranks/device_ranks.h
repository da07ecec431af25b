#pragma once

#include <memory>

#include "trainer/ranks/rank_store.h"
#include "trainer/ranks/watched_ranks.h"

namespace tailor {

/// `host`, and beside it NCCL for what lies in the memory of this thread's current CUDA device:
/// all_gather, reduce_scatter and broadcast look where their memory is. What they read must be
/// ready when they are called, and what they write is when they return. `store` outlives it;
/// `prefix` is this communicator's own. Throws Error{usage} where this build has no NCCL.
std::unique_ptr<Ranks> device_ranks(std::unique_ptr<WatchedRanks> host, RankStore& store,
                                    const std::string& prefix);

}  // namespace tailor
