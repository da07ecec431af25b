#pragma once

#include <optional>
#include <string>

#include "base/file.h"
#include "data/checkpoint/model_spec.h"

namespace tailor {

/// What is known of the model an adapter belongs to.
struct AdapterBase {
  fs::path folder;  ///< or the config file, where nothing else is there
  ModelSpec spec;
  std::string prefix;       ///< of its modules' names: "" or "language_model."
  std::string fingerprint;  ///< of its weights; empty: they are not here
};

/// Finds it by a folder, a store, a config.json, a repository in the local cache, or one whose
/// published config comes with Tailor. Reads no weights but the first of each attention matrix.
/// Throws Error{usage} when it is none of these, Error{bad_file} for a damaged one.
AdapterBase find_adapter_base(const std::string& model);

/// find_adapter_base of what an adapter's config names; nothing where that is not here or cannot be
/// read.
std::optional<AdapterBase> recorded_base(const std::string& model);

}  // namespace tailor
