#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/checkpoint/safetensors.h"

namespace tailor {

/// The folder of a model: `base_model` itself when it is a folder, else the newest snapshot of that
/// repository in the local Hugging Face cache ($HF_HUB_CACHE, $HF_HOME/hub,
/// ~/.cache/huggingface/hub), else Error{usage} with the download command. A GGUF file, or a folder
/// of one and no config.json, is unpacked into Tailor's cache first: that folder (gguf/model.h).
fs::path find_model_folder(const std::string& base_model);

/// Tensors of a Hugging Face checkpoint by their published names, over one or many safetensors
/// shards. Opening reads the headers only; bytes are memory-mapped and read when touched.
///
/// Names are as in the text model: a `language_model.` prefix of a multimodal wrapper is taken off,
/// and tensors of other towers are not listed.
class Checkpoint {
 public:
  struct Tensor {
    TensorInfo info;
    std::size_t shard;
    std::string stored_name;  ///< with the wrapper's prefix, as in the file
  };

  /// Throws Error{bad_file}: no safetensors file, a shard named by the index is missing, an index
  /// that names other tensors than the shards hold, pickle files only (with the conversion hint).
  static Checkpoint open(const fs::path& folder);
  /// As open, for a folder that is still being filled: shards that are not there yet or not whole
  /// are left out. `missing` gets their names and, of those that are not whole, the reason.
  static Checkpoint open_arrived(const fs::path& folder,
                                 std::map<std::string, std::string>& missing);

  const fs::path& folder() const noexcept { return folder_; }
  const std::string& prefix() const noexcept { return prefix_; }  ///< "" or "language_model."
  bool has(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }
  /// Whether the index (or, without one, the file) names a tensor, arrived or not.
  bool promises(std::string_view name) const { return promised_.find(name) != promised_.end(); }
  /// Whether a tensor has arrived with all that belongs to it: scales, packed codes.
  bool arrived_with_companions(const std::string& name) const;
  /// Names of the files that hold a tensor and what belongs to it.
  std::vector<std::string> promised_shards(const std::string& name) const;
  /// Whether the shard of that name has arrived.
  bool has_shard(const std::string& name) const;
  /// The names and files of the shards that are there.
  std::vector<std::pair<std::string, fs::path>> shards() const;
  /// Whether an index says which shard holds a tensor, rather than there being one file.
  bool has_index() const noexcept { return has_index_; }
  /// The file of a shard, arrived or not.
  fs::path path_of_shard(const std::string& name) const { return inside_folder(folder_, name); }
  /// Throws Error{bad_file} when the tensor is missing, naming the nearest one there is.
  const Tensor& find(std::string_view name) const;
  /// As find, and the shape must be `shape`.
  const Tensor& find(std::string_view name, std::span<const std::int64_t> shape) const;
  std::span<const std::byte> bytes(const Tensor& tensor) const;
  const fs::path& shard_path(const Tensor& tensor) const { return shards_[tensor.shard].path(); }
  /// "model-00001-of-00002.safetensors, tensor model.norm.weight", for messages.
  std::string where(const Tensor& tensor) const;
  /// Lets the kernel reuse the memory behind a tensor's pages after it was copied.
  void drop(const Tensor& tensor) const;
  const std::map<std::string, Tensor, std::less<>>& tensors() const noexcept { return tensors_; }
  std::int64_t total_bytes() const noexcept { return total_bytes_; }

 private:
  static Checkpoint open_shards(const fs::path& folder,
                                std::map<std::string, std::string>* missing);
  std::vector<const std::string*> companions(const std::string& name) const;

  fs::path folder_;
  std::string prefix_;
  std::vector<MappedFile> shards_;
  std::vector<std::string> shard_names_;  ///< as shards_
  std::map<std::string, Tensor, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> promised_;  ///< tensor -> shard's file name
  std::int64_t total_bytes_ = 0;
  bool has_index_ = false;
};

}  // namespace tailor
