#pragma once

#include <memory>

#include "base/rank_env.h"
#include "trainer/ranks/rank_store.h"
#include "trainer/ranks/rank_watch.h"
#include "trainer/ranks/ranks.h"

namespace tailor {

/// What carries the bytes. NCCL moves what lies in device memory and leaves host memory to Gloo
/// beside it; Gloo alone moves host memory only.
enum class RankBackend { automatic, gloo, nccl };
/// "auto", "gloo", "nccl"; throws Error{usage} for another name.
RankBackend rank_backend(const std::string& name);

struct ConnectOptions {
  RankBackend backend = RankBackend::automatic;  ///< automatic: nccl with `cuda`, else gloo
  bool cuda = false;  ///< this rank computes on a CUDA device, its current one
  MeetOptions meet;
  WatchOptions watch;
};

/// Throws Error{usage} where the backend cannot move the memory of the device.
void require_backend(const ConnectOptions& options);

/// This process's side of the group of ranks that the environment speaks of, over c10d. Blocks
/// until all ranks are there; throws as meet_ranks() does, and Error{usage} for a backend that
/// cannot serve the device. Every rank is watched from then on (watch_of()).
std::unique_ptr<Ranks> connect_ranks(const RankEnv& env, const ConnectOptions& options = {});

/// The watch of a group that connect_ranks() made or of a channel of it; nullptr of any other
/// group.
RankWatch* watch_of(Ranks& ranks);

}  // namespace tailor
