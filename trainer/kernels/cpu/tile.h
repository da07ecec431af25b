#pragma once
// The register-blocked inner product all thin and blocked multiplications here are made of.

#include "trainer/kernels/simd.h"

// Registers decide the tile: 32 on AVX-512, else 16.
#if defined(__AVX512F__)
#define TAILOR_TILE_ROWS 6
#define TAILOR_TILE_VECS 4
#else
#define TAILOR_TILE_ROWS 6
#define TAILOR_TILE_VECS 2
#endif

namespace tailor {
namespace {

/// Calls body(first, size) on [0, count) in pieces of Most, then 4, 2 and 1, sizes as constants.
template <int Most, class Body>
inline void in_tiles(std::int64_t count, const Body& body, std::int64_t first = 0) {
  for (; first + Most <= count; first += Most) body(first, std::integral_constant<int, Most>{});
  if constexpr (Most > 1) in_tiles<(Most > 4 ? 4 : Most / 2)>(count, body, first);
}

/// acc[m][v] += sum over k of a[m * a_m + k * a_k] * b[k * b_k + v * lanes ...].
template <int MR, int NV, class A, class B>
inline __attribute__((always_inline)) void tile_multiply(std::int64_t K, const A* a,
                                                         std::int64_t a_m, std::int64_t a_k,
                                                         const B* b, std::int64_t b_k,
                                                         Vec<A> (&acc)[MR][NV]) {
  for (std::int64_t k = 0; k < K; ++k) {
    Vec<A> column[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) column[v] = load(b + k * b_k + v * kLanes<A>);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const A factor = a[m * a_m + k * a_k];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] += column[v] * factor;
    }
  }
}

template <int MR, int NV, class A>
inline __attribute__((always_inline)) void tile_block(std::int64_t K, const A* a, std::int64_t a_m,
                                                      std::int64_t a_k, const A* b,
                                                      std::int64_t b_k, A* c, std::int64_t c_m,
                                                      bool accumulate) {
  Vec<A> acc[MR][NV] = {};
  tile_multiply<MR, NV, A>(K, a, a_m, a_k, b, b_k, acc);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      A* to = c + m * c_m + v * kLanes<A>;
      store(to, accumulate ? load(to) + acc[m][v] : acc[m][v]);
    }
  }
}

template <int NV, class A>
inline void column_block(std::int64_t M, std::int64_t K, const A* a, std::int64_t a_m,
                         std::int64_t a_k, const A* b, std::int64_t b_k, A* c, std::int64_t c_m,
                         bool accumulate) {
  in_tiles<TAILOR_TILE_ROWS>(M, [&](std::int64_t m, auto rows) {
    tile_block<rows(), NV, A>(K, a + m * a_m, a_m, a_k, b, b_k, c + m * c_m, c_m, accumulate);
  });
}

/// c[M, N] (+)= a[M, K] b[K, N]; a has any strides, b and c are row-major, N a multiple of the
/// lanes of A. The sum over k runs in order, in one accumulator, for every element, and is then
/// added to c: what many calls add up is rounded once a call, not once a product.
template <class A>
inline void multiply(std::int64_t M, std::int64_t N, std::int64_t K, const A* a, std::int64_t a_m,
                     std::int64_t a_k, const A* b, std::int64_t b_k, A* c, std::int64_t c_m,
                     bool accumulate) {
  in_tiles<TAILOR_TILE_VECS>(N / kLanes<A>, [&](std::int64_t first, auto vectors) {
    const std::int64_t n = first * kLanes<A>;
    column_block<vectors(), A>(M, K, a, a_m, a_k, b + n, b_k, c + n, c_m, accumulate);
  });
}

template <class A>
constexpr std::int64_t pad_to_lanes(std::int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

/// rows x columns of S, `stride` apart, as A with rows `padded` apart; the padding is zero.
template <class S, class A>
inline void widen(std::int64_t rows, std::int64_t columns, const S* from, std::int64_t stride,
                  A* to, std::int64_t padded) {
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int64_t i = 0;
    for (; i < columns; i += kLanes<A>) {
      store(to + r * padded + i, load_up_to(from + r * stride + i, columns - i));
    }
    for (; i < padded; i += kLanes<A>) store(to + r * padded + i, Vec<A>{});
  }
}

/// The transpose of rows x columns of A: to[c * to_stride + r].
template <class A>
inline void transpose(std::int64_t rows, std::int64_t columns, const A* from,
                      std::int64_t from_stride, A* to, std::int64_t to_stride) {
  constexpr std::int64_t kBlock = 16;
  for (std::int64_t r0 = 0; r0 < rows; r0 += kBlock) {
    for (std::int64_t c = 0; c < columns; ++c) {
      for (std::int64_t r = r0; r < rows && r < r0 + kBlock; ++r) {
        to[c * to_stride + r] = from[r * from_stride + c];
      }
    }
  }
}

}  // namespace
}  // namespace tailor
