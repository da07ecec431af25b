#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "data/checkpoint/model_spec.h"
#include "data/store/unit.h"

namespace tailor {

/// Which format matrices get in a store. `as_is`: the form they are published in. Norms and routers
/// always stay as published, and so do the embedding and the head: they are a thousandth of the
/// bytes, or decide too much.
struct FormatChoice {
  bool as_is = true;
  WeightKind kind = WeightKind::bf16;
  std::int64_t group = 0;  ///< of int4; 0: what divides the width
};
struct StoreFormats {
  FormatChoice experts, others;
};
/// The format of one matrix. `published` is its form in the checkpoint.
WeightFormat stored_format(const StoreFormats& formats, UnitKind kind, MatrixRole role,
                           std::int64_t columns, const WeightFormat& published);

/// A unit's place in a store.
struct StoredUnit {
  UnitId id;
  std::int64_t file = 0;    ///< index into StoreLayout::files
  std::int64_t offset = 0;  ///< in that file; a multiple of 4,096
  std::int64_t bytes = 0;
  std::vector<MatrixPlace> matrices;
  bool operator==(const StoredUnit&) const = default;
};

/// Where everything of a model lies in a store: known from the config and the formats alone, before
/// a weight is read, so that units can be written in any order.
struct StoreLayout {
  struct File {
    std::string name;  ///< "layers/00003.tiles"
    std::int64_t bytes = 0;
    bool operator==(const File&) const = default;
  };
  std::vector<File> files;
  std::vector<StoredUnit> units;  ///< layer by layer; experts of a layer side by side
  std::int64_t bytes() const;
  /// Null when there is no such unit.
  const StoredUnit* find(const UnitId& id) const;
  bool operator==(const StoreLayout& other) const {
    return files == other.files && units == other.units;
  }
  void index();  ///< after `units` changed, for find()

 private:
  std::map<UnitId, std::size_t> by_id_;
};

/// Weights in a run of the vocabulary, 16 MiB as bfloat16.
constexpr std::int64_t kVocabularyRunElements = std::int64_t{1} << 23;
/// Rows of a run of the vocabulary: about 16 MiB of bfloat16, a multiple of 64. A function of the
/// model alone: the order in which the head's results are added follows from it.
std::int64_t vocabulary_run_rows(const ModelSpec& spec);

/// `published` gives each matrix's form in the checkpoint.
StoreLayout make_layout(const ModelSpec& spec, const StoreFormats& formats, bool experts_fused,
                        const std::function<WeightFormat(const PublishedMatrix&)>& published);

/// The published matrices a unit is made of, in the order of its places. For vocabulary runs the
/// whole matrix: the run begins at row id.index.
std::vector<PublishedMatrix> unit_matrices(const ModelSpec& spec, const UnitId& id,
                                           bool experts_fused);

}  // namespace tailor
