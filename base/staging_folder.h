#pragma once

#include <vector>

#include "base/file.h"

namespace tailor {

/// A folder beside `to` that becomes `to`, or goes away. Locked, so that two exports cannot fill
/// it; what a killed one left in it is removed.
class StagingFolder {
 public:
  /// Throws Error{usage} where anything is at `to`, or another process fills it; Error{io}.
  explicit StagingFolder(const fs::path& to);
  StagingFolder(const StagingFolder&) = delete;
  StagingFolder& operator=(const StagingFolder&) = delete;
  ~StagingFolder();  ///< removes it unless it was published

  const fs::path& path() const { return path_; }
  /// Syncs it and gives it its name.
  void publish();

 private:
  fs::path to_, path_;
  int descriptor_ = -1;
  bool published_ = false;
};

}  // namespace tailor
