#pragma once
// Frozen weights from their stored form, the same bits as data/quant/codec.h at every level.
// Nothing here may be fused: level.cpp contracts products and sums.

#include <algorithm>

#include "data/quant/format.h"
#include "data/quant/tables.h"
#include "trainer/kernels/cpu/lookup.h"

namespace tailor {
namespace {

/// Columns to decode, of int4 from a multiple of its group on. `ahead`: how far behind a code in
/// memory lies the one to ask for meanwhile.
struct Columns {
  std::int64_t begin, end;
  std::int64_t ahead = kPrefetchBytes;
};

constexpr float kInt4Codes[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

template <Store how, class S>
void dequantise_int4(std::int64_t row_begin, std::int64_t row_end, const EncodedMatrix& matrix,
                     const Columns& part, S* out, std::int64_t out_stride) {
  const std::int64_t columns = matrix.columns, group = matrix.format.group;
  const std::int64_t row_bytes = (columns + 7) / 8 * 4, groups = (columns + group - 1) / group;
  for (std::int64_t row = row_begin; row < row_end; ++row, out += out_stride) {
    const auto* codes = reinterpret_cast<const std::uint8_t*>(matrix.codes) + row * row_bytes;
    const auto* scales =
        reinterpret_cast<const Bf16*>(matrix.scales) + row * groups + part.begin / group;
    for (std::int64_t begin = part.begin; begin < part.end; begin += group) {
      const std::int64_t n = std::min(group, part.end - begin);
      const Sixteen<S, false> values(kInt4Codes, to_float(*scales++), true);
      values.template expand<how>(codes, begin, n, out + (begin - part.begin), part.ahead);
    }
  }
}

constexpr std::int64_t kNf4Block = 64;

template <Store how, class S>
void dequantise_nf4(std::int64_t row_begin, std::int64_t row_end, const EncodedMatrix& matrix,
                    const Columns& part, S* out, std::int64_t out_stride) {
  const std::int64_t columns = matrix.columns;
  const std::int64_t blocks = (matrix.rows * columns + kNf4Block - 1) / kNf4Block;
  const auto* codes = reinterpret_cast<const std::uint8_t*>(matrix.codes);
  const auto* floats = reinterpret_cast<const float*>(matrix.scales);
  const float offset = floats[0], *second = floats + 1;
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(second + (blocks + 255) / 256);
  for (std::int64_t row = row_begin; row < row_end; ++row, out += out_stride) {
    for (std::int64_t begin = part.begin; begin < part.end;) {
      const std::int64_t element = row * columns + begin, block = element / kNf4Block;
      const std::int64_t n = std::min(part.end - begin, (block + 1) * kNf4Block - element);
      float product = kDynamicMap[bytes[block]] * second[block / 256];
      asm("" : "+x"(product));  // rounded, as bitsandbytes stores it: not fused with the sum
      const Sixteen<S, true> values(kNf4, product + offset, false);
      values.template expand<how>(codes, element, n, out + (begin - part.begin), part.ahead);
      begin += n;
    }
  }
}

/// The tables of a row of blocks stand side by side in scratch, and rows are written from left to
/// right: memory likes that better than one block after another.
template <Store how, class S>
void dequantise_fp8(std::int64_t row_begin, std::int64_t row_end, const EncodedMatrix& matrix,
                    const Columns& part, S* out, std::int64_t out_stride) {
  const std::int64_t columns = matrix.columns, block_rows = matrix.format.block_rows;
  const std::int64_t width =
      matrix.format.block_columns == 0 ? columns : matrix.format.block_columns;
  if (part.begin == part.end) return;
  const std::int64_t across = (columns + width - 1) / width, first = part.begin / width;
  const std::int64_t count = (part.end + width - 1) / width - first;
  const Scratch<Magnitudes<S>> tables(count);
  for (std::int64_t row = row_begin; row < row_end; ++row, out += out_stride) {
    if (row == row_begin || row % block_rows == 0) {
      const auto* scales =
          reinterpret_cast<const float*>(matrix.scales) + row / block_rows * across + first;
      for (std::int64_t b = 0; b < count; ++b) tables.get()[b].fill(scales[b]);
    }
    const auto* codes = reinterpret_cast<const std::uint8_t*>(matrix.codes) + row * columns;
    for (std::int64_t b = 0; b < count; ++b) {
      const std::int64_t begin = std::max(part.begin, (first + b) * width);
      const std::int64_t end = std::min(part.end, (first + b + 1) * width);
      expand_fp8<how>(tables.get()[b], codes + begin, end - begin, out + (begin - part.begin),
                      part.ahead);
    }
  }
}

// ---- not quantised

inline void convert(const float* from, std::int64_t n, float* out) {
  std::memcpy(out, from, static_cast<std::size_t>(n) * sizeof(float));
}
inline void convert(const Bf16* from, std::int64_t n, Bf16* out) {
  std::memcpy(out, from, static_cast<std::size_t>(n) * sizeof(Bf16));
}
inline void convert(const Bf16* from, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; i += kLanes<float>) {
    store_up_to(out + i, load_up_to(from + i, n - i), n - i);
  }
}
inline void convert(const float* from, std::int64_t n, Bf16* out) {
  std::int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) store_values(out + i, load(from + i));
  if (i == n) return;
  Bf16 last[kLanes<float>];
  store_values(last, load_part(from + i, n - i));
  std::memcpy(out + i, last, static_cast<std::size_t>(n - i) * sizeof(Bf16));
}

template <class S, class Source>
void convert_rows(std::int64_t row_begin, std::int64_t row_end, const EncodedMatrix& matrix, S* out,
                  std::int64_t out_stride) {
  const auto* from = reinterpret_cast<const Source*>(matrix.codes);
  for (std::int64_t row = row_begin; row < row_end; ++row, out += out_stride) {
    convert(from + row * matrix.columns, matrix.columns, out);
  }
}

template <class S>
void dequantise(std::int64_t row_begin, std::int64_t row_end, const EncodedMatrix& matrix, S* out,
                std::int64_t out_stride) {
  if constexpr (std::is_same_v<S, double>) {  // the float, widened
    const Scratch<float> values(matrix.columns);
    for (std::int64_t row = row_begin; row < row_end; ++row, out += out_stride) {
      dequantise(row, row + 1, matrix, values.get(), matrix.columns);
      for (std::int64_t c = 0; c < matrix.columns; ++c) {
        out[c] = static_cast<double>(values.get()[c]);
      }
    }
  } else {
    constexpr std::int64_t kLine = 64;  // elements, so a multiple of a cache line
    const std::int64_t rows = row_end - row_begin;
    const Columns all{0, matrix.columns};
    switch (matrix.format.kind) {
      case WeightKind::f32:
        return convert_rows<S, float>(row_begin, row_end, matrix, out, out_stride);
      case WeightKind::bf16:
        return convert_rows<S, Bf16>(row_begin, row_end, matrix, out, out_stride);
      case WeightKind::fp8: {
        const std::int64_t width = matrix.format.block_columns;
        const std::int64_t run = width == 0 ? kLine : width;  // one block a row
        return with_store(rows, matrix.columns, out, out_stride, run, [&](auto how) {
          dequantise_fp8<how()>(row_begin, row_end, matrix, all, out, out_stride);
        });
      }
      case WeightKind::int4: {
        const std::int64_t group = matrix.format.group;
        const std::int64_t run = group >= matrix.columns ? kLine : group;
        return with_store(rows, matrix.columns, out, out_stride, run, [&](auto how) {
          dequantise_int4<how()>(row_begin, row_end, matrix, all, out, out_stride);
        });
      }
      case WeightKind::nf4: {
        const std::int64_t run = matrix.columns % kNf4Block == 0 ? kNf4Block : 1;
        return with_store(rows, matrix.columns, out, out_stride, run, [&](auto how) {
          dequantise_nf4<how()>(row_begin, row_end, matrix, all, out, out_stride);
        });
      }
    }
  }
}

}  // namespace
}  // namespace tailor
