#include "adapters/merge/slice_io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/block_reader.h"
#include "base/error.h"
#include "base/text.h"
#include "base/units.h"

namespace tailor {
namespace {

void grow(AlignedMemory& memory, std::int64_t bytes) {
  if (memory.size() >= bytes) return;
  memory = AlignedMemory();  // the old one goes before the new one comes
  memory = AlignedMemory(bytes);
}

}  // namespace

SliceSource::SliceSource(const fs::path& path) : file_(path, true) {}

std::byte* SliceSource::read(std::int64_t offset, std::int64_t bytes, AlignedMemory& memory) const {
  const std::int64_t begin = offset / kBlockBytes * kBlockBytes;
  const std::int64_t end = align_up(offset + bytes, kBlockBytes);
  grow(memory, end - begin);
  std::byte* const to = memory.data();
  for (std::int64_t done = 0; done < offset + bytes - begin;) {
    const std::int64_t count = end - begin - done;
    const ssize_t n =
        ::pread(file_.descriptor(), to + done, static_cast<std::size_t>(count), begin + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw io_error(errno, "cannot read", file_.path().string());
    if (n == 0) {
      throw Error(Fault::bad_file, {"the file ends inside a tensor", file_.path().string(),
                                    "It was cut off while it was read: download it again."});
    }
    done += n;
    // A direct read may stop anywhere in a file's last block, and nowhere else inside a block.
    if (file_.direct() && done % kBlockBytes != 0 && done < offset + bytes - begin) {
      done = done / kBlockBytes * kBlockBytes;
      if (n < kBlockBytes) {
        throw Error(Fault::bad_file, {"the file ends inside a tensor", file_.path().string(),
                                      "It was cut off while it was read: download it again."});
      }
    }
  }
  if (!file_.direct()) file_.drop(begin, end - begin);
  return to + (offset - begin);
}

SliceTarget::SliceTarget(const fs::path& path, std::int64_t bytes) : path_(path) {
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0) throw io_error(errno, "cannot create", path.string());
  struct stat info {};
  int error = ::fstat(descriptor_, &info) == 0 ? 0 : errno;
  if (error == 0 && info.st_size != bytes) {
    error = reserve_file(descriptor_, bytes);
  }
  if (error != 0) {
    ::close(descriptor_);
    throw io_error(error, "cannot reserve " + bytes_text(bytes) + " for the merged model",
                   path.string());
  }
  direct_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_DIRECT);
}

SliceTarget::~SliceTarget() {
  ::close(descriptor_);
  if (direct_ >= 0) ::close(direct_);
}

std::byte* SliceTarget::at(std::int64_t offset, std::int64_t bytes, AlignedMemory& memory) {
  grow(memory, bytes + kBlockBytes);
  return memory.data() + offset % kBlockBytes;
}

void SliceTarget::put(int descriptor, std::int64_t offset, std::span<const std::byte> bytes) const {
  const int error = write_at(descriptor, offset, bytes);
  if (error != 0) throw io_error(error, "cannot write", path_.string());
}

void SliceTarget::write(std::int64_t offset, std::span<const std::byte> bytes) const {
  const auto size = static_cast<std::int64_t>(bytes.size());
  const std::int64_t first = align_up(offset, kBlockBytes);
  const std::int64_t last = (offset + size) / kBlockBytes * kBlockBytes;
  const bool aligned = (reinterpret_cast<std::uintptr_t>(bytes.data()) +
                        static_cast<std::uintptr_t>(first - offset)) %
                           static_cast<std::uintptr_t>(kBlockBytes) ==
                       0;
  if (direct_ < 0 || !aligned || last <= first) {
    put(descriptor_, offset, bytes);
    ::sync_file_range(descriptor_, offset, size, SYNC_FILE_RANGE_WRITE);
    return;
  }
  const auto part = [&](std::int64_t begin, std::int64_t end) {
    return bytes.subspan(static_cast<std::size_t>(begin - offset),
                         static_cast<std::size_t>(end - begin));
  };
  put(direct_, first, part(first, last));
  put(descriptor_, offset, part(offset, first));
  put(descriptor_, last, part(last, offset + size));
}

void SliceTarget::sync() const {
  if (::fdatasync(descriptor_) != 0) throw io_error(errno, "cannot write", path_.string());
}

}  // namespace tailor
