#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "data/checkpoint/published.h"
#include "data/quant/format.h"

namespace tailor {

/// What is read, hashed and kept as one piece: the routed experts one by one, the rest of a layer
/// in two pieces, the vocabulary matrices in runs of rows.
enum class UnitKind : std::uint32_t {
  embedding = 1,
  head = 2,
  final_norm = 3,
  attention = 4,     ///< input norm, q, k, v, o
  feed_forward = 5,  ///< post norm, router, dense MLP or shared expert
  expert = 6,
};
const char* unit_kind_name(UnitKind kind);

struct UnitId {
  UnitKind kind = UnitKind::expert;
  std::int64_t layer = 0;  ///< 0 where there is none
  std::int64_t index = 0;  ///< expert; first row of a vocabulary run; else 0
  auto operator<=>(const UnitId&) const = default;
};
/// "layer 3, expert 17": for messages.
std::string unit_text(const UnitId& id);

/// One matrix of a unit. Offsets are from the start of the unit and multiples of 64.
struct MatrixPlace {
  MatrixRole role;
  WeightFormat format;
  std::int64_t rows = 0, columns = 0;
  std::int64_t codes_offset = 0, codes_bytes = 0, scales_offset = 0, scales_bytes = 0;
  bool operator==(const MatrixPlace&) const = default;

  EncodedMatrix in(const std::byte* unit) const {
    return {format, rows, columns, unit + codes_offset, unit + scales_offset};
  }
};

constexpr std::int64_t kUnitAlignment = 4096;
constexpr std::int64_t kUnitHeaderBytes = 4096;

/// A unit's first 4,096 bytes in a store say what it is, so that a tile in memory can be checked
/// against what was asked for. docs/formats/store.md has them to the byte.
struct UnitHeader {
  UnitId id;
  std::array<std::byte, 16> model{};  ///< which checkpoint it was made from
  std::int64_t bytes = 0;             ///< of the unit, header and padding included
  std::vector<MatrixPlace> matrices;
  bool operator==(const UnitHeader&) const = default;
};

/// Writes `header` into the first kUnitHeaderBytes of `unit`, all of them.
void write_unit_header(const UnitHeader& header, std::span<std::byte> unit);
/// Throws Error{bad_file} naming `where`: no header, another version, sizes that contradict each
/// other.
UnitHeader read_unit_header(std::span<const std::byte> unit, const std::string& where);

/// Whether there can be a matrix of these sizes: sides of 1 to 2^31, 2^44 elements or fewer, groups
/// and blocks as its format has them and no others. The bytes of 32 such matrices fit in 64 bits.
bool matrix_possible(const WeightFormat& format, std::int64_t rows, std::int64_t columns);

/// Places matrices in a unit: codes one after the other, then scales, so that bfloat16 matrices of
/// one input lie side by side. Fills offsets and returns the unit's bytes.
std::int64_t place_matrices(std::vector<MatrixPlace>& matrices);

/// Zeroes the bytes of a unit that belong to no matrix, behind the header.
void clear_padding(const std::vector<MatrixPlace>& matrices, std::span<std::byte> unit);

}  // namespace tailor
