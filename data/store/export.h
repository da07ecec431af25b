#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/file.h"
#include "data/store/store.h"

namespace tailor {

struct ExportOptions {
  bool bfloat16 = false;  ///< every matrix decoded, else as stored
  /// The multimodal checkpoint whose vision tower and projector are added as they are, since a
  /// store has none; empty: left out. It must be the one the store was made from.
  fs::path towers_from;
  /// Of a safetensors file; one tensor that is larger has a file of its own.
  std::int64_t shard_bytes_max = 5'000'000'000;
  /// `done` of `bytes` of the store, a few times a second.
  std::function<void(std::int64_t done, std::int64_t bytes, double seconds)> progress;
  std::function<bool()> stop;  ///< asked before every unit: true ends it, and nothing is left
};

struct ExportReport {
  std::int64_t tensors = 0, shards = 0;
  std::int64_t bytes = 0;  ///< of the tensors
  double seconds = 0;
  std::string format;  ///< as ExportPlan::format()
  std::vector<std::string> notes;
};

/// Writes a store as a Hugging Face checkpoint into the new folder `to`: safetensors shards with
/// their index, config.json with its quantization_config, and the tokenizer's files. ExportPlan
/// says what becomes of which matrix; docs/formats/weights.md has the layouts.
///
/// Holds one unit, and where it is decoded one of its matrices; every unit's header and hash are
/// checked. The folder appears whole or not at all: it is filled under another name beside `to`,
/// which the next attempt clears away if the process was killed.
/// Throws Error: usage (`to` is there, another export fills it, a format without a layout),
/// bad_file (a damaged unit), io (also for a full disk, before anything is read), stopped.
ExportReport export_store(const Store& store, const fs::path& to, const ExportOptions& options);

}  // namespace tailor
