#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "data/checkpoint/dtype.h"
#include "data/checkpoint/model_spec.h"
#include "data/gguf/header.h"
#include "data/gguf/tensors.h"

namespace tailor {

/// The GGUF file that MODEL names: itself, or the only one in a folder that has no config.json.
/// Throws Error{usage} where a folder holds several.
std::optional<fs::path> find_gguf_file(const fs::path& model);

/// A model in a GGUF file: its config, its matrices by their published names, its tokenizer.
///
/// Opening reads the head and checks that every tensor is there, has the shape that the values ask
/// for and that there are no others. Weights are read when they are asked for.
class GgufModel {
 public:
  static GgufModel open(const fs::path& path);

  const fs::path& path() const { return file_.path(); }
  const GgufHeader& header() const { return header_; }
  const Json& config() const { return config_; }
  const ModelSpec& spec() const { return spec_; }
  const std::vector<GgufMatrix>& matrices() const { return matrices_; }
  /// tokenizer.json and what belongs to it, by name; empty: the file has none.
  std::map<std::string, std::string> tokenizer_files() const;

  /// Rows [begin, end) of a matrix in Hugging Face's order, [end - begin, columns].
  void read_rows(const GgufMatrix& matrix, std::int64_t begin, std::int64_t end, float* out) const;
  /// Rows that should be read at a time: whole heads where a matrix is turned.
  static std::int64_t rows_at_once(const GgufMatrix& matrix);
  /// Lets go of the file's pages behind a matrix.
  void drop(const GgufMatrix& matrix) const;
  /// Element type of a matrix as unpack() writes it: the file's, F16 for quantised ones.
  Dtype unpacked_dtype(const GgufMatrix& matrix) const;

 private:
  explicit GgufModel(const fs::path& path) : file_(path) {}
  const GgufTensor& tensor_of(const GgufPlace& place) const;
  const std::byte* row_of(const GgufPlace& place, std::int64_t row) const;
  void check_tensors() const;

  MappedFile file_;
  GgufHeader header_;
  Json config_;
  ModelSpec spec_;
  std::vector<GgufMatrix> matrices_;
};

/// Writes the model into `folder`, which must be there and empty: config.json, the tokenizer's
/// files and safetensors shards with their index, in bounded memory. Throws Error{bad_file} for a
/// weight that is no finite number, naming its tensor and row.
void unpack_gguf(const GgufModel& model, const fs::path& folder);

/// The folder a GGUF file is unpacked into, in the user's cache, by the file's path, size and time;
/// unpacked now if that has not happened yet, by one process while others wait. Throws
/// Error{does_not_fit} before the first byte where the disk is too small.
fs::path unpacked_gguf(const fs::path& path);

}  // namespace tailor
