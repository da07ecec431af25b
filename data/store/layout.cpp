#include "data/store/layout.h"

#include <algorithm>
#include <cstdio>

#include "base/error.h"
#include "base/units.h"

namespace tailor {
namespace {

class LayoutMaker {
 public:
  LayoutMaker(const ModelSpec& spec, const StoreFormats& formats, bool experts_fused,
              const std::function<WeightFormat(const PublishedMatrix&)>& published)
      : spec_(spec), formats_(formats), experts_fused_(experts_fused), published_(published) {}

  StoreLayout make() {
    begin_file("embedding.tiles");
    add_vocabulary(UnitKind::embedding);
    for (std::int64_t l = 0; l < spec_.layer_count(); ++l) {
      char name[40];
      std::snprintf(name, sizeof name, "layers/%05lld.tiles", static_cast<long long>(l));
      begin_file(name);
      add({UnitKind::attention, l, 0});
      add({UnitKind::feed_forward, l, 0});
      if (!spec_.layers[static_cast<std::size_t>(l)].moe) continue;
      for (std::int64_t e = 0; e < spec_.experts; ++e) add({UnitKind::expert, l, e});
    }
    begin_file("head.tiles");
    add({UnitKind::final_norm, 0, 0});
    if (!spec_.tied_head) add_vocabulary(UnitKind::head);
    out_.index();
    return std::move(out_);
  }

 private:
  void begin_file(const std::string& name) { out_.files.push_back({name, 0}); }

  void add_vocabulary(UnitKind kind) {
    const std::int64_t run = vocabulary_run_rows(spec_);
    for (std::int64_t row = 0; row < spec_.vocab; row += run) add({kind, 0, row});
  }

  void add(const UnitId& id) {
    StoredUnit unit;
    unit.id = id;
    unit.file = narrow<std::int64_t>(out_.files.size()) - 1;
    unit.offset = out_.files.back().bytes;
    for (const PublishedMatrix& matrix : unit_matrices(spec_, id, experts_fused_)) {
      MatrixPlace place{};
      place.role = matrix.role;
      place.rows = matrix.rows;
      if (id.kind == UnitKind::embedding || id.kind == UnitKind::head) {
        place.rows = std::min(vocabulary_run_rows(spec_), spec_.vocab - id.index);
      }
      place.columns = matrix.columns;
      place.format =
          stored_format(formats_, id.kind, matrix.role, matrix.columns, published_(matrix));
      if (!matrix_possible(place.format, place.rows, place.columns)) {
        throw Error(Fault::bad_file, {"a matrix of [" + std::to_string(place.rows) + ", " +
                                          std::to_string(place.columns) + "] as " +
                                          format_text(place.format) + " cannot be stored",
                                      matrix.name, "Check the sizes in the model's config.json."});
      }
      unit.matrices.push_back(place);
    }
    unit.bytes = place_matrices(unit.matrices);
    out_.files.back().bytes += unit.bytes;
    out_.units.push_back(std::move(unit));
  }

  const ModelSpec& spec_;
  const StoreFormats& formats_;
  bool experts_fused_;
  const std::function<WeightFormat(const PublishedMatrix&)>& published_;
  StoreLayout out_;
};

}  // namespace

WeightFormat stored_format(const StoreFormats& formats, UnitKind kind, MatrixRole role,
                           std::int64_t columns, const WeightFormat& published) {
  const bool kept = kind == UnitKind::embedding || kind == UnitKind::head || is_vector_role(role) ||
                    role == MatrixRole::router;
  const FormatChoice& choice = kind == UnitKind::expert ? formats.experts : formats.others;
  if (kept || choice.as_is) return published;
  if (choice.kind == WeightKind::int4) {
    return choice.group > 0 ? WeightFormat::int4(std::min(choice.group, columns))
                            : WeightFormat::int4_for(columns);
  }
  if (choice.kind == WeightKind::fp8) {
    return published.kind == WeightKind::fp8 ? published : WeightFormat::fp8_blocks();
  }
  return {choice.kind};
}

std::int64_t vocabulary_run_rows(const ModelSpec& spec) {
  constexpr std::int64_t kMultiple = 64;
  return std::max(kMultiple, kVocabularyRunElements / spec.hidden / kMultiple * kMultiple);
}

std::vector<PublishedMatrix> unit_matrices(const ModelSpec& spec, const UnitId& id,
                                           bool experts_fused) {
  switch (id.kind) {
    case UnitKind::embedding:
      return {embedding_matrix(spec)};
    case UnitKind::head:
      return {head_matrix(spec)};
    case UnitKind::final_norm:
      return {final_norm_matrix(spec)};
    case UnitKind::attention:
      return attention_matrices(spec, id.layer);
    case UnitKind::feed_forward:
      return feed_forward_matrices(spec, id.layer);
    case UnitKind::expert:
      return expert_matrices(spec, id.layer, id.index, experts_fused);
  }
  TAILOR_CHECK(false, "unit kind");
}

StoreLayout make_layout(const ModelSpec& spec, const StoreFormats& formats, bool experts_fused,
                        const std::function<WeightFormat(const PublishedMatrix&)>& published) {
  return LayoutMaker(spec, formats, experts_fused, published).make();
}

std::int64_t StoreLayout::bytes() const {
  std::int64_t total = 0;
  for (const File& file : files) total += file.bytes;
  return total;
}

void StoreLayout::index() {
  by_id_.clear();
  for (std::size_t i = 0; i < units.size(); ++i) by_id_[units[i].id] = i;
}

const StoredUnit* StoreLayout::find(const UnitId& id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : &units[found->second];
}

}  // namespace tailor
