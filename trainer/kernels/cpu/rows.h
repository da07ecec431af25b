#pragma once
// Row-wise kernels: norms, rotary embedding, SwiGLU, routing copies, cross-entropy, dropout.

#include "base/random.h"
#include "trainer/kernels/simd.h"

namespace tailor {
namespace {

template <class S, class A = AccumOf<S>>
A sum_of_squares(const S* x, std::int64_t D) {
  Pair<A> total{};
  for (std::int64_t i = 0; i < D; i += kPairLanes<A>) {
    const Pair<A> v = load_pair_up_to(x + i, D - i);
    total = total + v * v;
  }
  return sum_lanes<A>(total.first + total.second);
}

template <class S>
void rms_norm(std::int64_t begin, std::int64_t end, std::int64_t D, const S* x, const S* w,
              double eps, S* y) {
  using A = AccumOf<S>;
  for (std::int64_t t = begin; t < end; ++t) {
    const S* row = x + t * D;
    const A mean = sum_of_squares(row, D) / static_cast<A>(D);
    const A rstd = A{1} / std::sqrt(mean + static_cast<A>(eps));
    for (std::int64_t i = 0; i < D; i += kPairLanes<A>) {
      const std::int64_t n = D - i;
      const Pair<A> scaled = load_pair_up_to(row + i, n) * rstd * load_pair_up_to(w + i, n);
      store_pair_up_to(y + t * D + i, scaled, n);
    }
  }
}

// y_i = w_i x_i r with r = (mean x^2 + eps)^-1/2, so
// dx_i = r (w_i dy_i - x_i r^2 mean_j(w_j dy_j x_j)).
template <class S>
void rms_norm_backward(std::int64_t begin, std::int64_t end, std::int64_t D, const S* x, const S* w,
                       const S* dy, const S* dres, double eps, S* dx) {
  using A = AccumOf<S>;
  for (std::int64_t t = begin; t < end; ++t) {
    const S* row = x + t * D;
    const S* grad = dy + t * D;
    Pair<A> squares{}, products{};
    for (std::int64_t i = 0; i < D; i += kPairLanes<A>) {
      const std::int64_t n = D - i;
      const Pair<A> v = load_pair_up_to(row + i, n);
      squares = squares + v * v;
      products = products + v * load_pair_up_to(w + i, n) * load_pair_up_to(grad + i, n);
    }
    const A square = sum_lanes<A>(squares.first + squares.second);
    const A product = sum_lanes<A>(products.first + products.second);
    const A rstd = A{1} / std::sqrt(square / static_cast<A>(D) + static_cast<A>(eps));
    const A pull = rstd * rstd * (product / static_cast<A>(D));
    for (std::int64_t i = 0; i < D; i += kPairLanes<A>) {
      const std::int64_t n = D - i;
      const Pair<A> inner = load_pair_up_to(w + i, n) * load_pair_up_to(grad + i, n) -
                            load_pair_up_to(row + i, n) * pull;
      Pair<A> sum = inner * rstd;
      if (dres != nullptr) sum = load_pair_up_to(dres + t * D + i, n) + sum;
      store_pair_up_to(dx + t * D + i, sum, n);
    }
  }
}

template <class S>
void rotate(S* head, std::int64_t dim, bool pairs, const AccumOf<S>* cos, const AccumOf<S>* sin,
            AccumOf<S> direction) {
  using A = AccumOf<S>;
  const std::int64_t half = dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    S* first = pairs ? head + 2 * i : head + i;
    S* second = pairs ? first + 1 : head + i + half;
    const A a = scalar(*first), b = scalar(*second), s = sin[i] * direction;
    put(first, a * cos[i] - b * s);
    put(second, b * cos[i] + a * s);
  }
}

template <class S>
void qk_prepare(std::int64_t begin, std::int64_t end, const QkShape& shape, S* qk,
                const std::int32_t* position, const AccumOf<S>* cos, const AccumOf<S>* sin,
                const AccumOf<S>* q_scale, AccumOf<S>* rstd) {
  using A = AccumOf<S>;
  const std::int64_t dim = shape.head_dim;
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t table = std::int64_t{position[t]} * (dim / 2);
    for (std::int64_t h = 0; h < shape.heads; ++h) {
      S* head = qk + t * shape.stride + h * dim;
      if (shape.rotate) rotate(head, dim, shape.pairs, cos + table, sin + table, A{1});
      if (shape.norm) {
        const A r = A{1} / std::sqrt(sum_of_squares(head, dim) / static_cast<A>(dim) +
                                     static_cast<A>(shape.eps));
        rstd[t * shape.heads + h] = r;
        for (std::int64_t i = 0; i < dim; ++i) put(head + i, scalar(head[i]) * r);
      }
      if (q_scale != nullptr && h < shape.query_heads) {
        for (std::int64_t i = 0; i < dim; ++i) put(head + i, scalar(head[i]) * q_scale[t]);
      }
    }
  }
}

template <class S>
void qk_prepare_backward(std::int64_t begin, std::int64_t end, const QkShape& shape, const S* qk,
                         S* dqk, const std::int32_t* position, const AccumOf<S>* cos,
                         const AccumOf<S>* sin, const AccumOf<S>* q_scale, const AccumOf<S>* rstd) {
  using A = AccumOf<S>;
  const std::int64_t dim = shape.head_dim;
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t table = std::int64_t{position[t]} * (dim / 2);
    for (std::int64_t h = 0; h < shape.heads; ++h) {
      S* head = dqk + t * shape.stride + h * dim;
      const S* out = qk + t * shape.stride + h * dim;
      if (q_scale != nullptr && h < shape.query_heads) {
        for (std::int64_t i = 0; i < dim; ++i) put(head + i, scalar(head[i]) * q_scale[t]);
      }
      if (shape.norm) {  // y = x r: dx = r (dy - y mean(dy y)), exact with eps
        A product = 0;
        for (std::int64_t i = 0; i < dim; ++i) product += scalar(head[i]) * scalar(out[i]);
        const A r = rstd[t * shape.heads + h];
        const A mean = product / static_cast<A>(dim);
        for (std::int64_t i = 0; i < dim; ++i) {
          put(head + i, r * (scalar(head[i]) - scalar(out[i]) * mean));
        }
      }
      if (shape.rotate) rotate(head, dim, shape.pairs, cos + table, sin + table, A{-1});
    }
  }
}

/// 1 / (1 + e^-x), 0 where e^-x has no float.
inline Vec<float> sigmoid(Vec<float> x) {
  constexpr float kLow = -87;
  const Vec<float> e = exp_in_range(-at_most(at_least(x, kLow), -kExpLow));
#if defined(__AVX512F__)
  // A division takes ten times as long as any other step here: an estimate to 14 bits, and one of
  // Newton's steps.
  const auto below = bits_as<__m512>(e + splat(1.0F));
  const __m512 near = _mm512_rcp14_ps(below);
  const __m512 rest = _mm512_fnmadd_ps(below, near, _mm512_set1_ps(1));
  const __mmask16 kept = _mm512_cmp_ps_mask(bits_as<__m512>(x), _mm512_set1_ps(kLow), _CMP_NLT_UQ);
  return bits_as<Vec<float>>(_mm512_maskz_fmadd_ps(kept, near, rest, near));
#else
  return x < splat(kLow) ? Vec<float>{} : splat(1.0F) / (splat(1.0F) + e);
#endif
}
inline Vec<double> sigmoid(Vec<double> x) {  // of a non-positive number, so it cannot overflow
  const auto negative = x < Vec<double>{};
  const Vec<double> e = exp_vec(negative ? x : -x);
  return (negative ? e : splat(1.0)) / (splat(1.0) + e);
}
template <class A>
inline Pair<A> sigmoid(Pair<A> x) {
  return {sigmoid(x.first), sigmoid(x.second)};
}

template <class S>
void swiglu(std::int64_t begin, std::int64_t end, std::int64_t F, const S* gate_up, S* m) {
  using A = AccumOf<S>;
  for (std::int64_t t = begin; t < end; ++t) {
    const S* gate = gate_up + t * 2 * F;
    for (std::int64_t i = 0; i < F; i += kPairLanes<A>) {
      const std::int64_t n = F - i;
      const Pair<A> g = load_pair_up_to(gate + i, n), u = load_pair_up_to(gate + F + i, n);
      store_pair_up_to(m + t * F + i, g * sigmoid(g) * u, n);
    }
  }
}

// m = g s(g) u: dg = dm u s (1 + g (1 - s)), du = dm g s.
template <class S>
void swiglu_backward(std::int64_t begin, std::int64_t end, std::int64_t F, const S* gate_up,
                     const S* dm, S* d_gate_up, S* m) {
  using A = AccumOf<S>;
  const Pair<A> one = {splat(A{1}), splat(A{1})};
  for (std::int64_t t = begin; t < end; ++t) {
    const S* gate = gate_up + t * 2 * F;
    S* d_gate = d_gate_up + t * 2 * F;
    for (std::int64_t i = 0; i < F; i += kPairLanes<A>) {
      const std::int64_t n = F - i;
      const Pair<A> g = load_pair_up_to(gate + i, n), u = load_pair_up_to(gate + F + i, n);
      const Pair<A> d = load_pair_up_to(dm + t * F + i, n);
      const Pair<A> s = sigmoid(g), silu = g * s;
      store_pair_up_to(d_gate + i, d * u * (s + silu * (one - s)), n);
      store_pair_up_to(d_gate + F + i, d * silu, n);
      if (m != nullptr) store_pair_up_to(m + t * F + i, silu * u, n);
    }
  }
}

template <class S>
void gather_rows(std::int64_t begin, std::int64_t end, std::int64_t D, const S* x,
                 const std::int32_t* token, const AccumOf<S>* scale, S* out) {
  using A = AccumOf<S>;
  for (std::int64_t row = begin; row < end; ++row) {
    const S* from = x + std::int64_t{token[row]} * D;
    if (scale == nullptr) {
      std::memcpy(out + row * D, from, static_cast<std::size_t>(D) * sizeof(S));
      continue;
    }
    for (std::int64_t i = 0; i < D; i += kLanes<A>) {
      store_up_to(out + row * D + i, load_up_to(from + i, D - i) * scale[row], D - i);
    }
  }
}

template <class S>
void combine_rows(std::int64_t begin, std::int64_t end, std::int64_t D, std::int64_t K, const S* y,
                  const std::int32_t* slot_of, const AccumOf<S>* scale, S* out) {
  using A = AccumOf<S>;
  for (std::int64_t t = begin; t < end; ++t) {
    for (std::int64_t i = 0; i < D; i += kLanes<A>) {
      Vec<A> total = load_up_to(out + t * D + i, D - i);
      for (std::int64_t k = 0; k < K; ++k) {
        const std::int64_t slot = slot_of[t * K + k];
        const Vec<A> v = load_up_to(y + slot * D + i, D - i);
        total += scale == nullptr ? v : v * scale[slot];
      }
      store_up_to(out + t * D + i, total, D - i);
    }
  }
}

template <class S>
void gate_gradient(std::int64_t begin, std::int64_t end, std::int64_t D, const S* dxs, const S* x,
                   const std::int32_t* token, AccumOf<S>* dot) {
  using A = AccumOf<S>;
  for (std::int64_t row = begin; row < end; ++row) {
    const S* from = x + std::int64_t{token[row]} * D;
    Vec<A> total{};
    for (std::int64_t i = 0; i < D; i += kLanes<A>) {
      total += load_up_to(dxs + row * D + i, D - i) * load_up_to(from + i, D - i);
    }
    dot[row] = sum_lanes<A>(total);
  }
}

/// Takes a run of a row's classes into `state` and calls use(i, count, e) with the exponentials of
/// its logits above the largest so far, lanes beyond `count` 0. What was summed before counts the
/// returned factor as much.
template <class S, class Use>
AccumOf<S> softmax_step(std::int64_t V, std::int64_t first, const S* z, std::int32_t target,
                        SoftmaxRow<AccumOf<S>>& state, const Use& use) {
  using A = AccumOf<S>;
  const std::int64_t wanted = target - first;
  if (wanted >= 0 && wanted < V) state.target_logit = scalar(z[wanted]);
  const std::int64_t whole = V / kLanes<A> * kLanes<A>;
  A top = scalar(z[0]);
  Vec<A> tops = splat(top);
  for (std::int64_t i = 0; i < whole; i += kLanes<A>) {
    const Vec<A> v = load(z + i);
    tops = v > tops ? v : tops;
  }
  top = max_lanes<A>(tops);
  for (std::int64_t i = whole; i < V; ++i) top = scalar(z[i]) > top ? scalar(z[i]) : top;
  double rescale = 1;
  if (first == 0 || top > state.top) {
    std::int64_t at = 0;
    while (at + 1 < V && !(scalar(z[at]) == top)) ++at;  // stops at the end when top is NaN
    state.best = static_cast<std::int32_t>(first + at);
    const A before = state.top;
    state.top = top;
    const bool fresh = first == 0 || std::isinf(before);
    rescale = fresh ? 0 : std::exp(static_cast<double>(before - top));
    state.sum = fresh ? 0 : state.sum * rescale;
  }
  top = state.top;
  // Sums of blocks in A, blocks in double: V is 200,000 in the models this is for.
  constexpr std::int64_t kPart = 1024;
  double total = 0;
  for (std::int64_t block = 0; block < V; block += kPart) {
    const std::int64_t stop = block + kPart < V ? block + kPart : V;
    Vec<A> part{};
    for (std::int64_t i = block; i < stop; i += kLanes<A>) {
      Vec<A> e = exp_vec(load_up_to(z + i, stop - i) - top);
      if (stop - i < kLanes<A>) {  // the padding lanes are not logits
        A lanes[kLanes<A>];
        store(lanes, e);
        for (std::int64_t j = stop - i; j < kLanes<A>; ++j) lanes[j] = 0;
        e = load(lanes);
      }
      use(i, stop - i, e);
      part += e;
    }
    total += static_cast<double>(sum_lanes<A>(part));
  }
  state.sum += total;
  return static_cast<A>(rescale);
}

template <class S>
void softmax_run(std::int64_t begin, std::int64_t end, std::int64_t V, std::int64_t first,
                 const S* logits, const std::int32_t* target, SoftmaxRow<AccumOf<S>>* rows) {
  const auto nothing = [](std::int64_t, std::int64_t, const Vec<AccumOf<S>>&) {};
  for (std::int64_t row = begin; row < end; ++row) {
    softmax_step(V, first, logits + row * V, target[row], rows[row], nothing);
  }
}

template <class S>
void softmax_weights(std::int64_t begin, std::int64_t end, std::int64_t V, std::int64_t first,
                     S* logits, const std::int32_t* target, SoftmaxRow<AccumOf<S>>* rows,
                     AccumOf<S>* rescale) {
  using A = AccumOf<S>;
  for (std::int64_t row = begin; row < end; ++row) {
    S* z = logits + row * V;
    rescale[row] = softmax_step(
        V, first, z, target[row], rows[row],
        [z](std::int64_t i, std::int64_t count, const Vec<A>& e) { store_up_to(z + i, e, count); });
    // The target's own weight is p - 1: formed exactly once p is known, not from a rounded p.
    const std::int64_t wanted = target[row] - first;
    if (wanted >= 0 && wanted < V) put(z + wanted, A{0});
  }
}

template <class S>
void softmax_sum(std::int64_t begin, std::int64_t end, std::int64_t D, const S* part,
                 const AccumOf<S>* rescale, AccumOf<S>* sum) {
  using A = AccumOf<S>;
  for (std::int64_t row = begin; row < end; ++row) {
    A* const to = sum + row * D;
    for (std::int64_t i = 0; i < D; i += kLanes<A>) {
      const Vec<A> more = load_up_to(part + row * D + i, D - i);
      store_up_to(to + i, load_up_to(to + i, D - i) * rescale[row] + more, D - i);
    }
  }
}

template <class S>
void softmax_gradient(std::int64_t begin, std::int64_t end, std::int64_t D, const AccumOf<S>* sum,
                      const S* target, double gradient_scale, const SoftmaxRow<AccumOf<S>>* rows,
                      S* out) {
  using A = AccumOf<S>;
  for (std::int64_t row = begin; row < end; ++row) {
    const auto of_sum = static_cast<A>(gradient_scale / rows[row].sum);
    const auto of_target = static_cast<A>(std::expm1(-rows[row].loss()) * gradient_scale);
    for (std::int64_t i = 0; i < D; i += kLanes<A>) {
      const std::int64_t at = row * D + i;
      store_up_to(out + at,
                  load_up_to(sum + at, D - i) * of_sum + load_up_to(target + at, D - i) * of_target,
                  D - i);
    }
  }
}

template <class S>
void dropout(std::int64_t begin, std::int64_t end, std::int64_t D, const S* x,
             std::int64_t x_stride, double probability, std::uint64_t key,
             const std::uint64_t* token_id, S* out, std::int64_t out_stride) {
  using A = AccumOf<S>;
  const auto threshold = static_cast<std::uint32_t>(probability * 4294967296.0);
  const A scale = static_cast<A>(1.0 / (1.0 - probability));
  for (std::int64_t t = begin; t < end; ++t) {
    for (std::int64_t i = 0; i < D; i += 4) {
      const auto words = philox(
          {static_cast<std::uint32_t>(token_id[t]), static_cast<std::uint32_t>(token_id[t] >> 32U),
           static_cast<std::uint32_t>(i), 0xD30FU},
          {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32U)});
      for (std::int64_t j = 0; j < 4 && i + j < D; ++j) {
        const bool keep = words[static_cast<std::size_t>(j)] >= threshold;
        put(out + t * out_stride + i + j, keep ? scalar(x[t * x_stride + i + j]) * scale : A{0});
      }
    }
  }
}

template <class S>
void add(std::int64_t begin, std::int64_t end, const S* x, S* out) {
  using A = AccumOf<S>;
  for (std::int64_t i = begin; i < end; i += kLanes<A>) {
    store_up_to(out + i, load_up_to(x + i, end - i) + load_up_to(out + i, end - i), end - i);
  }
}

}  // namespace
}  // namespace tailor
