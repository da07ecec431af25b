#include "base/staging_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.h"

namespace tailor {

StagingFolder::StagingFolder(const fs::path& to) : to_(to) {
  std::error_code error;
  if (fs::exists(fs::symlink_status(to_, error))) {
    throw Error(Fault::usage, {"the folder is there already", to_.string(),
                               "Name a new folder with --to; nothing was changed."});
  }
  path_ = to_.parent_path() / ("." + to_.filename().string() + ".tailor-export");
  make_folders(path_);
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor_ < 0) throw io_error(errno, "cannot open", path_.string());
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
    ::close(descriptor_);
    throw Error(Fault::usage, {"another export is filling this folder", to_.string(),
                               "Wait for it, or name another folder with --to."});
  }
  std::vector<fs::path> left;
  for (const auto& entry : fs::directory_iterator(path_)) left.push_back(entry.path());
  for (const fs::path& one : left) fs::remove_all(one, error);
}

StagingFolder::~StagingFolder() {
  std::error_code error;
  if (!published_) fs::remove_all(path_, error);
  ::close(descriptor_);
}

void StagingFolder::publish() {
  sync_path(path_);
  tailor::publish(path_, to_);
  published_ = true;
}

}  // namespace tailor
