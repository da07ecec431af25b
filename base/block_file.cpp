#include "base/block_file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace tailor {
namespace {
/// What the page cache holds in one piece (a folio) is at most a huge page, aligned to its size.
constexpr std::int64_t kFolioBytesMax = std::int64_t{2} << 20;
}  // namespace

BlockFile::BlockFile(const fs::path& path, bool direct) : path_(path) {
  // O_NONBLOCK, taken off below: without it, opening a named pipe waits for a writer.
  constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
  descriptor_ = ::open(path.c_str(), kFlags | (direct ? O_DIRECT : 0));
  if (descriptor_ >= 0) {
    direct_ = direct;
  } else if (direct && (errno == EINVAL || errno == EOPNOTSUPP)) {
    why_ = std::string("open with O_DIRECT: ") + std::strerror(errno);
    descriptor_ = ::open(path.c_str(), kFlags);
  }
  if (descriptor_ < 0) throw io_error(errno, "cannot open", path.string());

  struct stat info {};
  int error = ::fstat(descriptor_, &info) != 0 ? errno : 0;
  // Only a regular file has offsets that stay: a read from a pipe could block for ever.
  if (error == 0 && S_ISDIR(info.st_mode)) error = EISDIR;
  if (error == 0 && !S_ISREG(info.st_mode)) error = ESPIPE;
  // Since Linux 6.6 tmpfs takes O_DIRECT and reads through the page cache all the same.
  struct statfs file_system {};
  if (error == 0 && direct_ && ::fstatfs(descriptor_, &file_system) == 0 &&
      file_system.f_type == TMPFS_MAGIC) {
    direct_ = false;
    why_ = "tmpfs keeps files in memory";
  }
  if (error == 0 && ::fcntl(descriptor_, F_SETFL, direct_ ? O_DIRECT : 0) != 0) error = errno;
  if (error != 0) {
    ::close(descriptor_);
    throw io_error(error, "cannot read in blocks", path.string());
  }
  if (!direct_) ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_SEQUENTIAL);
}

BlockFile::BlockFile(BlockFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      direct_(other.direct_),
      why_(std::move(other.why_)) {}

BlockFile& BlockFile::operator=(BlockFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(direct_, other.direct_);
  std::swap(why_, other.why_);
  return *this;
}

BlockFile::~BlockFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

bool BlockFile::leave_direct(std::string why) {
  // The flag of the open file is taken off, rather than opening the path again: whatever became of
  // the path meanwhile, all bytes come from one file. A read under way has its own copy of it.
  if (::fcntl(descriptor_, F_SETFL, 0) != 0) return false;
  ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_SEQUENTIAL);
  direct_ = false;
  why_ = std::move(why);
  return true;
}

bool BlockFile::ends_before(std::int64_t offset) const {
  struct stat info {};
  return ::fstat(descriptor_, &info) == 0 && info.st_size <= offset;
}

void BlockFile::drop(std::int64_t offset, std::int64_t bytes) const noexcept {
  if (bytes <= 0) return;
  const std::int64_t begin = offset / kFolioBytesMax * kFolioBytesMax;
  ::posix_fadvise(descriptor_, begin, offset + bytes - begin, POSIX_FADV_DONTNEED);
}

}  // namespace tailor
