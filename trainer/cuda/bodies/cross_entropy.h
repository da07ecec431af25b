#pragma once

// Softmax cross-entropy over rows of logits, whole or in vocabulary tiles, one block a row.
//
// A row is read in segments of kSegment columns. In a segment, every thread keeps the largest of
// its logits and the sum of e^(z - largest); a tree over the threads merges these, and thread 0
// adds the segment to what is known of the row. So a row's bits do not depend on how it is cut into
// tiles, as long as tiles begin at multiples of kSegment: a streamed head and a resident one give
// the same. They do depend on the block's threads, of which there are always kThreads on a GPU.
//
// Traffic: 2 bytes a logit for the sums, 4 for the gradient. A thread asks for four words of 16
// bytes before it looks at the first, a warp's 512 bytes lie in a row. By sm_90's assembly the sums
// take about 22 instructions a logit and the gradient 25, where an H100 issues 18 and 35 in the
// time the bytes take: the sums are bound by e^z there, not by memory. On an A100 (25, 50) they are
// not.

#include "trainer/cuda/bodies/math.h"

namespace tailor::cuda {

constexpr std::int64_t kSegment = 8192;

/// Of some of a row's logits: the largest, the sum of e^(z - largest), and the lowest column of the
/// largest. Nothing yet: no column, and a sum of nothing below everything.
struct TopSum {
  double sum;
  float top;
  std::int32_t best;
};

constexpr float kBelowAll = -__builtin_huge_valf();
constexpr std::int32_t kNoColumn = 0x7FFFFFFF;

/// What e^z is taken relative to: where all logits are -infinity their difference would be NaN.
TAILOR_HOST_DEVICE inline float base_of(float top) { return top == kBelowAll ? 0.0F : top; }

TAILOR_HOST_DEVICE inline TopSum merged(const TopSum& a, const TopSum& b) {
  TopSum out;
  out.top = b.top > a.top ? b.top : a.top;
  const float base = base_of(out.top);
  out.sum = a.sum * static_cast<double>(exp_nonpositive(a.top - base)) +
            b.sum * static_cast<double>(exp_nonpositive(b.top - base));
  const std::int32_t lower = a.best < b.best ? a.best : b.best;
  out.best = b.top > a.top ? b.best : a.top > b.top ? a.best : lower;
  return out;
}

/// A thread's part of columns [begin, end) of a row: words thread, thread + threads, ... The column
/// of the largest is only sought where it is above `top_before`. `offset`: of column 0 in `logits`.
TAILOR_HOST_DEVICE inline TopSum scan(const Bf16Bits* logits, std::int64_t offset,
                                      std::int64_t begin, std::int64_t end, Place at,
                                      float top_before) {
  constexpr std::uint32_t kAtOnce = 4;
  constexpr Bf16Bits kFill = 0xFF80;  // -infinity: adds nothing and is never above
  TopSum mine{0.0, kBelowAll, kNoColumn};
  const std::int64_t step = std::int64_t{at.threads} * kWord;
  for (std::int64_t first = begin + std::int64_t{at.thread} * kWord; first < end;
       first += kAtOnce * step) {
    EightBf16 word[kAtOnce];
    TAILOR_UNROLL
    for (std::uint32_t j = 0; j < kAtOnce; ++j) {
      const std::int64_t column = first + j * step, left = end - column;
      const auto count = static_cast<std::uint32_t>(left >= kWord ? kWord : left > 0 ? left : 0);
      word[j] = load_eight_bf16(logits, offset + column, count, kFill);
    }
    float top = kBelowAll;
    TAILOR_UNROLL
    for (std::uint32_t j = 0; j < kAtOnce; ++j) {
      const Eight z = to_floats(word[j]);
      TAILOR_UNROLL
      for (std::uint32_t i = 0; i < kWord; ++i) top = z.at[i] > top ? z.at[i] : top;
    }
    if (top > mine.top) {
      mine.sum *= static_cast<double>(exp_nonpositive(mine.top - top));
      mine.top = top;
      if (top > top_before) {
        TAILOR_UNROLL
        for (std::uint32_t j = kAtOnce; j-- > 0;) {
          const Eight z = to_floats(word[j]);
          TAILOR_UNROLL
          for (std::uint32_t i = kWord; i-- > 0;) {
            if (z.at[i] == top) mine.best = static_cast<std::int32_t>(first + j * step + i);
          }
        }
      }
    }
    const float base = base_of(mine.top);
    TAILOR_UNROLL
    for (std::uint32_t j = 0; j < kAtOnce; ++j) {
      const Eight z = to_floats(word[j]);
      float e[kWord];
      TAILOR_UNROLL
      for (std::uint32_t i = 0; i < kWord; ++i) e[i] = exp_nonpositive(z.at[i] - base);
      mine.sum +=
          static_cast<double>(((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7])));
    }
  }
  return mine;
}

/// A word's logits become their gradient, (e^(z - top) / sum - [column = target]) * scale with
/// weight = scale / sum. The target's is formed in double, so that p - 1 is off by no more than
/// p is. `offset` of the word in `logits`, `column` of it in the vocabulary.
TAILOR_HOST_DEVICE inline void word_gradient(Bf16Bits* logits, std::int64_t offset,
                                             std::uint32_t count, std::int64_t column,
                                             std::int64_t target, float top, float weight,
                                             const double* sum, double scale) {
  const std::int64_t at = target - column;
  const bool has_target = at >= 0 && at < count;
  const float target_logit = has_target ? to_float(logits[offset + at]) : 0.0F;
  Eight z = load_eight(logits, offset, count);
  TAILOR_UNROLL
  for (std::uint32_t i = 0; i < kWord; ++i) z.at[i] = exp_nonpositive(z.at[i] - top) * weight;
  if (has_target) {
    const double p = static_cast<double>(exp_nonpositive(target_logit - top)) / *sum;
    const auto gradient = static_cast<float>((p - 1.0) * scale);
    TAILOR_UNROLL
    for (std::uint32_t i = 0; i < kWord; ++i) z.at[i] = i == at ? gradient : z.at[i];
  }
  store_eight(logits, offset, count, z);
}
TAILOR_HOST_DEVICE inline float weight_of(double scale, double sum) {
  return static_cast<float>(scale / sum);
}
TAILOR_HOST_DEVICE inline double loss_of(float top, double sum, float target_logit) {
  return log_of(sum) + static_cast<double>(top) - static_cast<double>(target_logit);
}

/// Of a row whose head comes in tiles: arrays of [n] on the device, kept from tile to tile. None of
/// them needs a value before the first tile.
struct HeadRows {
  float* top;
  double* sum;
  float* target_logit;
  std::int32_t* best;
};

namespace detail {

constexpr std::uint32_t kRowThreads = 256;

struct RowShared {
  TopSum lane[kRowThreads];
  TopSum row;
};

/// Phases 0 .. scan_phases() - 1, the same for both bodies: 0 sets shared.row to `row` (thread 0
/// knows it), then for every segment a scan and a tree, whose last step adds the segment to the
/// row.
struct RowScan {
  const Bf16Bits* logits;
  std::int64_t columns, vocabulary_begin;

  TAILOR_HOST_DEVICE int scan_phases(std::uint32_t threads) const {
    return 1 + static_cast<int>((columns + kSegment - 1) / kSegment) * (1 + tree_levels(threads));
  }
  TAILOR_HOST_DEVICE void run(int phase, Place at, RowShared& shared) const {
    const int levels = tree_levels(at.threads);
    const int segment = (phase - 1) / (1 + levels), level = (phase - 1) % (1 + levels);
    if (level == 0) {
      const std::int64_t begin = segment * kSegment;
      const std::int64_t end = begin + kSegment < columns ? begin + kSegment : columns;
      TopSum mine = scan(logits, std::int64_t{at.block} * columns, begin, end, at, shared.row.top);
      if (mine.best != kNoColumn) mine.best += static_cast<std::int32_t>(vocabulary_begin);
      shared.lane[at.thread] = mine;
      return;
    }
    const std::uint32_t half = at.threads >> static_cast<unsigned>(level);
    if (at.thread >= half) return;
    const TopSum both = merged(shared.lane[at.thread], shared.lane[at.thread + half]);
    if (level < levels) {
      shared.lane[at.thread] = both;
    } else {  // an earlier column wins a tie; without one above -infinity it stays 0
      const std::int32_t before = shared.row.best;
      const bool above = both.top > shared.row.top;
      shared.row = merged(shared.row, both);
      shared.row.best = above ? both.best : before;
    }
  }
};

}  // namespace detail

/// Whole rows [n, columns]: loss, best, and with a scale other than 0 the gradient in place.
struct CrossEntropy {
  static constexpr std::uint32_t kThreads = detail::kRowThreads;
  using Shared = detail::RowShared;
  struct State {};

  std::int64_t blocks(std::uint32_t) const { return columns == 0 ? 0 : n; }
  TAILOR_HOST_DEVICE int phases(std::uint32_t threads) const {
    return row_scan().scan_phases(threads) + (scale != 0 ? 2 : 1);
  }
  TAILOR_HOST_DEVICE void run(int phase, Place at, State&, Shared& shared) const {
    const int scans = row_scan().scan_phases(at.threads);
    const std::int64_t row = at.block, offset = row * columns;
    if (phase == 0) {
      if (at.thread == 0) shared.row = {0.0, kBelowAll, 0};
    } else if (phase < scans) {
      row_scan().run(phase, at, shared);
    } else if (phase == scans) {
      if (at.thread != 0) return;
      best[row] = shared.row.best;
      loss[row] = loss_of(shared.row.top, shared.row.sum, to_float(logits[offset + target[row]]));
    } else {
      const double sum = shared.row.sum;
      const float weight = weight_of(scale, sum);
      for (std::int64_t column = std::int64_t{at.thread} * kWord; column < columns;
           column += std::int64_t{at.threads} * kWord) {
        const std::int64_t left = columns - column;
        const auto count = static_cast<std::uint32_t>(left < kWord ? left : kWord);
        word_gradient(logits, offset + column, count, column, target[row], shared.row.top, weight,
                      &sum, scale);
      }
    }
  }
  TAILOR_HOST_DEVICE detail::RowScan row_scan() const { return {logits, columns, 0}; }

  std::int64_t n, columns;
  Bf16Bits* logits;
  const std::int32_t* target;
  double scale;
  double* loss;
  std::int32_t* best;
};

/// A tile's logits [n, columns], columns vocabulary_begin .. of the head, added to what is known of
/// the rows. Tiles come in the vocabulary's order.
struct HeadOnline {
  static constexpr std::uint32_t kThreads = detail::kRowThreads;
  using Shared = detail::RowShared;
  struct State {};

  std::int64_t blocks(std::uint32_t) const { return columns == 0 ? 0 : n; }
  TAILOR_HOST_DEVICE int phases(std::uint32_t threads) const {
    return row_scan().scan_phases(threads) + 1;
  }
  TAILOR_HOST_DEVICE void run(int phase, Place at, State&, Shared& shared) const {
    const std::int64_t row = at.block;
    if (phase > 0 && phase < row_scan().scan_phases(at.threads)) {
      return row_scan().run(phase, at, shared);
    }
    if (at.thread != 0) return;
    if (phase == 0) {
      const bool first = vocabulary_begin == 0;
      shared.row =
          first ? TopSum{0.0, kBelowAll, 0} : TopSum{rows.sum[row], rows.top[row], rows.best[row]};
      const std::int64_t wanted = target[row] - vocabulary_begin;
      if (wanted >= 0 && wanted < columns) {
        rows.target_logit[row] = to_float(logits[row * columns + wanted]);
      }
    } else {
      rows.sum[row] = shared.row.sum;
      rows.top[row] = shared.row.top;
      rows.best[row] = shared.row.best;
    }
  }
  TAILOR_HOST_DEVICE detail::RowScan row_scan() const {
    return {logits, columns, vocabulary_begin};
  }

  std::int64_t n, columns, vocabulary_begin;
  const Bf16Bits* logits;
  const std::int32_t* target;
  HeadRows rows;
};

/// After the last tile: the rows' losses, and what the gradient pass multiplies by.
struct HeadFinish {
  static constexpr std::uint32_t kThreads = 128;

  std::int64_t blocks(std::uint32_t threads) const { return div_ceil(n, threads); }
  TAILOR_HOST_DEVICE void run(Place at) const {
    const std::int64_t row = std::int64_t{at.block} * at.threads + at.thread;
    if (row >= n) return;
    loss[row] = loss_of(rows.top[row], rows.sum[row], rows.target_logit[row]);
    weight[row] = weight_of(scale, rows.sum[row]);
  }

  std::int64_t n;
  HeadRows rows;
  double scale;
  double* loss;
  float* weight;
};

/// A tile's logits, formed once more, become their gradient in place. A thread a word.
struct HeadGradient {
  static constexpr std::uint32_t kThreads = 256;

  std::int64_t blocks(std::uint32_t threads) const { return div_ceil(grid.words(), threads); }
  TAILOR_HOST_DEVICE void run(Place at) const {
    const std::uint32_t index = at.block * at.threads + at.thread;
    if (index >= grid.words()) return;
    const WordGrid::Spot spot = grid.spot(index);
    word_gradient(logits, spot.offset, spot.count, vocabulary_begin + spot.column, target[spot.row],
                  rows.top[spot.row], weight[spot.row], rows.sum + spot.row, scale);
  }

  WordGrid grid;  // [n, columns]
  std::int64_t vocabulary_begin;
  Bf16Bits* logits;
  const std::int32_t* target;
  HeadRows rows;
  const float* weight;
  double scale;
};

}  // namespace tailor::cuda
