#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/file.h"
#include "data/checkpoint/checkpoint.h"
#include "data/store/fingerprint.h"
#include "data/store/store.h"

namespace tailor {

/// How far the quantised weights of one layer are from the published ones.
struct LayerError {
  std::int64_t layer = 0;
  bool experts = false;      ///< of the routed experts; else attention, dense MLP, shared expert
  double squared_error = 0;  ///< summed over the layer's weights
  double squares = 0;        ///< of the published weights
  double absmax_squared_error = 0;  ///< INT4: what scales from the largest value would have given
  /// Root of squared error over squares.
  double relative() const;
};

struct PackProgress {
  std::int64_t units_done = 0, units = 0;
  std::int64_t bytes_done = 0, bytes = 0;           ///< of the store
  std::int64_t source_bytes_read = 0;               ///< by this process
  std::int64_t units_before = 0, bytes_before = 0;  ///< found done, from an earlier attempt
  double seconds = 0;                               ///< since this process began
  std::vector<LayerError> finished;  ///< layers that became complete since the last call
  std::string waiting_for;           ///< a shard that is not there yet (follow), or empty
};

struct PackOptions {
  StoreFormats formats;
  std::string source;  ///< the model's name as the user gave it, for messages
  int threads = 1;
  std::int64_t memory_bytes_max = std::int64_t{1} << 30;
  /// Shards are still arriving in the model's folder: wait for those that a unit needs.
  bool follow = false;
  /// Remove a shard when everything in it is in the store, on disk. Only with follow.
  bool delete_source = false;
  double poll_seconds = 1;
  std::function<void(const PackProgress&)> progress;  ///< about twice a second
  std::function<bool()> stop;                         ///< asked often: true ends it, resumable
};

struct PackReport {
  std::int64_t bytes = 0, source_bytes_read = 0, units = 0, units_before = 0;
  double seconds = 0;
  std::vector<LayerError> errors;
};

/// Packs the checkpoint in `model` into a store at `to`. Units are written in any order by several
/// threads; each is on disk before the journal says so, so that after a crash or a full disk the
/// same call goes on where it stopped and ends with the same bytes. Holds a few units and slices,
/// never a whole tensor. Throws Error: usage (`to` holds something else), bad_file, does_not_fit
/// (memory_bytes_max is too small for one unit), io (disk full, resumable), stopped.
PackReport pack_store(const fs::path& model, const fs::path& to, const PackOptions& options);

}  // namespace tailor
