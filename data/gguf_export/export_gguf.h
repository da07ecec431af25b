#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/file.h"
#include "data/gguf/blocks.h"

namespace tailor {

struct GgufExportOptions {
  GgmlType type = GgmlType::f16;  ///< of matrices: f32, f16, bf16 or q8_0
  std::string name;               ///< for people; empty: the folder's
  int threads = 1;
  std::function<bool()> stop;  ///< polled; true ends the export, nothing stays behind
  std::function<void(std::int64_t bytes_done, std::int64_t bytes, double seconds)> progress;
};

struct GgufExportReport {
  std::int64_t bytes = 0, tensors = 0, source_bytes_read = 0;
  double seconds = 0;
  std::string architecture;        ///< llama.cpp's name
  std::vector<std::string> notes;  ///< what to know before it is served
};

/// Writes the checkpoint in `model` as one GGUF file for llama.cpp: a temporary file beside `to`,
/// which then takes its name. Matrices in any form that store/source_form.h reads become
/// `options.type`; norms, biases and routers float32, and float16 rows that q8_0's blocks of 32 do
/// not divide. Memory: a few MB a thread, and an expert's slice where experts lie in one tensor
/// with inputs first.
///
/// Throws Error{usage}: `to` is there, what llama.cpp would not run; Error{bad_file}: the
/// checkpoint or a weight that the type cannot hold; Error{does_not_fit}: the disk, before anything
/// is read; Error{io}; Error{stopped}.
GgufExportReport export_gguf(const fs::path& model, const fs::path& to,
                             const GgufExportOptions& options);

}  // namespace tailor
