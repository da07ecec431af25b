#pragma once

#include <map>
#include <optional>
#include <string>

#include "base/file.h"
#include "base/json.h"
#include "base/line_journal.h"
#include "data/store/store.h"

namespace tailor {

/// What is known of a unit that is in the store.
struct PackedUnit {
  UnitHash hash{};
  double squared_error = 0, squares = 0, absmax_squared_error = 0;
  std::string sample;  ///< of an attention unit: digest of its matrices' first bytes
};

/// The record of a store that is being packed: a header line, then one JSON line a unit, appended
/// when the unit is on disk. Holds a lock on its file, so that two packers cannot share a store.
class PackJournal {
 public:
  struct Header {
    std::array<std::byte, 16> mark{};  ///< of the store's unit headers
    SourceForms forms;
  };
  /// The header of the journal in `folder`; nothing where there is none, or none that is whole yet.
  /// Throws Error{bad_file} where it is damaged.
  static std::optional<Header> begun(const fs::path& folder);

  /// Opens or begins the journal in `folder`. A last line that was cut off by a crash is dropped,
  /// and lines that cannot be read count for nothing: their units are packed again.
  /// Throws Error{usage}, nothing changed: another process has it, or it is of another packing.
  PackJournal(const fs::path& folder, const Header& header);

  const std::map<UnitId, PackedUnit>& units() const { return units_; }
  void add(const UnitId& id, const PackedUnit& unit);
  /// As LineJournal's.
  void sync() { lines_.sync(); }
  void remove() { lines_.remove(); }

 private:
  void read_line(const JsonReader& line);
  std::map<UnitId, PackedUnit> units_;
  LineJournal lines_;  ///< reads into units_
};

}  // namespace tailor
