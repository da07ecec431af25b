#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "adapters/merge/worker.h"
#include "base/line_journal.h"

namespace tailor {

/// The record of a merge under way: a header line, then a JSON line for each job whose bytes are on
/// the disk. Holds a lock, so that two processes cannot write one merge.
class MergeJournal {
 public:
  static constexpr const char* kName = "merge.journal";

  /// Opens or begins the journal in `folder`; `mark` tells one merge from another. A last line that
  /// a crash cut off is dropped; a line that cannot be read counts for nothing. Throws
  /// Error{usage}, nothing changed: another process has it, or it is of another merge.
  MergeJournal(const fs::path& folder, const std::string& mark);

  /// By index of the job.
  const std::map<std::size_t, MergedPiece>& done() const { return done_; }
  void add(std::size_t job, const MergedPiece& piece);
  /// As LineJournal's.
  void sync() { lines_.sync(); }

 private:
  void read_line(const JsonReader& line);
  std::map<std::size_t, MergedPiece> done_;
  LineJournal lines_;  ///< reads into done_
};

/// "0f3a..." of a digest, and back; empty for none.
std::string digest_text(const PieceDigest& digest);
std::optional<PieceDigest> digest_from_text(const std::string& text);

}  // namespace tailor
