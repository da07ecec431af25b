#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "adapters/lora.h"
#include "base/file.h"
#include "trainer/optim/adamw.h"
#include "trainer/optim/factor_shards.h"
#include "trainer/ranks/ranks.h"

namespace tailor {

/// What must be the same for a run to go on from a checkpoint.
struct RunIdentity {
  std::string dataset;  ///< digest of the token stores
  std::int64_t seed = 0;
  std::int64_t rows_per_step = 0;
  bool shuffle = true;
};

struct SavedCheckpoint {
  fs::path folder;
  std::int64_t step = 0;  ///< steps completed
  std::int64_t bytes = 0;
  std::string sha256;  ///< of the state file
};

/// Whose part of a run's state this process has: of ShardedFactors, with the ranks it is over.
struct StateShare {
  Ranks& ranks;
  const FactorShards& shards;
};

/// Writes <checkpoints>/step-<N>/ holding state.safetensors (factors and both moments, float32) and
/// manifest.json (step, identity, layout, SHA-256 of the state). Made in a staging folder, synced,
/// then renamed: a checkpoint is whole or not there. Afterwards only the newest `keep` remain.
/// Everything else a step depends on is a function of the step number and the recipe. No update may
/// be pending (Error{internal}): a trainer that defers it is flushed first.
///
/// With `share` every rank writes its part, state-<rank>-of-<ranks>.safetensors, into the one
/// folder, which all must see, and rank 0 the manifest. Collective; a failure of one rank is one of
/// all, and leaves nothing. The digest returned is that of the manifest then.
SavedCheckpoint save_checkpoint(const fs::path& checkpoints, std::int64_t step,
                                const Adapter& adapter, const AdamW& optimizer,
                                const RunIdentity& identity, std::int64_t keep,
                                const StateShare* share = nullptr);

/// Restores the newest checkpoint that is whole, and returns its step; nothing when there is none.
/// A damaged one is reported through `warn` and the one before it is tried. Throws Error{bad_file}
/// when there are checkpoints but none is whole, Error{usage} when they belong to other factors,
/// data or batch sizes than the recipe now asks for.
///
/// With `share` only this rank's part is restored, whatever number of ranks saved it: one, fewer or
/// more. Collective; all ranks take the same checkpoint.
std::optional<SavedCheckpoint> load_newest_checkpoint(
    const fs::path& checkpoints, Adapter& adapter, AdamW& optimizer, const RunIdentity& identity,
    const std::function<void(const std::string&)>& warn, const StateShare* share = nullptr);

}  // namespace tailor
