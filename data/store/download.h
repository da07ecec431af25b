#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "data/checkpoint/checkpoint.h"

namespace tailor {

/// A model's folder whose shards may still be arriving, in any order: by a rename, or growing in
/// place. A shard counts as arrived when its file is as long as its header says, so tools that take
/// the whole length at first and fill it later cannot be followed.
class Download {
 public:
  /// `follow`: shards may be missing; else all must be there. Opens nothing yet.
  Download(fs::path model, bool follow) : model_(std::move(model)), follow_(follow) {}

  /// What must arrive before anything can be opened: config.json, and the index or a single file
  /// that is whole. Empty when it is there.
  std::string awaited() const;

  /// Opens what has arrived, unless nothing changed since the last call; true when checkpoint() is
  /// another. Throws Error{bad_file}.
  bool look();
  const std::shared_ptr<const Checkpoint>& checkpoint() const { return checkpoint_; }
  bool whole() const { return missing_.empty(); }
  /// "model-00002-of-00004.safetensors", with the reason where it is there but not whole.
  std::string text_of_missing(const std::string& shard) const;

  /// Removes a shard, and what it links to in the Hugging Face cache.
  static void remove(const fs::path& shard);

 private:
  struct State {
    std::int64_t bytes, seconds, nanoseconds;
    std::uint64_t inode;
    bool operator==(const State&) const = default;
  };
  std::map<std::string, State> states() const;

  fs::path model_;
  bool follow_;
  std::map<std::string, State> seen_;
  std::map<std::string, std::string> missing_;
  std::shared_ptr<const Checkpoint> checkpoint_;
};

}  // namespace tailor
