#pragma once

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "base/file.h"

namespace tailor::testing_support {

/// A file system of a test's own, to be filled; where none can be mounted (no root, no loop
/// device) is_there() is false, and the test is to be skipped.
class SmallDisk {
 public:
  explicit SmallDisk(const fs::path& folder) : folder_(folder) { make_folders(folder_); }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  ~SmallDisk() {
    if (there_) ::umount2(folder_.c_str(), MNT_DETACH);
  }

  /// In memory: `bytes`, and at most `files` with the folder itself; 0: any number. Again for other
  /// limits.
  bool in_memory(std::int64_t bytes, int files = 0) {
    const std::string size =
        "size=" + std::to_string(bytes) + ",nr_inodes=" + std::to_string(files);
    const unsigned long flags = there_ ? MS_REMOUNT : 0;
    const bool done = ::mount("tailor_test", folder_.c_str(), "tmpfs", flags, size.c_str()) == 0;
    there_ = there_ || done;
    return done;
  }
  /// ext2, which cannot reserve space: a full disk is met by a write in the middle of a file.
  bool without_reserving(std::int64_t bytes) {
    const fs::path image = folder_.string() + ".image";
    FileWriter(image).close();
    fs::resize_file(image, static_cast<std::uintmax_t>(bytes));
    const std::string quoted = "'" + image.string() + "'";
    there_ = ::geteuid() == 0 &&
             std::system(("mkfs.ext2 -q -F -m 0 " + quoted + " 2>/dev/null && mount -o loop " +
                          quoted + " '" + folder_.string() + "' 2>/dev/null")
                             .c_str()) == 0;
    return there_;
  }

  const fs::path& path() const { return folder_; }
  fs::path operator/(const std::string& name) const { return folder_ / name; }

  /// Takes all that is left, as another program would.
  void fill() const {
    const int file = ::open((folder_ / "filler").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    const std::string block(4096, 'x');
    while (::write(file, block.data(), block.size()) > 0) {
    }
    ::close(file);
  }
  void make_room() const { fs::remove(folder_ / "filler"); }

 private:
  fs::path folder_;
  bool there_ = false;
};

}  // namespace tailor::testing_support
