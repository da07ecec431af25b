#pragma once

#include <cstdint>
#include <string>

#include "base/file.h"

namespace tailor {

/// A regular file open for reading in whole blocks, past the page cache (O_DIRECT) or, where that
/// is refused, through it. Move-only; closed on destruction.
class BlockFile {
 public:
  /// Asks for O_DIRECT if `direct`. Throws Error{io} when `path` cannot be opened or is no regular
  /// file.
  BlockFile(const fs::path& path, bool direct);
  BlockFile(BlockFile&& other) noexcept;
  BlockFile& operator=(BlockFile&& other) noexcept;
  BlockFile(const BlockFile&) = delete;
  BlockFile& operator=(const BlockFile&) = delete;
  ~BlockFile();

  int descriptor() const noexcept { return descriptor_; }
  const fs::path& path() const noexcept { return path_; }
  bool direct() const noexcept { return direct_; }
  /// Why it is not direct although that was asked for; else empty.
  const std::string& why() const noexcept { return why_; }

  /// Reads that begin from now on go through the page cache; those under way are not disturbed.
  /// False if the system would not have it: all is then as before.
  bool leave_direct(std::string why);
  /// Whether the file, as long as it is now, has no byte at `offset` or behind it.
  bool ends_before(std::int64_t offset) const;
  /// Gives back the page cache's copy of bytes that were read through it, and of up to 2 MiB before
  /// them: the cache may hold them in one piece, which goes as a whole or not at all.
  void drop(std::int64_t offset, std::int64_t bytes) const noexcept;

 private:
  fs::path path_;
  int descriptor_ = -1;
  bool direct_ = false;
  std::string why_;
};

}  // namespace tailor
