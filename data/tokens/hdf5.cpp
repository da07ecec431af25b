#include "data/tokens/hdf5.h"

#include <mutex>

namespace tailor::hdf5 {
namespace {

std::mutex& library_lock() {
  static std::mutex lock;
  return lock;
}

herr_t gather(unsigned, const H5E_error2_t* entry, void* out) {
  auto& text = *static_cast<std::string*>(out);
  if (entry->desc != nullptr && *entry->desc != '\0') {
    text += (text.empty() ? "" : "; ") + std::string(entry->desc);
  }
  return 0;
}

}  // namespace

void fail(const std::string& doing, const fs::path& path) {
  std::string reason;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, &gather, &reason);
  H5Eclear2(H5E_DEFAULT);
  const bool full = reason.find("No space left") != std::string::npos ||
                    reason.find("Disk quota exceeded") != std::string::npos;
  throw Error(full ? Fault::does_not_fit : Fault::io,
              {doing + ": " + (reason.empty() ? "HDF5 gives no reason" : reason.substr(0, 500)),
               path.string(),
               full ? "Free space on this disk, or set data.store to a path on another one."
                    : "Check the disk and the folder's permissions, then run again."});
}

Session::Session() {
  library_lock().lock();
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}
Session::~Session() { library_lock().unlock(); }

}  // namespace tailor::hdf5
