#pragma once

#include "base/file.h"

namespace tailor {

/// Held while something is made that others would make as well: they wait, and find it made.
class FileLock {
 public:
  /// Creates `path` where it is not there, and waits for the lock. Throws Error{io}.
  explicit FileLock(const fs::path& path);
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;
  ~FileLock();

 private:
  int descriptor_;
};

}  // namespace tailor
