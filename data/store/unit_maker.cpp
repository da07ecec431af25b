#include "data/store/unit_maker.h"

#include <algorithm>

#include "base/error.h"
#include "base/units.h"
#include "data/quant/codec.h"

namespace tailor {
namespace {

bool is_vocabulary(UnitKind kind) { return kind == UnitKind::embedding || kind == UnitKind::head; }

bool in_blocks(const WeightFormat& format) {
  return format.kind == WeightKind::fp8 && format.block_rows > 1;
}

/// Rows that are read and encoded together: few enough to stay in the second-level cache, whole
/// blocks of fp8.
std::int64_t rows_together(const MatrixPlace& place, const WeightFormat& form) {
  constexpr std::int64_t kElements = std::int64_t{1} << 18, kBlock = 128, kLines = 32;
  const std::int64_t multiple = in_blocks(place.format) || in_blocks(form) ? kBlock : kLines;
  return std::min(place.rows, std::max(multiple, kElements / place.columns / multiple * multiple));
}

void grow(AlignedMemory& memory, std::int64_t bytes) {
  if (memory.size() >= bytes) return;
  memory = AlignedMemory();  // the old one goes before the new one comes
  memory = AlignedMemory(bytes, true);
}

}  // namespace

void PackPlan::index() {
  first_form.clear();
  std::size_t next = 0;
  for (const StoredUnit& unit : layout.units) {
    first_form.push_back(next);
    next += unit.matrices.size();
  }
}

std::span<const WeightFormat> PackPlan::forms_of(const StoredUnit& unit) const {
  const auto number = static_cast<std::size_t>(&unit - layout.units.data());
  return std::span(forms.of_matrix).subspan(first_form[number], unit.matrices.size());
}

std::int64_t PackPlan::source_bytes(const StoredUnit& unit) const {
  const auto of_unit = forms_of(unit);
  std::int64_t out = 0;
  for (std::size_t i = 0; i < of_unit.size(); ++i) {
    out += code_bytes(of_unit[i], unit.matrices[i].rows, unit.matrices[i].columns);
  }
  return out;
}

MakerMemory MakerMemory::larger(const MakerMemory& a, const MakerMemory& b) {
  return {std::max(a.unit, b.unit), std::max(a.source, b.source), std::max(a.rows, b.rows)};
}

UnitMaker::UnitMaker(const PackPlan& plan, std::shared_ptr<const Checkpoint> checkpoint)
    : plan_(plan), checkpoint_(std::move(checkpoint)), reader_(*checkpoint_) {}

MakerMemory UnitMaker::memory_of(const PackPlan& plan, const StoredUnit& unit) {
  MakerMemory out;
  out.unit = unit.bytes;
  const auto matrices = unit_matrices(plan.spec, unit.id, plan.forms.experts_fused);
  const auto forms = plan.forms_of(unit);
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const MatrixPlace& place = unit.matrices[i];
    const std::int64_t rows = rows_together(place, forms[i]);
    out.source = std::max(out.source, SourceReader::memory_bytes(matrices[i], forms[i], rows));
    std::int64_t bytes = rows * place.columns * 4;
    if (matrices[i].fused && forms[i].kind == WeightKind::fp8) bytes += rows * place.columns;
    if (place.format.kind == WeightKind::nf4) bytes += place.rows * place.columns / 64 * 16;
    out.rows = std::max(out.rows, bytes);
  }
  return out;
}

std::span<const std::byte> UnitMaker::make(const StoredUnit& unit, PackedUnit& packed) {
  grow(unit_, unit.bytes);
  const std::span<std::byte> bytes = unit_.bytes().first(static_cast<std::size_t>(unit.bytes));
  write_unit_header({unit.id, plan_.mark, unit.bytes, unit.matrices}, bytes);
  clear_padding(unit.matrices, bytes);
  packed = PackedUnit();
  const auto matrices = unit_matrices(plan_.spec, unit.id, plan_.forms.experts_fused);
  const auto forms = plan_.forms_of(unit);
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    check_form(unit.id, matrices[i], unit.matrices[i]);
    encode(matrices[i], forms[i], unit.matrices[i], is_vocabulary(unit.id.kind) ? unit.id.index : 0,
           packed);
  }
  packed.hash = hash_unit(bytes.data(), unit.bytes);
  return bytes;
}

void UnitMaker::check_form(const UnitId& id, const PublishedMatrix& matrix,
                           const MatrixPlace& place) const {
  const SourceMatrix source = find_source(*checkpoint_, matrix);
  const WeightFormat wanted =
      stored_format(plan_.formats, id.kind, matrix.role, matrix.columns, source.format);
  if (wanted == place.format) return;
  throw Error(Fault::bad_file,
              {"a matrix is published as " + format_text(source.format) +
                   ", the store was laid out "
                   "for " +
                   format_text(place.format) + " as its neighbours are",
               checkpoint_->where(*source.codes),
               "Pack into another folder when the download is complete, without --follow."});
}

void UnitMaker::encode(const PublishedMatrix& matrix, const WeightFormat& form,
                       const MatrixPlace& place, std::int64_t first_row, PackedUnit& packed) {
  std::byte* codes = unit_.data() + place.codes_offset;
  std::byte* scales = unit_.data() + place.scales_offset;
  if (reader_.copy_encoded(matrix, place.format, first_row, first_row + place.rows, codes,
                           scales)) {
    return;
  }
  MatrixEncoder encoder(place.format, place.rows, place.columns, codes, scales);
  const std::int64_t step = rows_together(place, form);
  grow(rows_, step * place.columns * 4);
  auto* rows = reinterpret_cast<float*>(rows_.data());
  for (std::int64_t r = 0; r < place.rows; r += step) {
    const std::int64_t end = std::min(place.rows, r + step);
    reader_.read_rows(matrix, first_row + r, first_row + end, rows);
    try {
      encoder.add_rows(r, end, rows);
    } catch (const Error& error) {
      throw Error(error.fault(),
                  {error.parts().what,
                   checkpoint_->where(*find_source(*checkpoint_, matrix).codes) +
                       (matrix.fused ? ", expert " + std::to_string(matrix.expert) : "") + ", " +
                       std::string(role_name(matrix.role)) + ", " + error.parts().where +
                       (first_row > 0 ? " counted from row " + std::to_string(first_row) : ""),
                   error.parts().mend});
    }
  }
  const EncodeStatistics statistics = encoder.finish();
  if (place.format.kind == WeightKind::f32 || place.format.kind == WeightKind::bf16) return;
  packed.squared_error += statistics.squared_error;
  packed.squares += statistics.squares;
  packed.absmax_squared_error += statistics.absmax_squared_error;
}

void UnitMaker::read_ahead(const StoredUnit& unit) {
  std::string last;
  for (const PublishedMatrix& matrix :
       unit_matrices(plan_.spec, unit.id, plan_.forms.experts_fused)) {
    if (matrix.fused && matrix.name == last) continue;  // gate and up lie in one slice
    last = matrix.name;
    const bool vocabulary = is_vocabulary(unit.id.kind);
    const std::int64_t begin = vocabulary ? unit.id.index : 0;
    reader_.read_ahead(matrix, begin, begin + (vocabulary ? unit.matrices[0].rows : matrix.rows));
  }
}

void UnitMaker::release() {
  reader_.release();
  unit_ = AlignedMemory();
  rows_ = AlignedMemory();
}

}  // namespace tailor
