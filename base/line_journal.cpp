#include "base/line_journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace tailor {

LineJournal::LineJournal(const fs::path& path, const Error::Parts& busy) : path_(path) {
  descriptor_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0) throw io_error(errno, "cannot open", path_.string());
  struct stat info {};
  // A process that finishes removes the file: a lock on what was removed is worth nothing.
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0 || ::fstat(descriptor_, &info) != 0 ||
      info.st_nlink == 0) {
    ::close(descriptor_);
    throw Error(Fault::usage, busy);
  }
}

LineJournal::LineJournal(const fs::path& path, const Error::Parts& busy, const Reading& reading)
    : LineJournal(path, busy) {
  const std::string text = read_text(path_);
  const std::size_t first = text.find('\n');
  if (first == std::string::npos) {
    if (::ftruncate(descriptor_, 0) != 0) throw io_error(errno, "cannot write", path_.string());
    pending_ = reading.header + "\n";
    sync();
    sync_path(path_.parent_path());
    return;
  }
  reading.check_header(std::string_view(text).substr(0, first));
  std::size_t begin = first + 1;
  for (std::size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    try {
      const Json line =
          parse_json(std::string_view(text).substr(begin, end - begin), path_.string());
      reading.read(JsonReader(line, path_.string()));
    } catch (const Error&) {  // that part counts as not done
    }
  }
  end_ = static_cast<off_t>(begin);
  if (begin != text.size() && ::ftruncate(descriptor_, end_) != 0) {
    throw io_error(errno, "cannot write", path_.string());
  }
}

LineJournal::~LineJournal() { ::close(descriptor_); }

void LineJournal::sync() {
  if (pending_.empty()) return;
  int error = write_at(descriptor_, end_, std::as_bytes(std::span(pending_)));
  if (error == 0 && ::fdatasync(descriptor_) != 0) error = errno;
  if (error != 0) {
    // A line that is half there would spoil the one that is written after it.
    if (::ftruncate(descriptor_, end_) != 0) error = errno;
    throw io_error(error, "cannot write", path_.string());
  }
  end_ += static_cast<off_t>(pending_.size());
  pending_.clear();
}

void LineJournal::remove() {
  ::unlink(path_.c_str());
  sync_path(path_.parent_path());
}

}  // namespace tailor
