#pragma once

#include <cstddef>
#include <cstdint>

#include "base/file.h"

namespace tailor {

/// A file beside `to` that takes its place, or goes away. Locked, so that two exports cannot fill
/// it; what a killed one left is written over.
class StagingFile {
 public:
  /// Throws Error{usage}: `to` is there, or being written.
  explicit StagingFile(const fs::path& to);
  StagingFile(const StagingFile&) = delete;
  StagingFile& operator=(const StagingFile&) = delete;
  ~StagingFile();

  /// Takes the space now: a disk that is too small says so (Error{does_not_fit}) before anything is
  /// read.
  void reserve(std::int64_t bytes);
  /// From any number of threads.
  void write(std::int64_t offset, const std::byte* bytes, std::int64_t count) const;
  /// Syncs, and gives the file its name; one that was made meanwhile is not replaced.
  void publish();

 private:
  fs::path to_, path_;
  int descriptor_ = -1;
  bool published_ = false;
};

}  // namespace tailor
