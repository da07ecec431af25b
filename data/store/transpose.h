#pragma once

#include <cstdint>

namespace tailor {

/// A matrix in memory: `rows` of `columns` elements, `stride` elements from one row to the next.
template <class T>
struct MatrixView {
  const T* from;
  std::int64_t rows, columns, stride;
};

/// Turns a matrix on its side: out[c * out_stride + r] = in[r][c]. Whole cache lines are read and
/// written, whatever the strides.
void transpose(const MatrixView<std::uint8_t>& in, std::uint8_t* out, std::int64_t out_stride);
void transpose(const MatrixView<std::uint16_t>& in, std::uint16_t* out, std::int64_t out_stride);
void transpose(const MatrixView<std::uint32_t>& in, std::uint32_t* out, std::int64_t out_stride);
/// The same with bfloat16 or IEEE half widened to float.
void transpose_bf16(const MatrixView<std::uint16_t>& in, float* out, std::int64_t out_stride);
void transpose_half(const MatrixView<std::uint16_t>& in, float* out, std::int64_t out_stride);

}  // namespace tailor
