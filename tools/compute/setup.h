#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "data/store/store.h"
#include "recipes/plan.h"
#include "recipes/recipe.h"
#include "trainer/models/decoder.h"
#include "trainer/stream/store_weights.h"

namespace tailor {

/// What train, eval and generate all begin with.

/// Throws for what this version knows but cannot do yet, each by its key: CUDA (Error{device}),
/// MLflow.
void refuse_unsupported(const Recipe& recipe);

/// "auto" and "cpu" pass; "cuda" is an Error{device}.
void require_cpu(const std::string& device, const std::string& where);

/// "float32" or "bfloat16"; throws Error{usage} otherwise.
at::ScalarType compute_type(const std::string& name);

/// Threads of the blocks: `threads`, or all cores this process may use when 0.
int set_threads(int threads);

/// Where the frozen base comes from and how much of it stays in memory.
struct BaseRequest {
  fs::path store;          ///< of packed weights; empty: from the model's own folder
  bool pack = false;       ///< no store is named: pack one into the cache, in `formats`
  StoreFormats formats;    ///< of what is packed
  std::string model_name;  ///< for messages and the store's record
  /// Budgets of resident tiles, bytes; unset: all of the store stays in memory where it fits into
  /// what is free, else half of that.
  std::optional<std::int64_t> device_bytes, host_bytes;
  bool all_resident = false;  ///< the plan found that everything fits
  Ranks* ranks = nullptr;     ///< that share the store's tiles; opening is collective then
};

/// Whether a run's weights come from a store, packed where there is none: else the checkpoint is
/// read into memory, in the blocks' dtype.
bool wants_store(const Recipe& recipe, const Plan& plan);

/// Packs the base that a request with `pack` means into the cache, if it is not there.
void pack_base(const fs::path& folder, const BaseRequest& request);

struct OpenedModel {
  fs::path folder;
  ModelSpec spec;
  std::string prefix;         ///< of the checkpoint's names: "" or "language_model."
  std::string source;         ///< the published model, where `folder` is a store
  std::string stored_digest;  ///< SHA-256 of a store's tiles; empty without one
  std::unique_ptr<Decoder> decoder;
  std::optional<StreamFacts> stream;  ///< where the weights come from a store
  std::int64_t weight_bytes = 0;      ///< in memory
  double load_seconds = 0;
};
/// Opens a checkpoint, all of it in memory, or a store. Throws Error{does_not_fit} when a
/// checkpoint's weights are larger than the memory that is free.
OpenedModel open_model(const fs::path& folder, at::ScalarType dtype,
                       const BaseRequest& request = {});

/// A PEFT adapter for an opened model. Warns where it says that it was trained on another base.
Adapter open_adapter(const fs::path& folder, const OpenedModel& model);

/// "62 MB of 371 MB in memory, the rest is read from disk as it is used (io_uring, direct)".
std::string stream_text(const StreamFacts& facts);

}  // namespace tailor
