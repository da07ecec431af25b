#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "adapters/lora.h"
#include "base/file.h"
#include "trainer/optim/adamw.h"

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

/// Writes <checkpoints>/step-<N>/ holding state.safetensors (factors and both moments, float32) and
/// manifest.json (step, identity, layout, SHA-256 of the state). Made in a staging folder, synced,
/// then renamed: a checkpoint is whole or not there. Afterwards only the newest `keep` remain.
/// Everything else a step depends on is a function of the step number and the recipe. No update may
/// be pending (Error{internal}): a trainer that defers it is flushed first.
SavedCheckpoint save_checkpoint(const fs::path& checkpoints, std::int64_t step,
                                const Adapter& adapter, const AdamW& optimizer,
                                const RunIdentity& identity, std::int64_t keep);

/// Restores the newest checkpoint that is whole, and returns its step; nothing when there is none.
/// A damaged one is reported through `warn` and the one before it is tried. Throws Error{bad_file}
/// when there are checkpoints but none is whole, Error{usage} when they belong to other factors,
/// data or batch sizes than the recipe now asks for.
std::optional<SavedCheckpoint> load_newest_checkpoint(
    const fs::path& checkpoints, Adapter& adapter, AdamW& optimizer, const RunIdentity& identity,
    const std::function<void(const std::string&)>& warn);

}  // namespace tailor
