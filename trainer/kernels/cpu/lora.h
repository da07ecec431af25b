#pragma once
// LoRA's thin products. A library's matrix product spends most of its time on set-up at these
// shapes (rank 8 to 32); these read the wide side once, at memory speed, and sum in A.

#include "trainer/kernels/cpu/tile.h"

namespace tailor {
namespace {

template <class S>
void lora_down(std::int64_t begin, std::int64_t end, std::int64_t R, std::int64_t D, const S* x,
               std::int64_t x_stride, const S* a, S* xa, std::int64_t xa_stride, double scale) {
  using A = AccumOf<S>;
  constexpr std::int64_t kRows = 48;
  const std::int64_t width = pad_to_lanes<A>(R), deep = pad_to_lanes<A>(D);
  const Scratch<A> a_RD(R * deep), a_DR(deep * width), x_block(kRows * deep), out(kRows * width);
  widen(R, D, a, D, a_RD.get(), deep);
  std::memset(a_DR.get(), 0, static_cast<std::size_t>(deep * width) * sizeof(A));
  transpose(R, D, a_RD.get(), deep, a_DR.get(), width);
  for (std::int64_t t = begin; t < end; t += kRows) {
    const std::int64_t rows = end - t < kRows ? end - t : kRows;
    widen(rows, D, x + t * x_stride, x_stride, x_block.get(), deep);
    multiply<A>(rows, width, D, x_block.get(), deep, 1, a_DR.get(), width, out.get(), width, false);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t j = 0; j < R; ++j) {
        put(xa + (t + r) * xa_stride + j, out.get()[r * width + j] * static_cast<A>(scale));
      }
    }
  }
}

template <int MR, class S, class A>
inline void lora_up_rows(std::int64_t R, std::int64_t N, const A* xa, std::int64_t xa_width,
                         const A* b, std::int64_t b_width, S* y, std::int64_t y_stride) {
  constexpr int NV = TAILOR_TILE_VECS;
  std::int64_t n = 0;
  for (; n + NV * kLanes<A> <= N; n += NV * kLanes<A>) {
    Vec<A> acc[MR][NV];
    for (int m = 0; m < MR; ++m) {
      for (int v = 0; v < NV; ++v) acc[m][v] = load(y + m * y_stride + n + v * kLanes<A>);
    }
    tile_multiply<MR, NV, A>(R, xa, xa_width, 1, b + n, b_width, acc);
    for (int m = 0; m < MR; ++m) {
      for (int v = 0; v < NV; ++v) store(y + m * y_stride + n + v * kLanes<A>, acc[m][v]);
    }
  }
  for (; n < N; n += kLanes<A>) {
    Vec<A> acc[MR][1];
    for (int m = 0; m < MR; ++m) acc[m][0] = load_up_to(y + m * y_stride + n, N - n);
    tile_multiply<MR, 1, A>(R, xa, xa_width, 1, b + n, b_width, acc);
    for (int m = 0; m < MR; ++m) store_up_to(y + m * y_stride + n, acc[m][0], N - n);
  }
}

template <class S>
void lora_up(std::int64_t begin, std::int64_t end, std::int64_t R, std::int64_t N, const S* xa,
             std::int64_t xa_stride, const S* b, S* y, std::int64_t y_stride) {
  using A = AccumOf<S>;
  constexpr int MR = TAILOR_TILE_ROWS;
  const std::int64_t width = pad_to_lanes<A>(N), deep = pad_to_lanes<A>(R);
  const Scratch<A> b_RN(R * width), xa_rows(MR * deep);
  widen(R, N, b, N, b_RN.get(), width);
  std::int64_t t = begin;
  for (; t + MR <= end; t += MR) {
    widen(MR, R, xa + t * xa_stride, xa_stride, xa_rows.get(), deep);
    lora_up_rows<MR>(R, N, xa_rows.get(), deep, b_RN.get(), width, y + t * y_stride, y_stride);
  }
  for (; t < end; ++t) {
    widen(1, R, xa + t * xa_stride, xa_stride, xa_rows.get(), deep);
    lora_up_rows<1>(R, N, xa_rows.get(), deep, b_RN.get(), width, y + t * y_stride, y_stride);
  }
}

template <int MR, class S, class A>
inline void gradient_rows(std::int64_t T, std::int64_t columns, const A* u, std::int64_t u_width,
                          const S* v, std::int64_t v_stride, A* g, std::int64_t g_stride) {
  constexpr int NV = TAILOR_TILE_VECS;
  std::int64_t n = 0;
  for (; n + NV * kLanes<A> <= columns; n += NV * kLanes<A>) {
    Vec<A> acc[MR][NV];
    for (int m = 0; m < MR; ++m) {
      for (int c = 0; c < NV; ++c) acc[m][c] = load(g + m * g_stride + n + c * kLanes<A>);
    }
    tile_multiply<MR, NV, A>(T, u, 1, u_width, v + n, v_stride, acc);
    for (int m = 0; m < MR; ++m) {
      for (int c = 0; c < NV; ++c) store(g + m * g_stride + n + c * kLanes<A>, acc[m][c]);
    }
  }
  for (; n < columns; n += kLanes<A>) {
    Vec<A> acc[MR][1];
    for (int m = 0; m < MR; ++m) acc[m][0] = load_up_to(g + m * g_stride + n, columns - n);
    for (std::int64_t t = 0; t < T; ++t) {
      const Vec<A> row = load_up_to(v + t * v_stride + n, columns - n);
      for (int m = 0; m < MR; ++m) acc[m][0] += row * u[t * u_width + m];
    }
    for (int m = 0; m < MR; ++m) store_up_to(g + m * g_stride + n, acc[m][0], columns - n);
  }
}

template <class S>
void lora_gradient(std::int64_t begin, std::int64_t end, std::int64_t T, std::int64_t R,
                   std::int64_t N, const S* u, std::int64_t u_stride, const S* v,
                   std::int64_t v_stride, AccumOf<S>* g) {
  using A = AccumOf<S>;
  constexpr std::int64_t MR = TAILOR_TILE_ROWS < 4 ? TAILOR_TILE_ROWS : 4;
  const std::int64_t width = pad_to_lanes<A>(R);
  const Scratch<A> u_TR(T * width);
  widen(T, R, u, u_stride, u_TR.get(), width);
  std::int64_t r = 0;
  for (; r + MR <= R; r += MR) {
    gradient_rows<MR>(T, end - begin, u_TR.get() + r, width, v + begin, v_stride, g + r * N + begin,
                      N);
  }
  for (; r < R; ++r) {
    gradient_rows<1>(T, end - begin, u_TR.get() + r, width, v + begin, v_stride, g + r * N + begin,
                     N);
  }
}

}  // namespace
}  // namespace tailor
