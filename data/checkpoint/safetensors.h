#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/file.h"
#include "data/checkpoint/dtype.h"

namespace tailor {

/// Where one tensor lies in a safetensors file.
struct TensorInfo {
  Dtype dtype;
  std::vector<std::int64_t> shape;
  std::int64_t offset;  ///< from the start of the file
  std::int64_t bytes;

  std::int64_t elements() const;
  std::string shape_text() const;  ///< "[8, 64, 96]"
};

/// The header of a safetensors file (https://github.com/huggingface/safetensors, format section):
/// 8 bytes little-endian header length, JSON header, tensor data. Checked as strictly as the format
/// demands: header of at most 100 MB, offsets in order without holes or overlaps, sizes equal to
/// shape times element size, nothing past the end. Throws Error{bad_file} naming file and tensor.
struct SafetensorsHeader {
  std::map<std::string, TensorInfo> tensors;  ///< by name
  std::map<std::string, std::string> metadata;
};
SafetensorsHeader parse_safetensors_header(std::span<const std::byte> file, const fs::path& path);

/// What a safetensors file begins with: the length of the header, the header as JSON text, and
/// blanks until data is 8-byte aligned.
std::string safetensors_head(std::string header);
/// "model-00001-of-00003.safetensors", the name of shard `index` (from 0) of `count`.
std::string shard_name(std::size_t index, std::size_t count);

/// A tensor to write, row-major: borrowed bytes, or a function that makes them when their turn
/// comes, so that a file may be larger than memory.
struct TensorToWrite {
  std::string name;
  Dtype dtype;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;
  std::function<std::vector<std::byte>()> make = {};
};

/// Writes atomically. Tensors are laid out in the order given, data 8-byte aligned.
void write_safetensors(const fs::path& path, const std::vector<TensorToWrite>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace tailor
