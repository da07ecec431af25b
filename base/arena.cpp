#include "base/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/text.h"
#include "base/units.h"

namespace tailor {
namespace {

std::int64_t page_bytes() {
  static const std::int64_t kPage = ::sysconf(_SC_PAGESIZE);
  return kPage;
}

/// A file without a name in `folder`, or -1 with errno set.
int open_nameless(const fs::path& folder) {
  const int fd = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  const bool unknown = errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL;
  if (fd >= 0 || !unknown) return fd;
  // File systems without O_TMPFILE (NFS): a file that loses its name at once.
  std::string name = (folder / ".arena-XXXXXX").string();
  const int named = ::mkostemp(name.data(), O_CLOEXEC);
  if (named >= 0) ::unlink(name.c_str());
  return named;
}

/// Takes `bytes` of disk space for the file. Returns an errno value, or 0.
int take_space(int fd, std::int64_t bytes) {
  int result = 0;
  do {
    result = ::fallocate(fd, 0, 0, bytes);
  } while (result != 0 && errno == EINTR);
  if (result == 0) return 0;
  if (errno != EOPNOTSUPP && errno != ENOSYS) return errno;
  // File systems that cannot reserve: space is what was written.
  const std::vector<std::byte> zeros(std::size_t{1} << 20U);
  for (std::int64_t done = 0; done < bytes;) {
    const auto piece = std::min(bytes - done, static_cast<std::int64_t>(zeros.size()));
    const ssize_t n = ::pwrite(fd, zeros.data(), static_cast<std::size_t>(piece), done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : ENOSPC;
    done += n;
  }
  return 0;
}

}  // namespace

Arena Arena::in_memory(std::int64_t bytes) {
  Arena arena;
  arena.memory_ = AlignedMemory(bytes);
  arena.data_ = arena.memory_.data();
  arena.size_ = bytes;
  return arena;
}

Arena Arena::in_file(std::int64_t bytes, const fs::path& folder) {
  TAILOR_CHECK(bytes >= 0);
  if (bytes == 0) return in_memory(0);
  Arena arena;
  const auto failed = [&](int error) {
    return io_error(error,
                    "cannot take " + std::to_string(bytes) + " bytes (" + bytes_text(bytes) +
                        ") of scratch space",
                    folder.string());
  };
  const std::int64_t room = align_up(bytes, page_bytes());
  arena.descriptor_ = open_nameless(folder);
  if (arena.descriptor_ < 0) throw failed(errno);
  if (const int error = take_space(arena.descriptor_, room); error != 0) throw failed(error);
  void* map = ::mmap(nullptr, static_cast<std::size_t>(room), PROT_READ | PROT_WRITE, MAP_SHARED,
                     arena.descriptor_, 0);
  if (map == MAP_FAILED) throw failed(errno);
  arena.data_ = static_cast<std::byte*>(map);
  arena.size_ = bytes;
  return arena;
}

Arena::Arena(const Arena& other) : Arena(in_memory(other.size_)) {
  std::copy_n(other.data_, other.size_, data_);
}

Arena& Arena::operator=(const Arena& other) {
  if (this != &other) *this = Arena(other);
  return *this;
}

Arena::Arena(Arena&& other) noexcept
    : memory_(std::move(other.memory_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      descriptor_(std::exchange(other.descriptor_, -1)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

Arena::~Arena() {
  if (descriptor_ < 0) return;
  if (data_ != nullptr) ::munmap(data_, static_cast<std::size_t>(align_up(size_, page_bytes())));
  ::close(descriptor_);
}

void Arena::release(std::int64_t offset, std::int64_t bytes) const noexcept {
  if (!on_disk()) return;
  // Only pages that lie inside: a neighbour may be using the others.
  const std::int64_t page = page_bytes();
  const std::int64_t begin = align_up(offset, page);
  const std::int64_t end =
      offset + bytes >= size_ ? align_up(size_, page) : (offset + bytes) / page * page;
  if (end <= begin) return;
  // Unmapped first: a page that is mapped is neither written in one go nor dropped from the cache.
  ::madvise(data_ + begin, static_cast<std::size_t>(end - begin), MADV_DONTNEED);
  ::sync_file_range(descriptor_, begin, end - begin, SYNC_FILE_RANGE_WRITE);
  ::posix_fadvise(descriptor_, begin, end - begin, POSIX_FADV_DONTNEED);
}

void Arena::prefetch(std::int64_t offset, std::int64_t bytes) const noexcept {
  if (!on_disk()) return;
  const std::int64_t begin = offset / page_bytes() * page_bytes();
  const std::int64_t end = std::min(offset + bytes, size_);
  if (bytes <= 0 || end <= begin) return;
  ::madvise(data_ + begin, static_cast<std::size_t>(end - begin), MADV_WILLNEED);
}

void Arena::zero(std::int64_t offset, std::int64_t bytes) const noexcept {
  if (bytes <= 0) return;
  std::int64_t begin = align_up(offset, page_bytes());
  std::int64_t end = (offset + bytes) / page_bytes() * page_bytes();
  if (!note_zero(begin, end)) begin = end = offset + bytes;
  std::fill(data_ + offset, data_ + begin, std::byte{0});
  std::fill(data_ + end, data_ + offset + bytes, std::byte{0});
}

void Arena::discard(std::int64_t offset, std::int64_t bytes) const noexcept {
  note_zero(align_up(offset, page_bytes()), (offset + bytes) / page_bytes() * page_bytes());
}

void Arena::drop(std::int64_t offset, std::int64_t bytes) const noexcept {
  const std::int64_t begin = align_up(offset, page_bytes());
  const std::int64_t end = (offset + bytes) / page_bytes() * page_bytes();
  if (end <= begin) return;
  note_zero(begin, end);
  ::madvise(data_ + begin, static_cast<std::size_t>(end - begin), MADV_DONTNEED);
}

// The file system notes that the pages are zero, and keeps their space: nothing is written, and
// nothing read when they are next touched.
bool Arena::note_zero(std::int64_t begin, std::int64_t end) const noexcept {
  return on_disk() && end > begin &&
         ::fallocate(descriptor_, FALLOC_FL_ZERO_RANGE, begin, end - begin) == 0;
}

}  // namespace tailor
