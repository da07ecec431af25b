#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/checkpoint/checkpoint.h"
#include "data/store/store.h"

namespace tailor {

struct VerifyOptions {
  int threads = 1;
  /// Also compare every matrix with this checkpoint, within the error its format can cause.
  const Checkpoint* against = nullptr;
  std::function<void(std::int64_t done, std::int64_t bytes, double seconds)> progress;
  std::function<bool()> stop;
};

struct VerifyReport {
  std::int64_t units = 0, bytes = 0;
  double seconds = 0;
  std::vector<std::string>
      problems;  ///< "layers/00003.tiles, offset 4096: layer 3, expert 17: ..."
};

/// Reads every unit of a store, past the page cache where the file system allows, and checks header
/// and hash. A damaged unit is a line of the report, not an error. Throws Error: io, stopped.
VerifyReport verify_store(const Store& store, const VerifyOptions& options);

}  // namespace tailor
