#include "base/aligned_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/units.h"

namespace tailor {
namespace {

constexpr std::int64_t kHugePageBytes = std::int64_t{2} << 20;

void unmap(std::byte* data, std::int64_t bytes) {
  if (bytes > 0) ::munmap(data, static_cast<std::size_t>(bytes));
}

}  // namespace

AlignedMemory::AlignedMemory(std::int64_t bytes, bool huge_pages) {
  TAILOR_CHECK(bytes >= 0);
  if (bytes == 0) return;
  const std::int64_t page = ::sysconf(_SC_PAGESIZE);
  const std::int64_t step = huge_pages ? kHugePageBytes : page;
  // More than asked for, so that a huge page's start lies in it; what is left over goes back.
  const std::int64_t spare = huge_pages ? step - page : 0;
  void* map = MAP_FAILED;
  if (bytes <= INT64_MAX - step - page) {
    size_ = align_up(bytes, page);
    map = ::mmap(nullptr, static_cast<std::size_t>(size_ + spare), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  } else {
    errno = ENOMEM;
  }
  if (map == MAP_FAILED) {
    throw Error(
        Fault::does_not_fit,
        {"cannot take " + std::to_string(bytes) + " bytes of memory: " + std::strerror(errno), "",
         "Give the run a smaller host memory budget, or free memory (ulimit -v)."});
  }
  const auto address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(map));
  const std::int64_t before = align_up(address, step) - address;
  data_ = static_cast<std::byte*>(map) + before;
  unmap(static_cast<std::byte*>(map), before);
  unmap(data_ + size_, spare - before);
  // Refused where the kernel was built without them: small pages then.
  if (huge_pages) ::madvise(data_, static_cast<std::size_t>(size_), MADV_HUGEPAGE);
}

AlignedMemory::AlignedMemory(AlignedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

AlignedMemory& AlignedMemory::operator=(AlignedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

AlignedMemory::~AlignedMemory() { unmap(data_, size_); }

void AlignedMemory::poison(std::int64_t offset, std::int64_t bytes) const {
  TAILOR_CHECK(offset >= 0 && bytes >= 0 && bytes <= size_ - offset);
  std::fill_n(data_ + offset, bytes, kPoison);
}

bool AlignedMemory::poisoned(std::int64_t offset, std::int64_t bytes) const {
  TAILOR_CHECK(offset >= 0 && bytes >= 0 && bytes <= size_ - offset);
  return std::all_of(data_ + offset, data_ + offset + bytes,
                     [](std::byte value) { return value == kPoison; });
}

}  // namespace tailor
