#pragma once

// The truth the CPU kernels are measured by: the definitions of trainer/kernels/kernels.h as plain
// loops in double, one line a formula, nothing shared with the kernels but Philox.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/random.h"
#include "trainer/kernels/kernels.h"

namespace tailor::reference {

/// A sum, and the sum of its terms' magnitudes: rounding errors are relative to the latter.
struct Sum {
  double value = 0, mass = 0;
  void add(double term) { add(term, std::fabs(term)); }
  void add(double term, double magnitude) {
    value += term;
    mass += magnitude;
  }
};
using Sums = std::vector<Sum>;
using Doubles = std::vector<double>;

inline std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

inline Sums rms_norm(std::int64_t T, std::int64_t D, const Doubles& x, const Doubles& w,
                     double eps) {
  Sums y(at(T * D));
  for (std::int64_t t = 0; t < T; ++t) {
    double squares = 0;
    for (std::int64_t i = 0; i < D; ++i) squares += x[at(t * D + i)] * x[at(t * D + i)];
    const double r = 1 / std::sqrt(squares / static_cast<double>(D) + eps);
    for (std::int64_t i = 0; i < D; ++i) y[at(t * D + i)].add(w[at(i)] * x[at(t * D + i)] * r);
  }
  return y;
}

/// The whole Jacobian: dy_j / dx_i = w_j (r [i = j] - x_i x_j r^3 / D).
inline Sums rms_norm_backward(std::int64_t T, std::int64_t D, const Doubles& x, const Doubles& w,
                              const Doubles& dy, const Doubles& dres, double eps) {
  Sums dx(at(T * D));
  for (std::int64_t t = 0; t < T; ++t) {
    const double* row = x.data() + t * D;
    double squares = 0;
    for (std::int64_t i = 0; i < D; ++i) squares += row[i] * row[i];
    const double r = 1 / std::sqrt(squares / static_cast<double>(D) + eps);
    for (std::int64_t i = 0; i < D; ++i) {
      Sum& out = dx[at(t * D + i)];
      out.add(dres[at(t * D + i)]);
      for (std::int64_t j = 0; j < D; ++j) {
        const double pull = dy[at(t * D + j)] * w[at(j)];
        if (i == j) out.add(pull * r);
        out.add(-pull * row[i] * row[j] * r * r * r / static_cast<double>(D));
      }
    }
  }
  return dx;
}

/// Partner of element i in the rotation, its position in the table, and the sign of its sine.
struct Turn {
  std::int64_t partner, angle;
  double sign;
};
inline Turn turn_of(std::int64_t i, const QkShape& shape) {
  const std::int64_t half = shape.head_dim / 2;
  if (shape.pairs) return i % 2 == 0 ? Turn{i + 1, i / 2, -1} : Turn{i - 1, i / 2, 1};
  return i < half ? Turn{i + half, i, -1} : Turn{i - half, i - half, 1};
}

/// One head: rotated, normed, scaled. Masses are of the elements' size before cancellation.
struct PreparedHead {
  Sums out;
  double rstd = 1;
};
inline PreparedHead prepare_head(const QkShape& shape, const double* x, const double* cos,
                                 const double* sin, double q_scale) {
  const std::int64_t dim = shape.head_dim;
  PreparedHead head{Sums(at(dim)), 1};
  for (std::int64_t i = 0; i < dim; ++i) {
    if (!shape.rotate) {
      head.out[at(i)].add(x[i]);
      continue;
    }
    const Turn turn = turn_of(i, shape);
    head.out[at(i)].add(x[i] * cos[turn.angle]);
    head.out[at(i)].add(turn.sign * x[turn.partner] * sin[turn.angle]);
  }
  if (shape.norm) {
    double squares = 0;
    for (const Sum& element : head.out) squares += element.value * element.value;
    head.rstd = 1 / std::sqrt(squares / static_cast<double>(dim) + shape.eps);
  }
  for (Sum& element : head.out) {
    element.value *= head.rstd * q_scale;
    element.mass *= head.rstd * q_scale;
  }
  return head;
}

/// Its transpose. `y` is the normed head (before q_scale).
inline Sums prepare_head_backward(const QkShape& shape, const Sums& y, double rstd,
                                  const double* dy, const double* cos, const double* sin,
                                  double q_scale) {
  const std::int64_t dim = shape.head_dim;
  Sums inner(at(dim)), out(at(dim));
  for (std::int64_t i = 0; i < dim; ++i) {
    inner[at(i)].add(dy[i] * q_scale * rstd);
    for (std::int64_t j = 0; shape.norm && j < dim; ++j) {
      inner[at(i)].add(-rstd * y[at(i)].value * y[at(j)].value * dy[j] * q_scale /
                       static_cast<double>(dim));
    }
  }
  if (!shape.rotate) return inner;
  for (std::int64_t i = 0; i < dim; ++i) {  // the inverse turn: the sine changes its sign
    const Turn turn = turn_of(i, shape);
    const Sum &own = inner[at(i)], &other = inner[at(turn.partner)];
    const double c = cos[turn.angle], s = -turn.sign * sin[turn.angle];
    out[at(i)].add(own.value * c, own.mass * std::fabs(c));
    out[at(i)].add(other.value * s, other.mass * std::fabs(s));
  }
  return out;
}

struct AttentionOut {
  Sums o;
  Doubles lse;
};
inline double score(const AttentionShape& shape, const AttentionSegment& segment, std::int64_t h,
                    std::int64_t i, std::int64_t j, const Doubles& q, const Doubles& k) {
  const std::int64_t kv = h / (shape.heads / shape.kv_heads);
  double product = 0;
  for (std::int64_t c = 0; c < shape.head_dim; ++c) {
    product += q[at((segment.query_begin + i) * shape.q_stride + h * shape.head_dim + c)] *
               k[at((segment.key_begin + j) * shape.k_stride + kv * shape.head_dim + c)];
  }
  return product * shape.scale;
}

inline AttentionOut attention(const std::vector<AttentionSegment>& segments,
                              const AttentionShape& shape, std::int64_t tokens, const Doubles& q,
                              const Doubles& k, const Doubles& v) {
  AttentionOut out{Sums(at(tokens * shape.o_stride)), Doubles(at(tokens * shape.heads))};
  for (const AttentionSegment& segment : segments) {
    for (std::int64_t h = 0; h < shape.heads; ++h) {
      const std::int64_t kv = h / (shape.heads / shape.kv_heads);
      for (std::int64_t i = 0; i < segment.queries; ++i) {
        const std::int64_t visible = i + segment.keys - segment.queries + 1;
        Doubles z(at(visible));
        double top = -INFINITY, total = 0;
        for (std::int64_t j = 0; j < visible; ++j) {
          z[at(j)] = score(shape, segment, h, i, j, q, k);
          top = std::max(top, z[at(j)]);
        }
        for (const double value : z) total += std::exp(value - top);
        const std::int64_t token = segment.query_begin + i;
        out.lse[at(token * shape.heads + h)] = top + std::log(total);
        for (std::int64_t j = 0; j < visible; ++j) {
          const double p = std::exp(z[at(j)] - top) / total;
          for (std::int64_t c = 0; c < shape.head_dim; ++c) {
            out.o[at(token * shape.o_stride + h * shape.head_dim + c)].add(
                p * v[at((segment.key_begin + j) * shape.v_stride + kv * shape.head_dim + c)]);
          }
        }
      }
    }
  }
  return out;
}

/// From the softmax's Jacobian: ds_j = sum over j' of dp_j' p_j' ([j = j'] - p_j).
struct AttentionGradients {
  Sums dq, dk, dv;
};
inline AttentionGradients attention_backward(const std::vector<AttentionSegment>& segments,
                                             const AttentionShape& shape, std::int64_t tokens,
                                             const Doubles& q, const Doubles& k, const Doubles& v,
                                             const Doubles& d_o) {
  const std::int64_t dim = shape.head_dim;
  AttentionGradients out{Sums(at(tokens * shape.q_stride)), Sums(at(tokens * shape.k_stride)),
                         Sums(at(tokens * shape.v_stride))};
  for (const AttentionSegment& segment : segments) {
    for (std::int64_t h = 0; h < shape.heads; ++h) {
      const std::int64_t kv = h / (shape.heads / shape.kv_heads);
      for (std::int64_t i = 0; i < segment.queries; ++i) {
        const std::int64_t token = segment.query_begin + i;
        Doubles p(at(i + 1)), dp(at(i + 1)), dp_mass(at(i + 1));
        double top = -INFINITY, total = 0, mean = 0, mean_mass = 0;
        for (std::int64_t j = 0; j <= i; ++j) {
          p[at(j)] = score(shape, segment, h, i, j, q, k);
          top = std::max(top, p[at(j)]);
        }
        for (double& value : p) total += value = std::exp(value - top);
        for (std::int64_t j = 0; j <= i; ++j) {
          p[at(j)] /= total;
          for (std::int64_t c = 0; c < dim; ++c) {
            const double term = d_o[at(token * shape.o_stride + h * dim + c)] *
                                v[at((segment.key_begin + j) * shape.v_stride + kv * dim + c)];
            dp[at(j)] += term;
            dp_mass[at(j)] += std::fabs(term);
          }
          mean += p[at(j)] * dp[at(j)];
          mean_mass += p[at(j)] * dp_mass[at(j)];
        }
        for (std::int64_t j = 0; j <= i; ++j) {
          const double ds = p[at(j)] * (dp[at(j)] - mean) * shape.scale;
          const double mass = p[at(j)] * (dp_mass[at(j)] + mean_mass) * shape.scale;
          for (std::int64_t c = 0; c < dim; ++c) {
            const std::size_t at_q = at(token * shape.q_stride + h * dim + c);
            const std::size_t at_k = at((segment.key_begin + j) * shape.k_stride + kv * dim + c);
            out.dq[at_q].add(ds * k[at_k], mass * std::fabs(k[at_k]));
            out.dk[at_k].add(ds * q[at_q], mass * std::fabs(q[at_q]));
            out.dv[at((segment.key_begin + j) * shape.v_stride + kv * dim + c)].add(
                p[at(j)] * d_o[at(token * shape.o_stride + h * dim + c)]);
          }
        }
      }
    }
  }
  return out;
}

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

inline Sums swiglu(std::int64_t T, std::int64_t F, const Doubles& gate_up) {
  Sums m(at(T * F));
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t i = 0; i < F; ++i) {
      const double g = gate_up[at(t * 2 * F + i)], u = gate_up[at(t * 2 * F + F + i)];
      m[at(t * F + i)].add(g * sigmoid(g) * u);
    }
  }
  return m;
}

inline Sums swiglu_backward(std::int64_t T, std::int64_t F, const Doubles& gate_up,
                            const Doubles& dm) {
  Sums out(at(T * 2 * F));
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t i = 0; i < F; ++i) {
      const double g = gate_up[at(t * 2 * F + i)], u = gate_up[at(t * 2 * F + F + i)];
      const double d = dm[at(t * F + i)], s = sigmoid(g);
      out[at(t * 2 * F + i)].add(d * u * s);
      out[at(t * 2 * F + i)].add(d * u * g * s * (1 - s));
      out[at(t * 2 * F + F + i)].add(d * g * s);
    }
  }
  return out;
}

struct CrossEntropyRow {
  double loss = 0;
  std::int32_t best = 0;
  Sums gradient;
};
inline CrossEntropyRow cross_entropy(const double* z, std::int64_t V, std::int32_t target,
                                     double scale) {
  CrossEntropyRow out;
  for (std::int32_t i = 1; i < V; ++i) {
    if (z[i] > z[out.best]) out.best = i;
  }
  const double top = z[out.best];
  long double sum = 0;  // of so many equal terms that double's own rounding would show
  for (std::int64_t i = 0; i < V; ++i) sum += std::exp(z[i] - top);
  const auto total = static_cast<double>(sum);
  out.loss = top - z[target] + std::log(total);
  out.gradient.resize(at(V));
  for (std::int64_t i = 0; i < V; ++i) {
    const double p = std::exp(z[i] - top) / total;
    // exp of a rounded difference is off by the difference's own error.
    const double spread = p > 0 ? 1 + std::fabs(z[i] - top) : 1;
    out.gradient[at(i)].add(p * scale, p * scale * spread);
    if (i == target) out.gradient[at(i)].add(-scale);
  }
  return out;
}

/// Whether dropout keeps feature i of a token: word i mod 4 of Philox(token, i - i mod 4) is at
/// least p * 2^32.
inline bool keeps(std::uint64_t key, std::uint64_t token, std::int64_t i, double probability) {
  const auto words =
      philox({static_cast<std::uint32_t>(token), static_cast<std::uint32_t>(token >> 32U),
              static_cast<std::uint32_t>(i - i % 4), 0xD30FU},
             {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32U)});
  return static_cast<double>(words[at(i % 4)]) >= std::floor(probability * 4294967296.0);
}

}  // namespace tailor::reference
