#include "data/gguf_export/staging_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

#include "base/error.h"
#include "base/text.h"

namespace tailor {

StagingFile::StagingFile(const fs::path& to)
    : to_(to), path_(to.parent_path() / ("." + to.filename().string() + ".tailor-gguf")) {
  std::error_code error;
  if (fs::exists(fs::symlink_status(to_, error))) {
    throw Error(Fault::usage, {"the file is there already", to_.string(),
                               "Name a new file with --to; nothing was changed."});
  }
  if (!to_.parent_path().empty()) make_folders(to_.parent_path());
  descriptor_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
  if (descriptor_ < 0) throw io_error(errno, "cannot create", path_.string());
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
    ::close(descriptor_);
    throw Error(Fault::usage, {"another export is writing this file", to_.string(),
                               "Wait for it, or name another file with --to."});
  }
}

StagingFile::~StagingFile() {
  if (!published_) ::unlink(path_.c_str());
  ::close(descriptor_);
}

void StagingFile::reserve(std::int64_t bytes) {
  if (::ftruncate(descriptor_, 0) != 0) throw io_error(errno, "cannot empty", path_.string());
  const auto too_small = [&](std::int64_t free_bytes) {
    throw Error(
        Fault::does_not_fit,
        {"the GGUF file takes " + bytes_text(bytes) + " of disk, " + bytes_text(free_bytes) +
             " are free",
         to_.string(), "Make room, name a file on another disk, or use a smaller --dtype."});
  };
  struct statvfs facts {};
  std::int64_t free_bytes = -1;
  if (::fstatvfs(descriptor_, &facts) == 0) {
    free_bytes = static_cast<std::int64_t>(facts.f_bavail * facts.f_frsize);
    if (free_bytes < bytes) too_small(free_bytes);
  }
  if (::fallocate(descriptor_, 0, 0, bytes) != 0) {
    if (errno == ENOSPC || errno == EDQUOT) too_small(std::max<std::int64_t>(free_bytes, 0));
    if (errno != EOPNOTSUPP) throw io_error(errno, "cannot reserve space", path_.string());
    if (::ftruncate(descriptor_, bytes) != 0) throw io_error(errno, "cannot size", path_.string());
  }
}

void StagingFile::write(std::int64_t offset, const std::byte* bytes, std::int64_t count) const {
  const int error = write_at(descriptor_, offset, {bytes, static_cast<std::size_t>(count)});
  if (error != 0) throw io_error(error, "cannot write", path_.string());
  // Writing out begins now, so that the sync at the end has little left to wait for.
  ::sync_file_range(descriptor_, offset, count, SYNC_FILE_RANGE_WRITE);
}

void StagingFile::publish() {
  if (::fsync(descriptor_) != 0) throw io_error(errno, "cannot write", path_.string());
  ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_DONTNEED);
  // Someone may have made the file meanwhile: it is not replaced.
  if (::link(path_.c_str(), to_.c_str()) == 0) {
    ::unlink(path_.c_str());
  } else if (errno == EPERM || errno == EOPNOTSUPP) {  // a file system without links
    if (::rename(path_.c_str(), to_.c_str()) != 0) {
      throw io_error(errno, "cannot name", to_.string());
    }
  } else {
    throw io_error(errno, "cannot name", to_.string());
  }
  sync_path(to_.parent_path().empty() ? fs::path(".") : to_.parent_path());
  published_ = true;
}

}  // namespace tailor
