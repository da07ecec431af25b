#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/file.h"
#include "data/checkpoint/safetensors.h"

namespace tailor {

/// A tensor of a multimodal checkpoint that is not the language model's, and the file it lies in.
struct TowerTensor {
  std::string name;
  TensorInfo info;
  fs::path file;
};

/// The vision tower and the projector in the safetensors files of `model`, by name: all tensors but
/// those below "language_model.". Throws Error{bad_file}: there are none, or two of one name.
std::vector<TowerTensor> tower_tensors(const fs::path& model);

}  // namespace tailor
