#include "data/store/writer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

/// Takes the space of a file. A file system that cannot is found out by the writes.
int reserve(int descriptor, std::int64_t bytes) {
  if (::fallocate(descriptor, 0, 0, bytes) != 0 && errno != EOPNOTSUPP) return errno;
  return ::ftruncate(descriptor, bytes) == 0 ? 0 : errno;
}

}  // namespace

StoreFile::StoreFile(const fs::path& path, std::int64_t bytes) : path_(path) {
  struct stat info {};
  const bool fresh = ::stat(path.c_str(), &info) != 0;
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0) throw io_error(errno, "cannot create", path.string());
  if (!fresh && info.st_size == bytes) return;
  const int error = reserve(descriptor_, bytes);
  if (error == 0) return;
  ::close(descriptor_);
  descriptor_ = -1;
  if (fresh) ::unlink(path.c_str());
  throw io_error(error, "cannot reserve " + bytes_text(bytes) + " for the store", path.string());
}

StoreFile::~StoreFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void StoreFile::write(std::int64_t offset, std::span<const std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(descriptor_, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw io_error(errno, "cannot write", path_.string());
    bytes = bytes.subspan(static_cast<std::size_t>(n));
    offset += n;
  }
}

void StoreFile::start_sync(std::int64_t offset, std::int64_t bytes) const {
  ::sync_file_range(descriptor_, offset, bytes, SYNC_FILE_RANGE_WRITE);
}

void StoreFile::sync() const {
  if (::fdatasync(descriptor_) != 0) throw io_error(errno, "cannot write", path_.string());
  // Training reads past the page cache; these pages only crowd others out.
  ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_DONTNEED);
}

void check_disk_space(const fs::path& folder, const StoreLayout& layout) {
  struct statvfs disk {};
  if (::statvfs(folder.c_str(), &disk) != 0) throw io_error(errno, "cannot read", folder.string());
  const double free = static_cast<double>(disk.f_bavail) * static_cast<double>(disk.f_frsize);
  std::int64_t needed = 0;
  for (const StoreLayout::File& file : layout.files) {
    struct stat info {};
    const bool there = ::stat((folder / file.name).c_str(), &info) == 0;
    constexpr std::int64_t kStatBlock = 512;
    needed += std::max<std::int64_t>(0, file.bytes - (there ? info.st_blocks * kStatBlock : 0));
  }
  if (static_cast<double>(needed) <= free) return;
  throw io_error(ENOSPC,
                 "the store needs " + bytes_text(needed) + " of disk, " +
                     bytes_text(static_cast<std::int64_t>(free)) + " are free",
                 folder.string());
}

UnitHasher::UnitHasher() : state_(XXH3_createState()) {
  if (state_ == nullptr) throw std::bad_alloc();
  XXH3_128bits_reset(state_);
}

UnitHasher::~UnitHasher() { XXH3_freeState(state_); }

void UnitHasher::add(std::span<const std::byte> bytes) {
  XXH3_128bits_update(state_, bytes.data(), bytes.size());
}

UnitHash UnitHasher::finish() {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_));
  UnitHash out;
  static_assert(sizeof canonical.digest == sizeof out);
  std::memcpy(out.data(), canonical.digest, sizeof out);
  XXH3_128bits_reset(state_);
  return out;
}

}  // namespace tailor
