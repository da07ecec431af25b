#include "data/quant/format.h"

#include "base/error.h"
#include "base/units.h"

namespace tailor {

WeightFormat WeightFormat::int4_for(std::int64_t columns) {
  for (const std::int64_t group : {128, 64, 32}) {
    if (columns % group == 0) return int4(group);
  }
  return int4(columns);
}

std::string format_text(const WeightFormat& format) {
  switch (format.kind) {
    case WeightKind::f32:
      return "f32";
    case WeightKind::bf16:
      return "bf16";
    case WeightKind::fp8:
      return "fp8 " + std::to_string(format.block_rows) + "x" +
             (format.block_columns == 0 ? "all" : std::to_string(format.block_columns));
    case WeightKind::int4:
      return "int4 g" + std::to_string(format.group);
    case WeightKind::nf4:
      return "nf4";
  }
  TAILOR_CHECK(false, "weight kind");
}

std::int64_t code_bytes(const WeightFormat& format, std::int64_t rows, std::int64_t columns) {
  const std::int64_t elements = checked_multiply(rows, columns);
  switch (format.kind) {
    case WeightKind::f32:
      return checked_multiply(elements, 4);
    case WeightKind::bf16:
      return checked_multiply(elements, 2);
    case WeightKind::fp8:
      return elements;
    case WeightKind::int4:
      return rows * div_ceil(columns, 8) * 4;
    case WeightKind::nf4:
      return div_ceil(elements, 2);
  }
  TAILOR_CHECK(false, "weight kind");
}

std::int64_t scale_bytes(const WeightFormat& format, std::int64_t rows, std::int64_t columns) {
  switch (format.kind) {
    case WeightKind::f32:
    case WeightKind::bf16:
      return 0;
    case WeightKind::fp8: {
      const std::int64_t across = format.block_columns == 0 ? columns : format.block_columns;
      return div_ceil(rows, format.block_rows) * div_ceil(columns, across) * 4;
    }
    case WeightKind::int4:
      return rows * div_ceil(columns, format.group) * 2;
    case WeightKind::nf4: {
      const std::int64_t blocks = div_ceil(checked_multiply(rows, columns), 64);
      return 4 + div_ceil(blocks, 256) * 4 + blocks;
    }
  }
  TAILOR_CHECK(false, "weight kind");
}

}  // namespace tailor
