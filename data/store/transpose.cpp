#include "data/store/transpose.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "data/store/halves.h"

namespace tailor {
namespace {

constexpr std::int64_t kTile = 64;  // elements a side

/// Sixteen bytes of T in a register, and the two halves of two of them shuffled together.
template <class T>
struct Lanes {
  static constexpr std::int64_t kCount = 16 / static_cast<std::int64_t>(sizeof(T));
  using Vector __attribute__((vector_size(16))) = T;

  template <int first, std::size_t... i>
  static Vector zip(Vector a, Vector b, std::index_sequence<i...>) {
    return __builtin_shufflevector(
        a, b, (first + static_cast<int>(i / 2) + (i % 2 == 0 ? 0 : static_cast<int>(kCount)))...);
  }
  static Vector low(Vector a, Vector b) {
    return zip<0>(a, b, std::make_index_sequence<static_cast<std::size_t>(kCount)>());
  }
  static Vector high(Vector a, Vector b) {
    return zip<static_cast<int>(kCount / 2)>(
        a, b, std::make_index_sequence<static_cast<std::size_t>(kCount)>());
  }
};

/// A square of Lanes::kCount elements a side: shuffling its first half of rows into its second, as
/// often as the logarithm of the side says, turns it on its side.
template <class T>
void turn_square(const T* in, std::int64_t in_stride, T* out) {
  using L = Lanes<T>;
  constexpr std::int64_t n = L::kCount;
  typename L::Vector a[static_cast<std::size_t>(n)], b[static_cast<std::size_t>(n)];
  for (std::int64_t i = 0; i < n; ++i) std::memcpy(&a[i], in + i * in_stride, sizeof a[i]);
  for (std::int64_t round = 1; round < n; round *= 2) {
    for (std::int64_t i = 0; i < n / 2; ++i) {
      b[2 * i] = L::low(a[i], a[i + n / 2]);
      b[2 * i + 1] = L::high(a[i], a[i + n / 2]);
    }
    std::copy(b, b + n, a);
  }
  for (std::int64_t i = 0; i < n; ++i) std::memcpy(out + i * kTile, &a[i], sizeof a[i]);
}

/// Tile by tile through one that stays in the first-level cache; `store(row, column, line, count)`
/// takes `count` elements of the turned matrix.
template <class T, class Store>
void turn(const MatrixView<T>& in, const Store& store) {
  constexpr std::int64_t n = Lanes<T>::kCount;
  alignas(64) T tile[static_cast<std::size_t>(kTile * kTile)];
  for (std::int64_t c0 = 0; c0 < in.columns; c0 += kTile) {
    const std::int64_t wide = std::min(kTile, in.columns - c0);
    for (std::int64_t r0 = 0; r0 < in.rows; r0 += kTile) {
      const std::int64_t high = std::min(kTile, in.rows - r0);
      const T* from = in.from + r0 * in.stride + c0;
      const std::int64_t whole_high = high / n * n, whole_wide = wide / n * n;
      for (std::int64_t r = 0; r < whole_high; r += n) {
        for (std::int64_t c = 0; c < whole_wide; c += n) {
          turn_square(from + r * in.stride + c, in.stride, tile + c * kTile + r);
        }
      }
      for (std::int64_t r = 0; r < high; ++r) {
        for (std::int64_t c = r < whole_high ? whole_wide : 0; c < wide; ++c) {
          tile[c * kTile + r] = from[r * in.stride + c];
        }
      }
      for (std::int64_t c = 0; c < wide; ++c) store(c0 + c, r0, tile + c * kTile, high);
    }
  }
}

template <class T>
void turn_into(const MatrixView<T>& in, T* out, std::int64_t out_stride) {
  turn(in, [&](std::int64_t row, std::int64_t column, const T* line, std::int64_t count) {
    std::memcpy(out + row * out_stride + column, line, static_cast<std::size_t>(count) * sizeof(T));
  });
}

}  // namespace

void transpose(const MatrixView<std::uint8_t>& in, std::uint8_t* out, std::int64_t out_stride) {
  turn_into(in, out, out_stride);
}
void transpose(const MatrixView<std::uint16_t>& in, std::uint16_t* out, std::int64_t out_stride) {
  turn_into(in, out, out_stride);
}
void transpose(const MatrixView<std::uint32_t>& in, std::uint32_t* out, std::int64_t out_stride) {
  turn_into(in, out, out_stride);
}

void transpose_bf16(const MatrixView<std::uint16_t>& in, float* out, std::int64_t out_stride) {
  turn(in,
       [&](std::int64_t row, std::int64_t column, const std::uint16_t* line, std::int64_t count) {
         widen(Dtype::bf16, reinterpret_cast<const std::byte*>(line), count,
               out + row * out_stride + column);
       });
}
void transpose_half(const MatrixView<std::uint16_t>& in, float* out, std::int64_t out_stride) {
  turn(in,
       [&](std::int64_t row, std::int64_t column, const std::uint16_t* line, std::int64_t count) {
         widen(Dtype::f16, reinterpret_cast<const std::byte*>(line), count,
               out + row * out_stride + column);
       });
}

}  // namespace tailor
