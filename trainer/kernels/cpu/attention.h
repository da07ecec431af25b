#pragma once
// Softmax attention over segments, in blocks, without ever holding a whole score matrix: the
// online softmax of Milakov and Gimelshein (arXiv 1805.02867) forward, and backward from the kept
// log-sum-exp as in FlashAttention-2 (Dao, arXiv 2307.08691, algorithm 2). All sums in A.

#include "trainer/kernels/cpu/tile.h"

namespace tailor {
namespace {

constexpr std::int64_t kBlock = 64;   // queries and keys of one score block
constexpr std::int64_t kNarrow = 16;  // queries or keys of a stripe of a block on the diagonal

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

/// The part of a score block that one go computes: queries [begin, begin + rows) on the first
/// `keys` keys, which are `padded` to whole vectors; further keys none of them sees.
struct Stripe {
  std::int64_t begin, rows, keys, padded;
};

/// Calls body(stripe) on the queries of a block of I queries and J keys, whose query i sees
/// `visible` + i keys. On the diagonal, where half of the scores are masked, stripes are narrow.
template <class A, class Body>
inline void in_stripes(std::int64_t I, std::int64_t J, std::int64_t visible, const Body& body) {
  const std::int64_t step = visible >= J ? kBlock : kNarrow;
  for (std::int64_t i = 0; i < I; i += step) {
    const std::int64_t rows = smaller(step, I - i), keys = smaller(J, visible + i + rows - 1);
    if (keys > 0) body(Stripe{i, rows, keys, pad_to_lanes<A>(keys)});
  }
}

/// Scores of a stripe: q k^T, -inf where causality forbids and in the padding. q rows `q_m` apart,
/// k_dJ transposed keys, s [I, kBlock]; query i of the block sees `visible` + i keys.
template <class A>
inline void scores(const Stripe& stripe, std::int64_t dim, const A* q, std::int64_t q_m,
                   const A* k_dJ, std::int64_t visible, A* s) {
  multiply<A>(stripe.rows, stripe.padded, dim, q + stripe.begin * q_m, q_m, 1, k_dJ, kBlock,
              s + stripe.begin * kBlock, kBlock, false);
  for (std::int64_t i = stripe.begin; i < stripe.begin + stripe.rows; ++i) {
    const std::int64_t seen = smaller(stripe.keys, visible + i > 0 ? visible + i : 0);
    for (std::int64_t j = seen; j < stripe.padded; ++j) s[i * kBlock + j] = -INFINITY;
  }
}

template <class S>
void attention(std::int64_t task_begin, std::int64_t task_end, const AttentionSegment* segments,
               const AttentionShape& shape, const S* q, const S* k, const S* v, S* o,
               AccumOf<S>* lse) {
  using A = AccumOf<S>;
  const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads;
  const std::int64_t width = pad_to_lanes<A>(dim), value_dim = shape.value_dim;
  const std::int64_t v_width = pad_to_lanes<A>(value_dim);
  const auto scale = static_cast<A>(shape.scale);
  for (std::int64_t task = task_begin; task < task_end; ++task) {
    const AttentionSegment& segment = segments[task / shape.kv_heads];
    const std::int64_t kv_head = task % shape.kv_heads, keys = segment.keys;
    const std::int64_t blocks = (keys + kBlock - 1) / kBlock;
    const Scratch<A> k_rows(kBlock * width), k_blocks(blocks * dim * kBlock),
        v_rows(keys * v_width);
    std::memset(k_blocks.get(), 0, static_cast<std::size_t>(blocks * dim * kBlock) * sizeof(A));
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t J = smaller(kBlock, keys - b * kBlock);
      widen(J, dim, k + (segment.key_begin + b * kBlock) * shape.k_stride + kv_head * dim,
            shape.k_stride, k_rows.get(), width);
      transpose(J, dim, k_rows.get(), width, k_blocks.get() + b * dim * kBlock, kBlock);
    }
    widen(keys, value_dim, v + segment.key_begin * shape.v_stride + kv_head * shape.v_head,
          shape.v_stride, v_rows.get(), v_width);
    const Scratch<A> q_block(kBlock * width), s(kBlock * kBlock), out(kBlock * v_width);
    A top[kBlock], total[kBlock];  // the largest q k^T, and the sum of exponentials, of a query
    const std::int64_t offset = keys - segment.queries;  // query i sees keys 0 .. i + offset
    for (std::int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      for (std::int64_t i0 = 0; i0 < segment.queries; i0 += kBlock) {
        const std::int64_t I = smaller(kBlock, segment.queries - i0);
        const std::int64_t token = segment.query_begin + i0;
        widen(I, dim, q + token * shape.q_stride + h * dim, shape.q_stride, q_block.get(), width);
        std::memset(out.get(), 0, static_cast<std::size_t>(I * v_width) * sizeof(A));
        for (std::int64_t i = 0; i < I; ++i) {
          top[i] = -INFINITY;
          total[i] = 0;
        }
        for (std::int64_t j0 = 0; j0 <= i0 + I - 1 + offset && j0 < keys; j0 += kBlock) {
          const std::int64_t J = smaller(kBlock, keys - j0);
          const std::int64_t visible = i0 + offset + 1 - j0;
          in_stripes<A>(I, J, visible, [&](const Stripe& stripe) {
            scores<A>(stripe, dim, q_block.get(), width, k_blocks.get() + j0 * dim, visible,
                      s.get());
            for (std::int64_t i = stripe.begin; i < stripe.begin + stripe.rows; ++i) {
              A* row = s.get() + i * kBlock;
              Vec<A> tops = splat(top[i]);
              for (std::int64_t j = 0; j < stripe.padded; j += kLanes<A>) {
                const Vec<A> z = load(row + j);
                tops = z > tops ? z : tops;
              }
              const A now = max_lanes<A>(tops);
              Vec<A> part{};
              for (std::int64_t j = 0; j < stripe.padded; j += kLanes<A>) {
                const Vec<A> e = exp_vec((load(row + j) - now) * scale);
                store(row + j, e);
                part += e;
              }
              const A shrink = std::exp((top[i] - now) * scale);
              total[i] = total[i] * shrink + sum_lanes<A>(part);
              top[i] = now;
              if (shrink != A{1}) {
                A* o_row = out.get() + i * v_width;
                for (std::int64_t c = 0; c < v_width; c += kLanes<A>) {
                  store(o_row + c, load(o_row + c) * shrink);
                }
              }
            }
            multiply<A>(stripe.rows, v_width, stripe.keys, s.get() + stripe.begin * kBlock, kBlock,
                        1, v_rows.get() + j0 * v_width, v_width, out.get() + stripe.begin * v_width,
                        v_width, true);
          });
        }
        for (std::int64_t i = 0; i < I; ++i) {
          S* to = o + (token + i) * shape.o_stride + h * value_dim;
          const A inverse = A{1} / total[i];
          for (std::int64_t c = 0; c < value_dim; c += kLanes<A>) {
            store_up_to(to + c, load(out.get() + i * v_width + c) * inverse, value_dim - c);
          }
          if (lse != nullptr)
            lse[(token + i) * shape.heads + h] = top[i] * scale + std::log(total[i]);
        }
      }
    }
  }
}

// With P = exp(S - lse): dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)), dQ = dS K scale,
// dK = dS^T Q scale.
template <class S>
void attention_backward(std::int64_t task_begin, std::int64_t task_end,
                        const AttentionSegment* segments, const AttentionShape& shape, const S* q,
                        const S* k, const S* v, const S* o, const AccumOf<S>* lse, const S* d_o,
                        S* dq, S* dk, S* dv) {
  using A = AccumOf<S>;
  const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads;
  const std::int64_t width = pad_to_lanes<A>(dim), value_dim = shape.value_dim;
  const std::int64_t v_width = pad_to_lanes<A>(value_dim);
  const auto scale = static_cast<A>(shape.scale);
  for (std::int64_t task = task_begin; task < task_end; ++task) {
    const AttentionSegment& segment = segments[task / shape.kv_heads];
    const std::int64_t kv_head = task % shape.kv_heads, n = segment.keys;
    const std::int64_t first = segment.key_begin;
    const Scratch<A> q_rows(n * width), k_rows(n * width), v_rows(n * v_width),
        do_rows(n * v_width);
    const Scratch<A> dq_rows(n * width), dk_rows(n * width), dv_rows(n * v_width), delta(n);
    const Scratch<A> k_dJ(dim * kBlock), v_dJ(value_dim * kBlock), p(kBlock * kBlock),
        ds(kBlock * kBlock);
    widen(n, dim, k + first * shape.k_stride + kv_head * dim, shape.k_stride, k_rows.get(), width);
    widen(n, value_dim, v + first * shape.v_stride + kv_head * shape.v_head, shape.v_stride,
          v_rows.get(), v_width);
    std::memset(dk_rows.get(), 0, static_cast<std::size_t>(n * width) * sizeof(A));
    std::memset(dv_rows.get(), 0, static_cast<std::size_t>(n * v_width) * sizeof(A));
    for (std::int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      widen(n, dim, q + first * shape.q_stride + h * dim, shape.q_stride, q_rows.get(), width);
      widen(n, value_dim, d_o + first * shape.o_stride + h * value_dim, shape.o_stride,
            do_rows.get(), v_width);
      std::memset(dq_rows.get(), 0, static_cast<std::size_t>(n * width) * sizeof(A));
      for (std::int64_t i = 0; i < n; ++i) {
        const S* o_row = o + (first + i) * shape.o_stride + h * value_dim;
        Vec<A> product{};
        for (std::int64_t c = 0; c < value_dim; c += kLanes<A>) {
          product += load(do_rows.get() + i * v_width + c) * load_up_to(o_row + c, value_dim - c);
        }
        delta.get()[i] = sum_lanes<A>(product);
      }
      for (std::int64_t j0 = 0; j0 < n; j0 += kBlock) {
        const std::int64_t J = smaller(kBlock, n - j0);
        std::memset(k_dJ.get(), 0, static_cast<std::size_t>(dim * kBlock) * sizeof(A));
        std::memset(v_dJ.get(), 0, static_cast<std::size_t>(value_dim * kBlock) * sizeof(A));
        transpose(J, dim, k_rows.get() + j0 * width, width, k_dJ.get(), kBlock);
        transpose(J, value_dim, v_rows.get() + j0 * v_width, v_width, v_dJ.get(), kBlock);
        for (std::int64_t i0 = j0; i0 < n; i0 += kBlock) {
          const std::int64_t I = smaller(kBlock, n - i0);
          const A* q_block = q_rows.get() + i0 * width;
          const A* do_block = do_rows.get() + i0 * v_width;
          const std::int64_t visible = i0 + 1 - j0;
          in_stripes<A>(I, J, visible, [&](const Stripe& stripe) {
            scores<A>(stripe, dim, q_block, width, k_dJ.get(), visible, p.get());
            multiply<A>(stripe.rows, stripe.padded, value_dim, do_block + stripe.begin * v_width,
                        v_width, 1, v_dJ.get(), kBlock, ds.get() + stripe.begin * kBlock, kBlock,
                        false);
            for (std::int64_t i = stripe.begin; i < stripe.begin + stripe.rows; ++i) {
              const A log_sum = lse[(first + i0 + i) * shape.heads + h];
              const A centre = delta.get()[i0 + i];
              for (std::int64_t j = 0; j < stripe.padded; j += kLanes<A>) {
                const std::int64_t at = i * kBlock + j;
                const Vec<A> probability = exp_vec(load(p.get() + at) * scale - log_sum);
                store(p.get() + at, probability);
                store(ds.get() + at, probability * (load(ds.get() + at) - centre) * scale);
              }
            }
            multiply<A>(stripe.rows, width, stripe.keys, ds.get() + stripe.begin * kBlock, kBlock,
                        1, k_rows.get() + j0 * width, width,
                        dq_rows.get() + (i0 + stripe.begin) * width, width, true);
          });
          // On the diagonal, too, in stripes: no query before a stripe of keys sees any of it.
          const std::int64_t step = i0 == j0 ? kNarrow : kBlock;
          for (std::int64_t j = 0; j < J; j += step) {
            const std::int64_t from = i0 == j0 ? j : 0, rows = smaller(step, J - j);
            const std::int64_t at = from * kBlock + j, to = (j0 + j) * width;
            multiply<A>(rows, v_width, I - from, p.get() + at, 1, kBlock, do_block + from * v_width,
                        v_width, dv_rows.get() + (j0 + j) * v_width, v_width, true);
            multiply<A>(rows, width, I - from, ds.get() + at, 1, kBlock, q_block + from * width,
                        width, dk_rows.get() + to, width, true);
          }
        }
      }
      for (std::int64_t i = 0; i < n; ++i) {
        S* to = dq + (first + i) * shape.q_stride + h * dim;
        for (std::int64_t c = 0; c < dim; c += kLanes<A>) {
          store_up_to(to + c, load(dq_rows.get() + i * width + c), dim - c);
        }
      }
    }
    for (std::int64_t i = 0; i < n; ++i) {
      S* to_k = dk + (first + i) * shape.k_stride + kv_head * dim;
      S* to_v = dv + (first + i) * shape.v_stride + kv_head * shape.v_head;
      for (std::int64_t c = 0; c < dim; c += kLanes<A>) {
        store_up_to(to_k + c, load(dk_rows.get() + i * width + c), dim - c);
      }
      for (std::int64_t c = 0; c < value_dim; c += kLanes<A>) {
        store_up_to(to_v + c, load(dv_rows.get() + i * v_width + c), value_dim - c);
      }
    }
  }
}

}  // namespace
}  // namespace tailor
