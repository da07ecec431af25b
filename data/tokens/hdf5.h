#pragma once

#include <hdf5.h>

#include <string>
#include <utility>

#include "base/error.h"
#include "base/file.h"

namespace tailor::hdf5 {

/// Throws what HDF5's error stack says: Error{does_not_fit} for a full disk, else Error{io}.
[[noreturn]] void fail(const std::string& doing, const fs::path& path);

/// `result` of an HDF5 call; negative means failure.
template <class Result>
Result check(Result result, const std::string& doing, const fs::path& path) {
  if (result < 0) fail(doing, path);
  return result;
}

/// An HDF5 handle, closed on scope exit. close() tells of errors (a full disk shows there).
class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle(hid_t id, Close closer, const std::string& doing, fs::path path)
      : id_(check(id, doing, path)), close_(closer), path_(std::move(path)) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    if (id_ >= 0) close_(id_);
  }
  hid_t get() const { return id_; }
  void close(const std::string& doing) { check(close_(std::exchange(id_, -1)), doing, path_); }

 private:
  hid_t id_;
  Close close_;
  fs::path path_;
};

/// The library is not built for threads: every use of it holds this lock. Also keeps it from
/// printing its error stack.
class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

}  // namespace tailor::hdf5
