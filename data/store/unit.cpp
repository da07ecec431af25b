#include "data/store/unit.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/units.h"

namespace tailor {
namespace {

constexpr std::uint64_t kMagic = 0x454C49544C494154ULL;  // "TAILTILE"
constexpr std::uint32_t kVersion = 1;
constexpr std::int64_t kMatrixAlignment = 64;
constexpr std::uint32_t kMatricesMax = 32;

struct RawHeader {
  std::uint64_t magic;
  std::uint32_t version, kind;
  std::int64_t layer, index, bytes;
  std::byte model[16];
  std::uint32_t matrix_count, zero;
};
static_assert(sizeof(RawHeader) == 64);

struct RawMatrix {
  std::uint32_t role, kind;
  std::int64_t group, block_rows, block_columns, rows, columns;
  std::int64_t codes_offset, codes_bytes, scales_offset, scales_bytes;
  std::int64_t zero[2];
};
static_assert(sizeof(RawMatrix) == 96);
static_assert(sizeof(RawHeader) + kMatricesMax * sizeof(RawMatrix) <= kUnitHeaderBytes);

[[noreturn]] void refuse(const std::string& what, const std::string& where) {
  throw Error(Fault::bad_file, {what, where,
                                "The store is damaged or of another version of Tailor: check it "
                                "with `tailor model verify`, or pack it again."});
}

/// The roles of published.h.
bool known_role(std::uint32_t role) {
  return std::string_view(role_name(static_cast<MatrixRole>(role))) != "?";
}

}  // namespace

const char* unit_kind_name(UnitKind kind) {
  switch (kind) {
    case UnitKind::embedding:
      return "embedding";
    case UnitKind::head:
      return "head";
    case UnitKind::final_norm:
      return "final norm";
    case UnitKind::attention:
      return "attention";
    case UnitKind::feed_forward:
      return "feed-forward";
    case UnitKind::expert:
      return "expert";
  }
  return "?";
}

std::string unit_text(const UnitId& id) {
  switch (id.kind) {
    case UnitKind::final_norm:
      return "final norm";
    case UnitKind::embedding:
    case UnitKind::head:
      return std::string(unit_kind_name(id.kind)) + " rows from " + std::to_string(id.index);
    case UnitKind::expert:
      return "layer " + std::to_string(id.layer) + ", expert " + std::to_string(id.index);
    default:
      return "layer " + std::to_string(id.layer) + ", " + unit_kind_name(id.kind);
  }
}

void write_unit_header(const UnitHeader& header, std::span<std::byte> unit) {
  TAILOR_CHECK(static_cast<std::int64_t>(unit.size()) >= kUnitHeaderBytes &&
               header.matrices.size() <= kMatricesMax);
  std::memset(unit.data(), 0, static_cast<std::size_t>(kUnitHeaderBytes));
  RawHeader raw{};
  raw.magic = kMagic;
  raw.version = kVersion;
  raw.kind = static_cast<std::uint32_t>(header.id.kind);
  raw.layer = header.id.layer;
  raw.index = header.id.index;
  raw.bytes = header.bytes;
  std::memcpy(raw.model, header.model.data(), header.model.size());
  raw.matrix_count = static_cast<std::uint32_t>(header.matrices.size());
  std::memcpy(unit.data(), &raw, sizeof raw);
  std::byte* to = unit.data() + sizeof raw;
  for (const MatrixPlace& place : header.matrices) {
    RawMatrix matrix{};
    matrix.role = static_cast<std::uint32_t>(place.role);
    matrix.kind = static_cast<std::uint32_t>(place.format.kind);
    matrix.group = place.format.group;
    matrix.block_rows = place.format.block_rows;
    matrix.block_columns = place.format.block_columns;
    matrix.rows = place.rows;
    matrix.columns = place.columns;
    matrix.codes_offset = place.codes_offset;
    matrix.codes_bytes = place.codes_bytes;
    matrix.scales_offset = place.scales_offset;
    matrix.scales_bytes = place.scales_bytes;
    std::memcpy(to, &matrix, sizeof matrix);
    to += sizeof matrix;
  }
}

UnitHeader read_unit_header(std::span<const std::byte> unit, const std::string& where) {
  if (static_cast<std::int64_t>(unit.size()) < kUnitHeaderBytes) {
    refuse("tile of " + std::to_string(unit.size()) + " bytes is shorter than its header", where);
  }
  RawHeader raw;
  std::memcpy(&raw, unit.data(), sizeof raw);
  if (raw.magic != kMagic) refuse("no tile begins here", where);
  if (raw.version != kVersion) {
    refuse("tile of version " + std::to_string(raw.version) + ", this program reads version " +
               std::to_string(kVersion),
           where);
  }
  if (raw.kind < 1 || raw.kind > 6 || raw.matrix_count > kMatricesMax) {
    refuse("tile header is not one of ours", where);
  }
  UnitHeader out;
  out.id = {static_cast<UnitKind>(raw.kind), raw.layer, raw.index};
  std::memcpy(out.model.data(), raw.model, out.model.size());
  out.bytes = raw.bytes;
  const std::byte* from = unit.data() + sizeof raw;
  for (std::uint32_t i = 0; i < raw.matrix_count; ++i, from += sizeof(RawMatrix)) {
    RawMatrix matrix;
    std::memcpy(&matrix, from, sizeof matrix);
    MatrixPlace place{};
    place.role = static_cast<MatrixRole>(matrix.role);
    place.format.kind = static_cast<WeightKind>(matrix.kind);
    place.format.group = matrix.group;
    place.format.block_rows = matrix.block_rows;
    place.format.block_columns = matrix.block_columns;
    place.rows = matrix.rows;
    place.columns = matrix.columns;
    place.codes_offset = matrix.codes_offset;
    place.codes_bytes = matrix.codes_bytes;
    place.scales_offset = matrix.scales_offset;
    place.scales_bytes = matrix.scales_bytes;
    const auto inside = [&](std::int64_t offset, std::int64_t bytes) {
      return offset >= kUnitHeaderBytes && offset % kMatrixAlignment == 0 && bytes >= 0 &&
             offset <= raw.bytes && bytes <= raw.bytes - offset;
    };
    if (!known_role(matrix.role) || !matrix_possible(place.format, place.rows, place.columns)) {
      refuse("tile header names a matrix that cannot be", where);
    }
    if (!inside(place.codes_offset, place.codes_bytes) ||
        !inside(place.scales_offset, place.scales_bytes) ||
        place.codes_bytes != code_bytes(place.format, place.rows, place.columns) ||
        place.scales_bytes != scale_bytes(place.format, place.rows, place.columns)) {
      refuse("tile header contradicts itself about its " + std::string(role_name(place.role)) +
                 " matrix",
             where);
    }
    out.matrices.push_back(place);
  }
  return out;
}

bool matrix_possible(const WeightFormat& format, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kSideMax = std::int64_t{1} << 31, kElementsMax = std::int64_t{1} << 44;
  const auto side = [](std::int64_t value, std::int64_t least) {
    return value >= least && value <= kSideMax;
  };
  if (!side(rows, 1) || !side(columns, 1) || rows > kElementsMax / columns) return false;
  const bool plain = format.group == 0 && format.block_rows == 0 && format.block_columns == 0;
  switch (format.kind) {
    case WeightKind::f32:
    case WeightKind::bf16:
    case WeightKind::nf4:
      return plain;
    case WeightKind::int4:
      return side(format.group, 1) && format.block_rows == 0 && format.block_columns == 0;
    case WeightKind::fp8:
      return format.group == 0 && side(format.block_rows, 1) && side(format.block_columns, 0);
  }
  return false;
}

std::int64_t place_matrices(std::vector<MatrixPlace>& matrices) {
  std::int64_t at = kUnitHeaderBytes;
  for (MatrixPlace& place : matrices) {
    place.codes_offset = at;
    place.codes_bytes = code_bytes(place.format, place.rows, place.columns);
    at = align_up(at + place.codes_bytes, kMatrixAlignment);
  }
  for (MatrixPlace& place : matrices) {
    place.scales_offset = at;
    place.scales_bytes = scale_bytes(place.format, place.rows, place.columns);
    at = align_up(at + place.scales_bytes, kMatrixAlignment);
  }
  return align_up(at, kUnitAlignment);
}

void clear_padding(const std::vector<MatrixPlace>& matrices, std::span<std::byte> unit) {
  std::vector<std::pair<std::int64_t, std::int64_t>> parts;  // begin, end
  for (const MatrixPlace& place : matrices) {
    parts.emplace_back(place.codes_offset, place.codes_offset + place.codes_bytes);
    parts.emplace_back(place.scales_offset, place.scales_offset + place.scales_bytes);
  }
  std::sort(parts.begin(), parts.end());
  std::int64_t at = kUnitHeaderBytes;
  const auto end_of_unit = narrow<std::int64_t>(unit.size());
  parts.emplace_back(end_of_unit, end_of_unit);
  for (const auto& [begin, end] : parts) {
    if (begin > at) std::memset(unit.data() + at, 0, static_cast<std::size_t>(begin - at));
    at = std::max(at, end);
  }
}

}  // namespace tailor
