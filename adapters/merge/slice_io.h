#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "base/aligned_memory.h"
#include "base/block_file.h"
#include "base/file.h"

namespace tailor {

/// Bytes of files that are read past the page cache into memory of the caller's, at any offset:
/// whole blocks around what was asked for. One object serves many threads.
class SliceSource {
 public:
  /// Throws Error{io}.
  explicit SliceSource(const fs::path& path);

  /// Reads [offset, offset + bytes) and returns where it begins in `memory`, which is made larger
  /// where it is too small. Throws Error: io; bad_file where the file ends before.
  std::byte* read(std::int64_t offset, std::int64_t bytes, AlignedMemory& memory) const;

 private:
  mutable BlockFile file_;
};

/// A file of known size that threads write into, each at places of its own. Whole blocks go past
/// the page cache where the file system allows and the bytes lie in memory as they do in the file
/// (at(offset, memory)); a slice's first and last part of a block, which it shares with its
/// neighbours, goes through the cache.
class SliceTarget {
 public:
  /// Opens or creates the file and takes its space. Throws Error{io}, a full disk too.
  SliceTarget(const fs::path& path, std::int64_t bytes);
  SliceTarget(const SliceTarget&) = delete;
  SliceTarget& operator=(const SliceTarget&) = delete;
  ~SliceTarget();

  /// Where in `memory` bytes for file offset `offset` should begin; it is made large enough for
  /// `bytes`.
  static std::byte* at(std::int64_t offset, std::int64_t bytes, AlignedMemory& memory);
  void write(std::int64_t offset, std::span<const std::byte> bytes) const;
  void sync() const;  ///< returns when all is on the disk

 private:
  void put(int descriptor, std::int64_t offset, std::span<const std::byte> bytes) const;
  fs::path path_;
  int descriptor_ = -1, direct_ = -1;
};

}  // namespace tailor
