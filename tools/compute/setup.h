#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "recipes/recipe.h"
#include "trainer/models/decoder.h"

namespace tailor {

/// What train, eval and generate all begin with.

/// Throws for what this version knows but cannot do yet, each by its key: the weight stream
/// (Error{does_not_fit}), CUDA (Error{device}), several ranks, expert selections, MLflow.
void refuse_unsupported(const Recipe& recipe);

/// "auto" and "cpu" pass; "cuda" is an Error{device}.
void require_cpu(const std::string& device, const std::string& where);

/// "float32" or "bfloat16"; throws Error{usage} otherwise.
at::ScalarType compute_type(const std::string& name);

/// Threads of the blocks: `threads`, or all cores this process may use when 0.
int set_threads(int threads);

struct OpenedModel {
  fs::path folder;
  ModelSpec spec;
  std::string prefix;  ///< of the checkpoint's names: "" or "language_model."
  std::unique_ptr<Decoder> decoder;
  std::int64_t weight_bytes = 0;
  double load_seconds = 0;
};
/// Throws Error{does_not_fit} when the weights are larger than the memory that is free.
OpenedModel open_model(const fs::path& folder, at::ScalarType dtype);

}  // namespace tailor
