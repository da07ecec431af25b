#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/file.h"
#include "data/store/store.h"

struct XXH3_state_s;  // of xxhash.h

namespace tailor {

/// A file of a store that is being written, by any number of threads at places of their own.
class StoreFile {
 public:
  /// Opens or creates `path` and reserves `bytes` on the disk, so that a disk that is too small
  /// says so before hours of work. A file of that size is left as it is. Throws Error{io}; a file
  /// that was not there before is then gone again.
  StoreFile(const fs::path& path, std::int64_t bytes);
  StoreFile(const StoreFile&) = delete;
  StoreFile& operator=(const StoreFile&) = delete;
  ~StoreFile();

  /// Throws Error{io}.
  void write(std::int64_t offset, std::span<const std::byte> bytes) const;
  /// Has the kernel begin to write a stretch out; does not wait.
  void start_sync(std::int64_t offset, std::int64_t bytes) const;
  /// Waits until all that was written is on the disk. Throws Error{io}.
  void sync() const;

 private:
  fs::path path_;
  int descriptor_ = -1;
};

/// Throws Error{io}, as a full disk does, unless the disk of `folder` has room for the files of
/// `layout` beyond what those that are there already take.
void check_disk_space(const fs::path& folder, const StoreLayout& layout);

/// hash_unit() of bytes that are seen piece by piece.
class UnitHasher {
 public:
  UnitHasher();
  UnitHasher(const UnitHasher&) = delete;
  UnitHasher& operator=(const UnitHasher&) = delete;
  ~UnitHasher();
  void add(std::span<const std::byte> bytes);
  /// Of what was added since construction or the last call.
  UnitHash finish();

 private:
  XXH3_state_s* state_;
};

}  // namespace tailor
