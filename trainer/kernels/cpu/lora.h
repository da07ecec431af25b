#pragma once
// LoRA's thin products. A library's matrix product spends most of its time on set-up at these
// shapes (rank 8 to 32); these read the wide side once, and sum in A. All three hold a tile of sums
// in registers and read the wide side two vectors at a time (Pair), so its numbers are not in
// order inside a tile; the factor beside it is laid out the same way, once a call.

#include "trainer/kernels/cpu/tile.h"

// Ranks of a tile of lora_down, of two rows, and of one of lora_gradient: 32 registers, or 16.
#if defined(__AVX512F__)
#define TAILOR_DOWN_RANKS 8
#define TAILOR_GRADIENT_RANKS 8
#else
#define TAILOR_DOWN_RANKS 4
#define TAILOR_GRADIENT_RANKS 4
#endif

namespace tailor {
namespace {

template <class A>
constexpr std::int64_t pad_to_pairs(std::int64_t n) {
  return (n + kPairLanes<A> - 1) / kPairLanes<A> * kPairLanes<A>;
}

/// rows x columns of S as A, every kPairLanes of them as load_pair has them; zeros behind. A row's
/// next pair is `step` further on.
template <class S, class A>
inline void widen_pairs(std::int64_t rows, std::int64_t columns, const S* from, std::int64_t stride,
                        A* to, std::int64_t padded, std::int64_t step) {
  for (std::int64_t r = 0; r < rows; ++r) {
    A* next = to + r * padded;
    std::int64_t i = 0;
    for (; i + kPairLanes<A> <= columns; i += kPairLanes<A>, next += step) {
      store_pair(next, load_pair(from + r * stride + i));
    }
    if (i < columns) store_pair(next, load_pair_part(from + r * stride + i, columns - i));
  }
}

/// sums[m][r] += x[m] * a[r], lane by lane, over `columns`. The ranks' pairs of one column lie side
/// by side in a, a_step from pair to pair.
template <int MR, int NR, class S, class A>
inline void down_tile(std::int64_t columns, const S* x, std::int64_t x_stride, const A* a,
                      std::int64_t a_step, A* sums, std::int64_t sums_stride) {
  Vec<A> acc[MR][NR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) acc[m][r] = load(sums + m * sums_stride + r * kLanes<A>);
  }
  const auto step = [&](std::int64_t i, const auto& load_x) __attribute__((always_inline)) {
    const A* a_pair = a + i / kPairLanes<A> * a_step;
    Pair<A> wide[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) wide[m] = load_x(x + m * x_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      const Vec<A> factor = in_register<A>(load(a_pair + r * kPairLanes<A>));
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m][r] += wide[m].first * factor;
    }
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      const Vec<A> factor = in_register<A>(load(a_pair + r * kPairLanes<A> + kLanes<A>));
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m][r] += wide[m].second * factor;
    }
  };
  std::int64_t i = 0;
  for (; i + kPairLanes<A> <= columns; i += kPairLanes<A>) {
    step(i, [](const S* p) { return load_pair(p); });
  }
  if (i < columns) {
    step(i, [n = columns - i](const S* p) { return load_pair_part(p, n); });
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) store(sums + m * sums_stride + r * kLanes<A>, acc[m][r]);
  }
}

template <class S>
void lora_down(std::int64_t begin, std::int64_t end, std::int64_t R, std::int64_t D, const S* x,
               std::int64_t x_stride, const S* a, S* xa, std::int64_t xa_stride, double scale) {
  using A = AccumOf<S>;
  constexpr std::int64_t kRows = 8;  // few enough that they, their sums and the ranks stay in L1
  constexpr std::int64_t kColumns = 768;  // of eight ranks
  static_assert(kColumns % kPairLanes<A> == 0);
  const std::int64_t deep = pad_to_pairs<A>(D), wide = R * kLanes<A>;
  const Scratch<A> a_DR(R * deep), sums(kRows * wide), total(pad_to_lanes<A>(R));
  widen_pairs(R, D, a, D, a_DR.get(), kPairLanes<A>, R * kPairLanes<A>);
  for (std::int64_t t = begin; t < end; t += kRows) {
    const std::int64_t rows = end - t < kRows ? end - t : kRows;
    std::memset(sums.get(), 0, static_cast<std::size_t>(rows * wide) * sizeof(A));
    for (std::int64_t i = 0; i < D; i += kColumns) {
      const std::int64_t columns = D - i < kColumns ? D - i : kColumns;
      in_tiles<TAILOR_DOWN_RANKS>(R, [&](std::int64_t r, auto ranks) {
        const auto tile = [&](std::int64_t row, auto tile_rows) {
          down_tile<tile_rows(), ranks()>(columns, x + (t + row) * x_stride + i, x_stride,
                                          a_DR.get() + i * R + r * kPairLanes<A>, R * kPairLanes<A>,
                                          sums.get() + row * wide + r * kLanes<A>, wide);
        };
        in_tiles<2>(rows, tile);
      });
    }
    for (std::int64_t row = 0; row < rows; ++row) {
      sum_each(sums.get() + row * wide, R, total.get());
      S* to = xa + (t + row) * xa_stride;
      for (std::int64_t r = 0; r < R; r += kLanes<A>) {
        store_up_to(to + r, load(total.get() + r) * static_cast<A>(scale), R - r);
      }
    }
  }
}

/// y[m] += sum over r of xa[m][r] * b[r] for NP pairs of columns, of which the last may be short.
template <int MR, int NP, class S, class A>
inline void up_tile(std::int64_t R, std::int64_t columns, const A* xa, std::int64_t xa_width,
                    const A* b, std::int64_t b_width, S* y, std::int64_t y_stride) {
  Vec<A> acc[MR][2 * NP];
  const bool whole = columns >= NP * kPairLanes<A>;
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NP; ++v) {
      const S* from = y + m * y_stride + v * kPairLanes<A>;
      const Pair<A> pair = whole ? load_pair(from) : load_pair_part(from, columns);
      acc[m][2 * v] = pair.first;
      acc[m][2 * v + 1] = pair.second;
    }
  }
  tile_multiply<MR, 2 * NP, A>(R, xa, xa_width, 1, b, b_width, acc);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NP; ++v) {
      S* to = y + m * y_stride + v * kPairLanes<A>;
      const Pair<A> pair = {acc[m][2 * v], acc[m][2 * v + 1]};
      if (whole) {
        store_pair(to, pair);
      } else {
        store_pair_part(to, pair, columns);
      }
    }
  }
}

template <class S>
void lora_up(std::int64_t begin, std::int64_t end, std::int64_t R, std::int64_t N, const S* xa,
             std::int64_t xa_stride, const S* b, S* y, std::int64_t y_stride) {
  using A = AccumOf<S>;
  constexpr int MR = TAILOR_TILE_ROWS, NP = (TAILOR_TILE_VECS + 1) / 2;
  const std::int64_t width = pad_to_pairs<A>(N), deep = pad_to_lanes<A>(R);
  const Scratch<A> b_RN(R * width), xa_rows(MR * deep);
  widen_pairs(R, N, b, N, b_RN.get(), width, kPairLanes<A>);
  const auto rows = [&](std::int64_t t, auto count) {
    widen(count(), R, xa + t * xa_stride, xa_stride, xa_rows.get(), deep);
    std::int64_t n = 0;
    for (; n + NP * kPairLanes<A> <= N; n += NP * kPairLanes<A>) {
      up_tile<count(), NP>(R, N - n, xa_rows.get(), deep, b_RN.get() + n, width,
                           y + t * y_stride + n, y_stride);
    }
    for (; n < N; n += kPairLanes<A>) {
      up_tile<count(), 1>(R, N - n, xa_rows.get(), deep, b_RN.get() + n, width,
                          y + t * y_stride + n, y_stride);
    }
  };
  in_tiles<MR>(end - begin, [&](std::int64_t t, auto count) { rows(begin + t, count); });
}

/// g[m] += sum over t of u[t][m] * v[t] for one pair of columns, which may be short.
template <int MR, class S, class A>
inline void gradient_tile(std::int64_t T, std::int64_t columns, const A* u, std::int64_t u_width,
                          const S* v, std::int64_t v_stride, A* g, std::int64_t g_stride) {
  Pair<A> acc[MR];
  const bool whole = columns >= kPairLanes<A>;
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const A* from = g + m * g_stride;
    acc[m] = split<S>(whole ? load_pair(from) : load_pair_part(from, columns));
  }
  const auto step = [&](std::int64_t t, Pair<A> row) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const A factor = u[t * u_width + m];
      acc[m].first += row.first * factor;
      acc[m].second += row.second * factor;
    }
  };
  if (whole) {
    for (std::int64_t t = 0; t < T; ++t) step(t, load_pair(v + t * v_stride));
  } else {
    for (std::int64_t t = 0; t < T; ++t) step(t, load_pair_part(v + t * v_stride, columns));
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const Pair<A> pair = in_order<S>(acc[m]);
    if (whole) {
      store_pair(g + m * g_stride, pair);
    } else {
      store_pair_part(g + m * g_stride, pair, columns);
    }
  }
}

template <class S>
void lora_gradient(std::int64_t begin, std::int64_t end, std::int64_t T, std::int64_t R,
                   std::int64_t N, const S* u, std::int64_t u_stride, const S* v,
                   std::int64_t v_stride, AccumOf<S>* g) {
  using A = AccumOf<S>;
  // Few enough rows of v that the next pair of columns finds their cache lines fetched ahead.
  constexpr std::int64_t kRows = 64;
  const std::int64_t width = pad_to_lanes<A>(R);
  const Scratch<A> u_TR(kRows * width);
  for (std::int64_t t = 0; t < T; t += kRows) {
    const std::int64_t rows = T - t < kRows ? T - t : kRows;
    widen(rows, R, u + t * u_stride, u_stride, u_TR.get(), width);
    for (std::int64_t n = begin; n < end; n += kPairLanes<A>) {
      in_tiles<TAILOR_GRADIENT_RANKS>(R, [&](std::int64_t r, auto ranks) {
        gradient_tile<ranks()>(rows, end - n, u_TR.get() + r, width, v + t * v_stride + n, v_stride,
                               g + r * N + n, N);
      });
    }
  }
}

}  // namespace
}  // namespace tailor
