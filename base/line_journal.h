#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"

namespace tailor {

/// The record of work under way: a header line that tells one piece of work from another, then a
/// JSON line for each part that is done, appended when the part's own bytes are on the disk. Holds
/// a lock on its file, so that two processes cannot do one work.
class LineJournal {
 public:
  struct Reading {
    std::string header;  ///< of a journal that is begun now
    /// Given the header of one that was begun; throws to refuse it, and nothing is changed.
    std::function<void(std::string_view)> check_header;
    /// Given every line behind it. A line that cannot be read, or for which this throws Error, was
    /// written when the machine went down and counts for nothing.
    std::function<void(const JsonReader&)> read;
  };
  /// Opens or begins the journal. A last line that a crash cut off is dropped. Throws Error{usage}
  /// of the parts `busy`, nothing changed, where another process has it; Error{io}.
  LineJournal(const fs::path& path, const Error::Parts& busy, const Reading& reading);
  LineJournal(const LineJournal&) = delete;
  LineJournal& operator=(const LineJournal&) = delete;
  ~LineJournal();

  void add(const Json& line) { pending_ += line.dump() + "\n"; }
  /// Puts what was added on disk; the parts' own bytes must be there. After an Error{io} the file
  /// is as it was before.
  void sync();
  void remove();

 private:
  LineJournal(const fs::path& path, const Error::Parts& busy);  ///< locks it
  fs::path path_;
  int descriptor_ = -1;
  off_t end_ = 0;        ///< of the lines that are on disk
  std::string pending_;  ///< lines that are not
};

}  // namespace tailor
