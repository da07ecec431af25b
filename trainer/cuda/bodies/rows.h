#pragma once

// The row-wise kernels of trainer/kernels/kernels.h that the experts need, with its formulas. All
// but the gate's gradient are a thread a word of eight numbers: 16 bytes from and to every array,
// a warp's 512 in a row. SwiGLU moves 6 bytes a number forward and 12 backward; forward it
// takes 44 instructions a number in sm_90's assembly, a third of them the division, and an H100
// issues 53 while 6 bytes move, an A100 75.

#include "trainer/cuda/bodies/math.h"

namespace tailor::cuda {

/// m = silu(gate) * up; gate_up [T, 2F] holds gate then up; m [T, F].
struct Swiglu {
  static constexpr std::uint32_t kThreads = 256;

  std::int64_t blocks(std::uint32_t threads) const { return div_ceil(grid.words(), threads); }
  TAILOR_HOST_DEVICE void run(Place at) const {
    const std::uint32_t index = at.block * at.threads + at.thread;
    if (index >= grid.words()) return;
    const WordGrid::Spot spot = grid.spot(index);
    const std::int64_t gate = 2 * spot.row * F + spot.column;
    Eight g = load_eight(gate_up, gate, spot.count);
    const Eight u = load_eight(gate_up, gate + F, spot.count);
    TAILOR_UNROLL
    for (std::uint32_t i = 0; i < kWord; ++i) g.at[i] = g.at[i] * sigmoid(g.at[i]) * u.at[i];
    store_eight(m, spot.offset, spot.count, g);
  }

  WordGrid grid;  // [T, F]
  std::int64_t F;
  const Bf16Bits* gate_up;
  Bf16Bits* m;
};

/// d_gate = dm up s (1 + gate (1 - s)) with s = sigmoid(gate), d_up = dm silu(gate); and m to
/// Swiglu's bits unless null. A thread reads before it writes: d_gate_up may be gate_up, m may be
/// dm.
struct SwigluBackward {
  static constexpr std::uint32_t kThreads = 256;

  std::int64_t blocks(std::uint32_t threads) const { return div_ceil(grid.words(), threads); }
  TAILOR_HOST_DEVICE void run(Place at) const {
    const std::uint32_t index = at.block * at.threads + at.thread;
    if (index >= grid.words()) return;
    const WordGrid::Spot spot = grid.spot(index);
    const std::int64_t gate = 2 * spot.row * F + spot.column;
    const Eight g = load_eight(gate_up, gate, spot.count);
    const Eight u = load_eight(gate_up, gate + F, spot.count);
    const Eight d = load_eight(dm, spot.offset, spot.count);
    Eight d_gate, d_up, product;
    TAILOR_UNROLL
    for (std::uint32_t i = 0; i < kWord; ++i) {
      const float s = sigmoid(g.at[i]), silu = g.at[i] * s;
      d_gate.at[i] = d.at[i] * u.at[i] * std::fma(silu, 1.0F - s, s);
      d_up.at[i] = d.at[i] * silu;
      product.at[i] = silu * u.at[i];
    }
    store_eight(d_gate_up, gate, spot.count, d_gate);
    store_eight(d_gate_up, gate + F, spot.count, d_up);
    if (m != nullptr) store_eight(m, spot.offset, spot.count, product);
  }

  WordGrid grid;  // [T, F]
  std::int64_t F;
  const Bf16Bits* gate_up;
  const Bf16Bits* dm;
  Bf16Bits* d_gate_up;
  Bf16Bits* m;
};

/// out[row] = scale[row] * x[token[row]]; a copy where scale is null.
struct GatherRows {
  static constexpr std::uint32_t kThreads = 256;

  std::int64_t blocks(std::uint32_t threads) const { return div_ceil(grid.words(), threads); }
  TAILOR_HOST_DEVICE void run(Place at) const {
    const std::uint32_t index = at.block * at.threads + at.thread;
    if (index >= grid.words()) return;
    const WordGrid::Spot spot = grid.spot(index);
    const std::int64_t from = token[spot.row] * D + spot.column;
    const EightBf16 word = load_eight_bf16(x, from, spot.count);
    if (scale == nullptr) return store_eight_bf16(out, spot.offset, spot.count, word);
    const float by = scale[spot.row];
    Eight values = to_floats(word);
    TAILOR_UNROLL
    for (std::uint32_t i = 0; i < kWord; ++i) values.at[i] *= by;
    store_eight(out, spot.offset, spot.count, values);
  }

  WordGrid grid;  // [rows, D]
  std::int64_t D;
  const Bf16Bits* x;
  const std::int32_t* token;
  const float* scale;
  Bf16Bits* out;
};

/// out[t] += sum over k in order of scale[slot] * y[slot], slot = slot_of[t * K + k]; scale may be
/// null. Rounded once, after the last.
struct CombineRows {
  static constexpr std::uint32_t kThreads = 256;

  std::int64_t blocks(std::uint32_t threads) const { return div_ceil(grid.words(), threads); }
  TAILOR_HOST_DEVICE void run(Place at) const {
    const std::uint32_t index = at.block * at.threads + at.thread;
    if (index >= grid.words()) return;
    const WordGrid::Spot spot = grid.spot(index);
    Eight total = load_eight(out, spot.offset, spot.count);
    for (std::int64_t k = 0; k < K; ++k) {
      const std::int64_t slot = slot_of[spot.row * K + k];
      const Eight v = load_eight(y, slot * D + spot.column, spot.count);
      const float by = scale == nullptr ? 1.0F : scale[slot];
      TAILOR_UNROLL
      for (std::uint32_t i = 0; i < kWord; ++i) total.at[i] = std::fma(v.at[i], by, total.at[i]);
    }
    store_eight(out, spot.offset, spot.count, total);
  }

  WordGrid grid;  // [tokens, D]
  std::int64_t D, K;
  const Bf16Bits* y;
  const std::int32_t* slot_of;
  const float* scale;
  Bf16Bits* out;
};

/// dot[row] = <dxs[row], x[token[row]]>. A block a row: each thread adds up its words, a tree over
/// the threads the rest.
struct GateGradient {
  static constexpr std::uint32_t kThreads = 128;
  struct Shared {
    float sum[256];
  };
  struct State {};

  std::int64_t blocks(std::uint32_t) const { return rows; }
  TAILOR_HOST_DEVICE int phases(std::uint32_t threads) const { return tree_levels(threads) + 2; }
  TAILOR_HOST_DEVICE void run(int phase, Place at, State&, Shared& shared) const {
    if (phase == 0) {
      shared.sum[at.thread] = part(at);
    } else if (phase <= tree_levels(at.threads)) {
      const std::uint32_t half = at.threads >> static_cast<unsigned>(phase);
      if (at.thread < half) shared.sum[at.thread] += shared.sum[at.thread + half];
    } else if (at.thread == 0) {
      dot[at.block] = shared.sum[0];
    }
  }

  TAILOR_HOST_DEVICE float part(Place at) const {
    const std::int64_t own = at.block * D, other = token[at.block] * D;
    float sum = 0;
    for (std::int64_t column = std::int64_t{at.thread} * kWord; column < D;
         column += std::int64_t{at.threads} * kWord) {
      const std::int64_t left = D - column;
      const auto count = static_cast<std::uint32_t>(left < kWord ? left : kWord);
      const Eight a = load_eight(dxs, own + column, count),
                  b = load_eight(x, other + column, count);
      TAILOR_UNROLL
      for (std::uint32_t i = 0; i < kWord; ++i) sum = std::fma(a.at[i], b.at[i], sum);
    }
    return sum;
  }

  std::int64_t rows, D;
  const Bf16Bits* dxs;
  const Bf16Bits* x;
  const std::int32_t* token;
  float* dot;
};

}  // namespace tailor::cuda
