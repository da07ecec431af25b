#pragma once

#include <map>
#include <string>
#include <vector>

#include "base/file.h"
#include "data/store/store.h"

namespace tailor {

/// What is known of a unit that is in the store.
struct PackedUnit {
  UnitHash hash{};
  double squared_error = 0, squares = 0, absmax_squared_error = 0;
};

/// The record of a store that is being packed: one JSON line a unit, appended when the unit is on
/// disk. Holds a lock on its file, so that two packers cannot share a store.
class PackJournal {
 public:
  /// Opens or begins the journal in `folder`. A last line that was cut off by a crash is dropped.
  /// Throws Error{usage}: another process has it, or it is of another packing (`mark`).
  PackJournal(const fs::path& folder, const std::array<std::byte, 16>& mark);
  PackJournal(const PackJournal&) = delete;
  PackJournal& operator=(const PackJournal&) = delete;
  ~PackJournal();

  const std::map<UnitId, PackedUnit>& units() const { return units_; }
  /// First bytes of each layer's attention matrices, as digests.
  const std::map<std::int64_t, std::string>& samples() const { return samples_; }
  void add_sample(std::int64_t layer, const std::string& sha256);
  void add(const UnitId& id, const PackedUnit& unit);
  /// Puts what was added on disk. The units' own bytes must be there already.
  void sync();
  void remove();

 private:
  void read_lines(const std::string& text, const std::array<std::byte, 16>& mark);
  fs::path path_;
  int descriptor_ = -1;
  std::string pending_;
  std::map<UnitId, PackedUnit> units_;
  std::map<std::int64_t, std::string> samples_;
};

}  // namespace tailor
