#pragma once

#include <memory>
#include <span>
#include <vector>

#include "base/aligned_memory.h"
#include "data/checkpoint/checkpoint.h"
#include "data/store/journal.h"
#include "data/store/source.h"
#include "data/store/source_forms.h"

namespace tailor {

/// What a store is packed to, known before the first weight is read.
struct PackPlan {
  ModelSpec spec;
  StoreFormats formats;
  SourceForms forms;
  StoreLayout layout;
  std::array<std::byte, 16> mark{};
  std::vector<std::size_t> first_form;  ///< of each unit, into forms.of_matrix

  void index();  ///< fills first_form
  std::span<const WeightFormat> forms_of(const StoredUnit& unit) const;
  /// Bytes of the published codes of a unit.
  std::int64_t source_bytes(const StoredUnit& unit) const;
};

/// Memory of a UnitMaker, part by part, bytes.
struct MakerMemory {
  std::int64_t unit = 0, source = 0, rows = 0;
  std::int64_t all() const { return unit + source + rows; }
  static MakerMemory larger(const MakerMemory& a, const MakerMemory& b);
};

/// Makes units of a store from a checkpoint, one after the other. One object a thread.
class UnitMaker {
 public:
  UnitMaker(const PackPlan& plan, std::shared_ptr<const Checkpoint> checkpoint);

  /// Bytes it holds while it makes `unit`, and goes on holding until release().
  static MakerMemory memory_of(const PackPlan& plan, const StoredUnit& unit);

  /// The unit's bytes, until the next call; fills `packed`. Throws Error{bad_file} naming tensor,
  /// row and column: a number that is infinite or none; a matrix in another form than was promised.
  std::span<const std::byte> make(const StoredUnit& unit, PackedUnit& packed);
  /// Asks the system to begin reading what `unit` is made of.
  void read_ahead(const StoredUnit& unit);

  const std::shared_ptr<const Checkpoint>& checkpoint() const { return checkpoint_; }
  std::int64_t source_bytes_read() const { return reader_.bytes_read(); }
  void release();

 private:
  void encode(const PublishedMatrix& matrix, const WeightFormat& form, const MatrixPlace& place,
              std::int64_t first_row, PackedUnit& packed);
  void check_form(const UnitId& id, const PublishedMatrix& matrix, const MatrixPlace& place) const;

  const PackPlan& plan_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  SourceReader reader_;
  AlignedMemory unit_, rows_;
};

}  // namespace tailor
