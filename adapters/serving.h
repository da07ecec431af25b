#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "adapters/peft_files.h"
#include "adapters/peft_reader.h"
#include "data/checkpoint/dtype.h"

namespace tailor {

/// Who an adapter is exported for. What each of them really accepts was read in their sources:
/// vLLM 0.33, SGLang 0.5.23, PEFT 0.17 to 0.21.
enum class Server { vllm, sglang, peft };
struct ServingTarget {
  Server server = Server::peft;
  std::string version = kPeftVersion;  ///< of PEFT, whose layouts changed with it
};
/// "vllm", "sglang", "peft", "peft@0.18.1". Throws Error{usage}.
ServingTarget serving_target_from_text(const std::string& text);

struct ServingOptions {
  ServingTarget target;
  /// For PEFT: one rank for all matrices and the scales in B, as vllm and sglang always get it.
  bool uniform = false;
  Dtype dtype = Dtype::f32;   ///< or bf16
  std::string base_model;     ///< recorded; empty: what the adapter says
  std::string module_prefix;  ///< "language_model." for the multimodal wrapper, else empty
  std::function<void(std::int64_t done, std::int64_t bytes)> progress = {};
};

struct ServingReport {
  std::int64_t tensors = 0, bytes = 0, rank = 0;
  double alpha = 0;
  std::string layout;              ///< "one_by_one", "straight", "swapped"; of routed experts
  std::vector<std::string> notes;  ///< what was changed to fit, and how to serve it
};

/// Throws Error{bad_file} for an adapter that the target loads and then applies wrongly or not at
/// all: each by the matrix's name, with what to do instead.
void check_serving_contract(const PeftReader& reader, const ModelSpec& spec,
                            const ServingTarget& target);

/// Writes the adapter into the new folder `to`, which appears whole or not at all, read back and
/// compared. For vLLM and SGLang: experts one by one, all of a layer, zero where untrained; one
/// rank for all matrices (rows of zeros fill up); scales folded into B where alpha / rank alone
/// does not say them; a list of targets; for vLLM rows of Llama 4's q and k in the order into which
/// it brings the base's. The products stay what they were but for that, and for the rounding of a
/// folded scale and of bf16. Throws as check_serving_contract(); Error{usage} where anything is
/// at `to`; Error{does_not_fit} where the disk is too small.
ServingReport export_adapter(const PeftReader& reader, const ModelSpec& spec,
                             const ServingOptions& options, const fs::path& to);

}  // namespace tailor
