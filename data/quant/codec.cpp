#include "data/quant/codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/units.h"
#include "data/quant/numbers.h"
#include "data/quant/tables.h"

namespace tailor {
namespace {

template <class T>
T read_at(const std::byte* from, std::int64_t index) {
  T value;
  std::memcpy(&value, from + index * static_cast<std::int64_t>(sizeof(T)), sizeof value);
  return value;
}

/// Element by element access to a stored matrix: the code, the scale, the decoded value.
class Reader {
 public:
  explicit Reader(const EncodedMatrix& matrix) : matrix_(matrix) {
    const WeightFormat& format = matrix.format;
    switch (format.kind) {
      case WeightKind::f32:
      case WeightKind::bf16:
        break;
      case WeightKind::fp8:
        TAILOR_CHECK(format.block_rows > 0 && format.block_columns >= 0);
        block_columns_ = format.block_columns == 0 ? matrix.columns : format.block_columns;
        scales_across_ = block_columns_ == 0 ? 0 : div_ceil(matrix.columns, block_columns_);
        break;
      case WeightKind::int4:
        TAILOR_CHECK(format.group > 0);
        scales_across_ = div_ceil(matrix.columns, format.group);
        break;
      case WeightKind::nf4:
        second_ = matrix.scales + 4;
        bytes_ = second_ + 4 * div_ceil(div_ceil(matrix.rows * matrix.columns, 64), 256);
        break;
    }
  }

  unsigned code(std::int64_t row, std::int64_t column) const {
    switch (matrix_.format.kind) {
      case WeightKind::fp8:
        return read_at<std::uint8_t>(matrix_.codes, row * matrix_.columns + column);
      case WeightKind::int4: {
        const auto word =
            read_at<std::uint32_t>(matrix_.codes, row * div_ceil(matrix_.columns, 8) + column / 8);
        return word >> (4U * static_cast<unsigned>(column % 8)) & 15U;
      }
      case WeightKind::nf4: {
        const std::int64_t element = row * matrix_.columns + column;
        const unsigned byte = read_at<std::uint8_t>(matrix_.codes, element / 2);
        return element % 2 == 0 ? byte >> 4U : byte & 15U;
      }
      default:
        TAILOR_CHECK(false, "a format without codes");
    }
  }

  float scale(std::int64_t row, std::int64_t column) const {
    switch (matrix_.format.kind) {
      case WeightKind::fp8:
        return read_at<float>(matrix_.scales, row / matrix_.format.block_rows * scales_across_ +
                                                  column / block_columns_);
      case WeightKind::int4:
        return bf16_to_float(read_at<std::uint16_t>(
            matrix_.scales, row * scales_across_ + column / matrix_.format.group));
      case WeightKind::nf4: {
        // Two roundings, as bitsandbytes stores the product before it adds the offset. This file is
        // compiled without contraction to fused operations.
        const std::int64_t block = (row * matrix_.columns + column) / 64;
        const float product = kDynamicMap[scale_byte(block)] * second(block);
        return product + read_at<float>(matrix_.scales, 0);
      }
      default:
        TAILOR_CHECK(false, "a format without scales");
    }
  }

  std::uint8_t scale_byte(std::int64_t block) const { return read_at<std::uint8_t>(bytes_, block); }
  float second(std::int64_t block) const { return read_at<float>(second_, block / 256); }

  float value(std::int64_t row, std::int64_t column) const {
    const std::int64_t element = row * matrix_.columns + column;
    switch (matrix_.format.kind) {
      case WeightKind::f32:
        return read_at<float>(matrix_.codes, element);
      case WeightKind::bf16:
        return bf16_to_float(read_at<std::uint16_t>(matrix_.codes, element));
      case WeightKind::fp8: {
        const unsigned bits = code(row, column);
        const float size =
            plain_nan(e4m3_magnitude(static_cast<std::uint8_t>(bits & 127U)) * scale(row, column));
        return (bits & 128U) != 0 ? -size : size;
      }
      case WeightKind::int4: {
        const auto number = static_cast<float>(static_cast<int>(code(row, column)) - 8);
        return bf16_to_float(bf16_from_float(number * scale(row, column)));
      }
      case WeightKind::nf4:
        return plain_nan(kNf4[code(row, column)] * scale(row, column));
    }
    TAILOR_CHECK(false, "weight kind");
  }

 private:
  const EncodedMatrix& matrix_;
  std::int64_t block_columns_ = 0, scales_across_ = 0;
  const std::byte *second_ = nullptr, *bytes_ = nullptr;
};

/// Half of the wider gap beside entry i of an ascending table whose ends are met exactly, or at
/// `low` .. `high` where values beyond its ends are clamped to it.
template <std::size_t size>
double half_gap(const float (&table)[size], std::size_t i, double low, double high) {
  const double here = static_cast<double>(table[i]);
  const double below = i == 0 ? here - low : (here - static_cast<double>(table[i - 1])) / 2;
  const double above = i + 1 == size ? high - here : (static_cast<double>(table[i + 1]) - here) / 2;
  return std::max(below, above);
}

std::uint16_t to_bf16(const EncodedMatrix& matrix, float value) {
  // The sign of fp8's NaN stays, as the kernels' table of magnitudes has it.
  const auto bits = bf16_from_float(value);
  const bool negative_nan =
      matrix.format.kind == WeightKind::fp8 && std::isnan(value) && std::signbit(value);
  return negative_nan ? static_cast<std::uint16_t>(bits | 0x8000U) : bits;
}

}  // namespace

void decode_rows(const EncodedMatrix& matrix, std::int64_t row_begin, std::int64_t row_end,
                 float* out) {
  const Reader reader(matrix);
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    for (std::int64_t c = 0; c < matrix.columns; ++c) *out++ = reader.value(row, c);
  }
}

void decode_rows_bf16(const EncodedMatrix& matrix, std::int64_t row_begin, std::int64_t row_end,
                      std::uint16_t* out) {
  if (matrix.format.kind == WeightKind::bf16) {
    const std::int64_t row_bytes = matrix.columns * 2;
    std::memcpy(out, matrix.codes + row_begin * row_bytes,
                static_cast<std::size_t>((row_end - row_begin) * row_bytes));
    return;
  }
  const Reader reader(matrix);
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    for (std::int64_t c = 0; c < matrix.columns; ++c) {
      *out++ = to_bf16(matrix, reader.value(row, c));
    }
  }
}

void error_bounds(const EncodedMatrix& matrix, std::int64_t row, const float* values,
                  double* bounds) {
  const Reader reader(matrix);
  for (std::int64_t c = 0; c < matrix.columns; ++c) {
    const double size = std::fabs(static_cast<double>(values[c]));
    double bound = 0, scale = 0;
    switch (matrix.format.kind) {
      case WeightKind::f32:
      case WeightKind::bf16:
        break;
      case WeightKind::fp8: {
        scale = std::fabs(static_cast<double>(reader.scale(row, c)));
        // The binade of the value in scales: e4m3 has 8 steps in it, and none below 2^-6.
        const double at = std::min(size / scale, 448.0);
        const double step = at < 0x1p-6 ? 0x1p-9 : std::ldexp(1.0, std::ilogb(at) - 3);
        bound = std::max(scale * step / 2, size - 448 * scale);
        break;
      }
      case WeightKind::int4: {
        const auto signed_scale = static_cast<double>(reader.scale(row, c));
        scale = std::fabs(signed_scale);
        const bool towards_eight = (values[c] < 0) == (signed_scale > 0);
        bound = std::max(scale / 2, size - (towards_eight ? 8 : 7) * scale);
        break;
      }
      case WeightKind::nf4: {
        const std::int64_t block = (row * matrix.columns + c) / 64;
        const double stored = static_cast<double>(reader.scale(row, c));
        // bitsandbytes divides by 1e-38 where the largest value is smaller.
        const double off = half_gap(kDynamicMap, reader.scale_byte(block), -1, 1) *
                               static_cast<double>(reader.second(block)) +
                           1e-38;
        const unsigned code = reader.code(row, c);
        scale = std::max(stored + off, 0.0);  // the largest the block's absmax can have been
        bound =
            half_gap(kNf4, code, -1, 1) * scale + std::fabs(static_cast<double>(kNf4[code])) * off;
        break;
      }
    }
    if (matrix.format.kind == WeightKind::int4 || matrix.format.kind == WeightKind::bf16) {
      // Half a unit of bfloat16 at the decoded value, which is at most size + bound; or of its
      // denormals.
      bound += std::max(0x1p-8 * (size + bound), 0x1p-134);
    }
    // Quotient, product and scale are rounded to float32, each by 2^-24 of the value: a value half
    // way between two codes may fall to either side.
    bounds[c] = bound + 0x1p-20 * scale + 0x1p-22 * size;
  }
}

}  // namespace tailor
