#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "data/checkpoint/model_spec.h"
#include "data/store/layout.h"

namespace tailor {

/// Which layers of a model `text` asks for: "2", so many, or "0,1" and "0-3,7", these. So many are
/// the first of each kind the model has (dense, mixture of experts), as far as they go, then the
/// earliest others, in the model's order; a list may name a layer more than once.
/// Throws Error{usage}: not of this form, none, more than there are, a layer the model has not.
std::vector<std::int64_t> choose_layers(const ModelSpec& spec, const std::string& text);

/// `config` for a model of `layers` alone: num_hidden_layers and what tells the layers apart are
/// changed, so that model_spec_from_config() gives layer layers[i] of the whole model at i.
Json config_of_layers(const Json& config, const std::vector<std::int64_t>& layers,
                      const std::string& where);

struct SynthesisProgress {
  std::int64_t bytes_done = 0, bytes = 0;
  std::int64_t bytes_before = 0;  ///< found done, from an earlier attempt
  double seconds = 0;             ///< since this process began
};

struct SynthesisOptions {
  /// FormatChoice::as_is means bf16 here.
  StoreFormats formats;
  std::uint64_t seed = 0;
  int threads = 1;
  std::function<void(const SynthesisProgress&)> progress;  ///< about twice a second
  std::function<bool()> stop;                              ///< asked often: true ends it, resumable
};

struct SynthesisReport {
  std::int64_t bytes = 0, units = 0, units_before = 0;
  double seconds = 0;
};

/// Writes a store of random weights (SyntheticMatrix) at `to`, with the matrices that layers
/// `layers` of the model of `config` have, its vocabulary and its final norm: what a true store of
/// that model holds, byte for byte in size and place, for measuring without its weights. The same
/// bytes for any number of threads. Norms, routers, embedding and head are bf16. No tokenizer.
///
/// Memory: 1 MiB a thread, whatever the matrices' sizes. A run that ends early leaves a folder
/// that the same call goes on with. Throws Error: usage (`to` holds something else, or a whole
/// store), bad_file (config), io (no room: before anything is written, and nothing is left behind),
/// stopped.
SynthesisReport synthesise_store(const Json& config, const std::vector<std::int64_t>& layers,
                                 const fs::path& to, const SynthesisOptions& options);

}  // namespace tailor
