#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "base/aligned_memory.h"
#include "base/file.h"

namespace tailor {

/// Bytes at one address for as long as they live, zero at first: in memory, or in a scratch file
/// that is mapped there and takes memory only where it is in use. Owners that walk an arena in
/// order say what they are done with (release) and what comes next (prefetch); a value never
/// depends on either. In memory both do nothing.
///
/// The file has no name: it is gone with the process, however that ends. A disk that fails to read
/// a page back ends the process (SIGBUS), as it does for every mapped file; a full one cannot,
/// since all of the space is taken at the start (but a file system that stores every write anew,
/// as btrfs and ZFS do, cannot promise that).
///
/// Threads may work on an arena at once, on ranges that share no byte.
class Arena {
 public:
  Arena() = default;
  /// Throws Error{does_not_fit} when the system has no room.
  static Arena in_memory(std::int64_t bytes);
  /// A nameless file in `folder`, which must exist. Throws Error{io} naming the bytes and the
  /// folder when the disk has no room for them or will not have the file.
  static Arena in_file(std::int64_t bytes, const fs::path& folder);

  /// A copy is in memory, wherever the original is.
  Arena(const Arena& other);
  Arena& operator=(const Arena& other);
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  ~Arena();

  std::byte* data() const noexcept { return data_; }
  std::int64_t size() const noexcept { return size_; }
  bool on_disk() const noexcept { return descriptor_ >= 0; }
  /// The whole arena as values of T.
  template <class T>
  std::span<T> as() const noexcept {
    return {reinterpret_cast<T*>(data_), static_cast<std::size_t>(size_) / sizeof(T)};
  }

  /// [offset, offset + bytes) is not needed soon: its whole pages are written out and leave this
  /// process's memory. Starts the writing, does not wait for it. The bytes keep their values.
  void release(std::int64_t offset, std::int64_t bytes) const noexcept;
  /// [offset, offset + bytes) is needed soon: starts reading it. Does not wait.
  void prefetch(std::int64_t offset, std::int64_t bytes) const noexcept;
  /// Sets [offset, offset + bytes) to zero, on disk without reading what was there.
  void zero(std::int64_t offset, std::int64_t bytes) const noexcept;
  /// What [offset, offset + bytes) holds is not needed any more: it may change, is not written out,
  /// and will not be read in when the range is next filled.
  void discard(std::int64_t offset, std::int64_t bytes) const noexcept;
  /// As discard(), and its whole pages take no memory until they are touched again; they are zero
  /// then. In memory too.
  void drop(std::int64_t offset, std::int64_t bytes) const noexcept;

 private:
  bool note_zero(std::int64_t begin, std::int64_t end) const noexcept;

  AlignedMemory memory_;
  std::byte* data_ = nullptr;
  std::int64_t size_ = 0;
  int descriptor_ = -1;  ///< of the file; -1 in memory
};

/// Where arenas are made: in memory, or in files below a folder.
struct ArenaHome {
  std::optional<fs::path> folder;

  bool on_disk() const { return folder.has_value(); }
  Arena make(std::int64_t bytes) const {
    return folder ? Arena::in_file(bytes, *folder) : Arena::in_memory(bytes);
  }
};

}  // namespace tailor
