// Every kernel, every storage type, every instruction-set level this machine runs, against the
// plain loops of tests/support/reference_kernels.h.
//
// Tolerance of a result: u(S) |value| for the one rounding to storage, plus steps * u(A) * mass for
// the arithmetic, where mass is the sum of the magnitudes of all terms and steps bounds how many
// roundings a term passes through.

#include "trainer/kernels/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "tests/support/reference_kernels.h"
#include "trainer/kernels/levels.h"

namespace tailor {
namespace {

using reference::at;
using reference::Doubles;
using reference::Sums;

template <class S>
constexpr double kRoundoff = 0x1p-53;
template <>
constexpr double kRoundoff<float> = 0x1p-24;
template <>
constexpr double kRoundoff<Bf16> = 0x1p-8;

double value_of(double x) { return x; }
double value_of(float x) { return static_cast<double>(x); }
double value_of(Bf16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16U;
  float out = 0;
  std::memcpy(&out, &bits, sizeof out);
  return static_cast<double>(out);
}
template <class S>
S stored(double x) {
  if constexpr (std::is_same_v<S, Bf16>) {  // to nearest, ties to even, from float
    const auto single = static_cast<float>(x);
    std::uint32_t bits = 0;
    std::memcpy(&bits, &single, sizeof bits);
    return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U)};
  } else {
    return static_cast<S>(x);
  }
}

template <class S>
const Kernels<S>& table_of(const LevelTables& tables) {
  if constexpr (std::is_same_v<S, double>) return *tables.f64;
  if constexpr (std::is_same_v<S, float>) return *tables.f32;
  if constexpr (std::is_same_v<S, Bf16>) return *tables.bf16;
}

/// Numbers in (-size, size) from a name, as stored, and what they are in double.
template <class S>
struct Numbers {
  std::vector<S> raw;
  Doubles exact;
  Numbers() = default;
  Numbers(std::int64_t count, std::uint64_t name, double size = 1) {
    for (std::int64_t i = 0; i < count; ++i) {
      push(size * (2 * random_unit(name, RandomStream::sample, static_cast<std::uint64_t>(i)) - 1));
    }
  }
  void push(double x) {
    raw.push_back(stored<S>(x));
    exact.push_back(value_of(raw.back()));
  }
};

template <class T>
void expect_close(const std::vector<T>& got, const Sums& want, double steps, double accumulate,
                  double storages = 1) {
  ASSERT_EQ(got.size(), want.size());
  int wrong = 0;
  for (std::size_t i = 0; i < got.size() && wrong < 5; ++i) {
    const double mass = std::max(want[i].mass, std::fabs(want[i].value));
    const double tolerance = (storages > 1 ? storages * kRoundoff<T> * mass
                                           : 1.001 * kRoundoff<T> * std::fabs(want[i].value)) +
                             steps * accumulate * mass + 1e-37;
    if (std::fabs(value_of(got[i]) - want[i].value) <= tolerance) continue;
    ADD_FAILURE() << "element " << i << ": got " << value_of(got[i]) << ", want " << want[i].value
                  << " within " << tolerance;
    ++wrong;
  }
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// Calls body on [0, count) cut into uneven ranges, last range first.
void in_pieces(std::int64_t count, const std::function<void(std::int64_t, std::int64_t)>& body) {
  std::vector<std::int64_t> cuts = {0};
  for (std::int64_t step = 1; cuts.back() < count; step = step * 3 % 11 + 1) {
    cuts.push_back(std::min(count, cuts.back() + step));
  }
  for (std::size_t i = cuts.size() - 1; i > 0; --i) body(cuts[i - 1], cuts[i]);
}

constexpr std::int64_t kWidths[] = {7, 16, 33, 576};

template <class S>
class KernelsOf : public testing::Test {
 protected:
  static constexpr double kAccumulate = kRoundoff<AccumOf<S>>;

  /// Runs `body(kernels)` at every level, with the level named in failures.
  template <class Body>
  void every_level(const Body& body) {
    const LevelList list = runnable_levels();
    for (int i = 0; i < list.count; ++i) {
      SCOPED_TRACE(list.levels[i].name);
      body(table_of<S>(*list.levels[i].tables));
    }
  }

  /// Runs `kernel(begin, end, out)` whole and in pieces from the same start: equal bits, and close
  /// to `want`. Stretches that are not results must be unchanged, which `want` says too.
  template <class T, class Run>
  void check(std::int64_t count, const std::vector<T>& start, const Sums& want, double steps,
             const Run& run, double storages = 1) {
    std::vector<T> whole = start, pieces = start;
    run(0, count, whole.data());
    in_pieces(count, [&](std::int64_t begin, std::int64_t end) { run(begin, end, pieces.data()); });
    expect_close(whole, want, steps, kAccumulate, storages);
    EXPECT_TRUE(same_bits(whole, pieces)) << "the result depends on how rows are cut into ranges";
  }
};

struct TypeNames {
  template <class S>
  static std::string GetName(int) {
    if (std::is_same_v<S, double>) return "double";
    return std::is_same_v<S, float> ? "float" : "bfloat16";
  }
};
using Stored = testing::Types<double, float, Bf16>;
TYPED_TEST_SUITE(KernelsOf, Stored, TypeNames);

TYPED_TEST(KernelsOf, rms_norm) {
  using S = TypeParam;
  for (const std::int64_t D : kWidths) {
    const std::int64_t T = 13;
    const Numbers<S> x(T * D, 1, 3), w(D, 2), dy(T * D, 3), dres(T * D, 4);
    const Sums y = reference::rms_norm(T, D, x.exact, w.exact, 1e-5);
    const Sums dx =
        reference::rms_norm_backward(T, D, x.exact, w.exact, dy.exact, dres.exact, 1e-5);
    const Sums alone = reference::rms_norm_backward(T, D, x.exact, w.exact, dy.exact,
                                                    Doubles(at(T * D), 0.0), 1e-5);
    const auto steps = static_cast<double>(D + 32);
    this->every_level([&](const Kernels<S>& kernels) {
      this->check(T, std::vector<S>(at(T * D)), y, steps, [&](auto begin, auto end, S* out) {
        kernels.rms_norm(begin, end, D, x.raw.data(), w.raw.data(), 1e-5, out);
      });
      // dx in place of dres, as the decoder calls it.
      this->check(T, dres.raw, dx, steps, [&](auto begin, auto end, S* out) {
        kernels.rms_norm_backward(begin, end, D, x.raw.data(), w.raw.data(), dy.raw.data(), out,
                                  1e-5, out);
      });
      // dx in place of dy and nothing to add to, as latent attention calls it.
      this->check(T, dy.raw, alone, steps, [&](auto begin, auto end, S* out) {
        kernels.rms_norm_backward(begin, end, D, x.raw.data(), w.raw.data(), out, nullptr, 1e-5,
                                  out);
      });
    });
  }
}

TYPED_TEST(KernelsOf, qk_prepare_and_its_transpose) {
  using S = TypeParam;
  using A = AccumOf<S>;
  constexpr std::int64_t T = 9, kPositions = 40;
  struct Case {
    bool rotate, pairs, norm, scale;
  };
  for (const Case& c : {Case{true, false, false, false}, Case{true, true, false, false},
                        Case{true, true, true, false}, Case{false, true, false, true},
                        Case{false, true, false, false}}) {
    for (const std::int64_t dim : {6, 16, 64}) {
      const QkShape shape{5, 3, dim, 5 * dim + 11, c.rotate, c.pairs, c.norm, 1e-5};
      const Numbers<S> x(T * shape.stride, 5, 2), dy(T * shape.stride, 6);
      Numbers<A> cos, sin, scale;
      for (std::int64_t p = 0; p < kPositions; ++p) {
        for (std::int64_t i = 0; i < dim / 2; ++i) {
          const double angle = static_cast<double>(p) / static_cast<double>(i + 1);
          cos.push(std::cos(angle));
          sin.push(std::sin(angle));
        }
      }
      std::vector<std::int32_t> position;
      for (std::int64_t t = 0; t < T; ++t) {
        position.push_back(static_cast<std::int32_t>(t * 17 % kPositions));
        scale.push(1 + 0.1 * static_cast<double>(t));
      }
      // What is no head's stays: one element, its own sum.
      Sums forward, backward, rstd(at(c.norm ? T * shape.heads : 0));
      Numbers<S> out;
      Numbers<A> rstd_given;
      for (const double value : x.exact) forward.push_back({value, std::fabs(value)});
      for (const double value : dy.exact) backward.push_back({value, std::fabs(value)});
      for (std::int64_t t = 0; t < T; ++t) {
        const std::int64_t table = position[at(t)] * (dim / 2);
        for (std::int64_t h = 0; h < shape.heads; ++h) {
          const std::int64_t begin = t * shape.stride + h * dim;
          const double q_scale = c.scale && h < shape.query_heads ? scale.exact[at(t)] : 1;
          const double *cosines = cos.exact.data() + table, *sines = sin.exact.data() + table;
          const auto head =
              reference::prepare_head(shape, x.exact.data() + begin, cosines, sines, q_scale);
          const Sums gradient = reference::prepare_head_backward(
              shape, head.out, head.rstd, dy.exact.data() + begin, cosines, sines, q_scale);
          std::copy(head.out.begin(), head.out.end(), forward.begin() + begin);
          std::copy(gradient.begin(), gradient.end(), backward.begin() + begin);
          if (c.norm) rstd[at(t * shape.heads + h)].add(head.rstd);
          rstd_given.push(head.rstd);
        }
      }
      for (const reference::Sum& element : forward) out.push(element.value);
      // Up to two of the three steps apply to a layer, and each rounds to storage, as in
      // Hugging Face's modelling code; a norm's mean mixes the errors of its elements.
      const double storages = c.norm ? 6 : 2;
      this->every_level([&](const Kernels<S>& kernels) {
        std::vector<A> rstd_got(rstd.size());
        const A* q_scale = c.scale ? scale.raw.data() : nullptr;
        this->check(
            T, x.raw, forward, 128,
            [&](auto begin, auto end, S* qk) {
              kernels.qk_prepare(begin, end, shape, qk, position.data(), cos.raw.data(),
                                 sin.raw.data(), q_scale, rstd_got.data());
            },
            storages);
        expect_close(rstd_got, rstd, 128, std::max(this->kAccumulate, kRoundoff<S>));
        this->check(
            T, dy.raw, backward, 128,
            [&](auto begin, auto end, S* dqk) {
              kernels.qk_prepare_backward(begin, end, shape, out.raw.data(), dqk, position.data(),
                                          cos.raw.data(), sin.raw.data(), q_scale,
                                          rstd_given.raw.data());
            },
            storages);
      });
    }
  }
}

TYPED_TEST(KernelsOf, attention) {
  using S = TypeParam;
  using A = AccumOf<S>;
  for (const std::int64_t group : {1, 3}) {
    for (const std::int64_t dim : {6, 16, 64}) {
      const std::int64_t kv_heads = 2, heads = group * kv_heads;
      const AttentionShape shape{heads,
                                 kv_heads,
                                 dim,
                                 dim,
                                 heads * dim + 5,
                                 kv_heads * dim + 3,
                                 kv_heads * dim + 9,
                                 heads * dim + 7,
                                 dim,
                                 1 / std::sqrt(static_cast<double>(dim))};
      std::vector<AttentionSegment> segments;
      std::int64_t queries = 0, keys = 0;
      for (const auto& [q, k] : std::vector<std::pair<std::int64_t, std::int64_t>>{
               {1, 1}, {5, 5}, {64, 64}, {65, 65}, {200, 200}, {1, 200}, {5, 65}, {65, 129}}) {
        segments.push_back({queries, q, keys, k});
        queries += q;
        keys += k;
      }
      const Numbers<S> q(queries * shape.q_stride, 11, 3), k(keys * shape.k_stride, 12, 3),
          v(keys * shape.v_stride, 13);
      const auto want = reference::attention(segments, shape, queries, q.exact, k.exact, v.exact);
      Sums lse;
      for (const double value : want.lse) lse.push_back({value, std::fabs(value) + 1});
      // A score carries dim roundings of terms up to 9 * scale; exp passes them on.
      const double steps = static_cast<double>(dim) * 9 * shape.scale * 4 + 300;
      const auto tasks = static_cast<std::int64_t>(segments.size()) * kv_heads;
      this->every_level([&](const Kernels<S>& kernels) {
        std::vector<A> lse_got(lse.size());
        this->check(tasks, std::vector<S>(want.o.size()), want.o, steps,
                    [&](auto begin, auto end, S* o) {
                      kernels.attention(begin, end, segments.data(), shape, q.raw.data(),
                                        k.raw.data(), v.raw.data(), o, lse_got.data());
                    });
        expect_close(lse_got, lse, steps, this->kAccumulate);
        std::vector<S> no_lse(want.o.size()), with_lse(want.o.size());
        kernels.attention(0, tasks, segments.data(), shape, q.raw.data(), k.raw.data(),
                          v.raw.data(), no_lse.data(), nullptr);
        kernels.attention(0, tasks, segments.data(), shape, q.raw.data(), k.raw.data(),
                          v.raw.data(), with_lse.data(), lse_got.data());
        EXPECT_TRUE(same_bits(no_lse, with_lse));
      });
    }
  }
}

TYPED_TEST(KernelsOf, attention_backward) {
  using S = TypeParam;
  using A = AccumOf<S>;
  for (const std::int64_t group : {1, 3}) {
    for (const std::int64_t dim : {6, 16, 64}) {
      const std::int64_t kv_heads = 2, heads = group * kv_heads;
      const AttentionShape shape{heads,
                                 kv_heads,
                                 dim,
                                 dim,
                                 heads * dim + 5,
                                 kv_heads * dim + 3,
                                 kv_heads * dim + 9,
                                 heads * dim + 7,
                                 dim,
                                 1 / std::sqrt(static_cast<double>(dim))};
      std::vector<AttentionSegment> segments;
      std::int64_t tokens = 0;
      for (const std::int64_t n : {1, 5, 64, 65, 200}) {
        segments.push_back({tokens, n, tokens, n});
        tokens += n;
      }
      const Numbers<S> q(tokens * shape.q_stride, 21, 2), k(tokens * shape.k_stride, 22, 2),
          v(tokens * shape.v_stride, 23), d_o(tokens * shape.o_stride, 24);
      const auto forward = reference::attention(segments, shape, tokens, q.exact, k.exact, v.exact);
      const auto want = reference::attention_backward(segments, shape, tokens, q.exact, k.exact,
                                                      v.exact, d_o.exact);
      Numbers<S> o;
      Numbers<A> lse;
      for (const reference::Sum& element : forward.o) o.push(element.value);
      for (const double value : forward.lse) lse.push(value);
      // The kernel's mean comes from the stored o, one rounding to storage away from the truth,
      // which the masses of dq and dk carry (dv does not depend on it).
      const double steps = static_cast<double>(dim) * 8 + 500;
      const double mean = steps + (std::is_same_v<S, Bf16> ? kRoundoff<S> / kRoundoff<A> : 0);
      const auto tasks = static_cast<std::int64_t>(segments.size()) * kv_heads;
      this->every_level([&](const Kernels<S>& kernels) {
        const auto run = [&](auto begin, auto end, S* dq, S* dk, S* dv) {
          kernels.attention_backward(begin, end, segments.data(), shape, q.raw.data(), k.raw.data(),
                                     v.raw.data(), o.raw.data(), lse.raw.data(), d_o.raw.data(), dq,
                                     dk, dv);
        };
        const std::vector<S> zero_q(want.dq.size()), zero_k(want.dk.size()), zero_v(want.dv.size());
        std::vector<S> dq = zero_q, dk = zero_k, dv = zero_v;
        run(std::int64_t{0}, tasks, dq.data(), dk.data(), dv.data());
        expect_close(dq, want.dq, mean, this->kAccumulate);
        expect_close(dk, want.dk, mean, this->kAccumulate);
        expect_close(dv, want.dv, steps, this->kAccumulate);
        std::vector<S> dq_cut = zero_q, dk_cut = zero_k, dv_cut = zero_v;
        in_pieces(tasks, [&](std::int64_t begin, std::int64_t end) {
          run(begin, end, dq_cut.data(), dk_cut.data(), dv_cut.data());
        });
        EXPECT_TRUE(same_bits(dq, dq_cut) && same_bits(dk, dk_cut) && same_bits(dv, dv_cut));
      });
    }
  }
}

TYPED_TEST(KernelsOf, swiglu) {
  using S = TypeParam;
  for (const std::int64_t F : kWidths) {
    const std::int64_t T = 11;
    Numbers<S> gate_up(T * 2 * F, 31, 8);
    const Numbers<S> dm(T * F, 32);
    // Gates where a sigmoid by e^x would overflow or vanish.
    const double extremes[] = {80, -80, 200, -200, 0, -0.0};
    for (std::size_t i = 0; i < 6; ++i) {
      gate_up.raw[i] = stored<S>(extremes[i]);
      gate_up.exact[i] = extremes[i];
    }
    const Sums m = reference::swiglu(T, F, gate_up.exact);
    const Sums d = reference::swiglu_backward(T, F, gate_up.exact, dm.exact);
    // e^-80 is off by 80 roundings of its argument.
    this->every_level([&](const Kernels<S>& kernels) {
      this->check(T, std::vector<S>(m.size()), m, 128, [&](auto begin, auto end, S* out) {
        kernels.swiglu(begin, end, F, gate_up.raw.data(), out);
      });
      this->check(T, std::vector<S>(d.size()), d, 128, [&](auto begin, auto end, S* out) {
        kernels.swiglu_backward(begin, end, F, gate_up.raw.data(), dm.raw.data(), out, nullptr);
      });
      // With m asked for: the same gradient, and the m of the forward.
      std::vector<S> m_forward(m.size()), m_backward(m.size()), alone(d.size()), both(d.size());
      kernels.swiglu(0, T, F, gate_up.raw.data(), m_forward.data());
      kernels.swiglu_backward(0, T, F, gate_up.raw.data(), dm.raw.data(), alone.data(), nullptr);
      kernels.swiglu_backward(0, T, F, gate_up.raw.data(), dm.raw.data(), both.data(),
                              m_backward.data());
      EXPECT_TRUE(same_bits(m_backward, m_forward));
      EXPECT_TRUE(same_bits(both, alone));
    });
  }
}

TYPED_TEST(KernelsOf, swiglu_of_nan_is_nan_and_of_huge_gates_is_finite) {
  using S = TypeParam;
  this->every_level([&](const Kernels<S>& kernels) {
    const double gates[] = {std::numeric_limits<double>::quiet_NaN(), 1e30, -1e30, 3e38, -3e38};
    const double want[] = {gates[0], 1e30, 0, 3e38, 0};
    for (std::size_t i = 0; i < 5; ++i) {
      const S gate_up[] = {stored<S>(gates[i]), stored<S>(1.0)};
      const S dm = stored<S>(1.0);
      S m{}, d[2] = {};
      kernels.swiglu(0, 1, 1, gate_up, &m);
      kernels.swiglu_backward(0, 1, 1, gate_up, &dm, d, nullptr);
      if (i == 0) {
        EXPECT_TRUE(std::isnan(value_of(m)) && std::isnan(value_of(d[0])));
        continue;
      }
      const double error = 2 * kRoundoff<S> * std::fabs(want[i]);
      EXPECT_NEAR(value_of(m), want[i], error) << "gate " << gates[i];
      EXPECT_EQ(value_of(d[0]), gates[i] > 0 ? 1 : 0) << "gate " << gates[i];
      EXPECT_NEAR(value_of(d[1]), want[i], error) << "gate " << gates[i];
    }
  });
}

TYPED_TEST(KernelsOf, lora_products) {
  using S = TypeParam;
  using A = AccumOf<S>;
  for (const std::int64_t T : {1, 5, 64, 65, 200}) {
    for (const std::int64_t D : kWidths) {
      for (const std::int64_t R : {1, 3, 8, 24}) {
        const std::int64_t wide = D + 13, thin = R + 5;
        const Numbers<S> x(T * wide, 41), a(R * D, 42), xa(T * thin, 43), y(T * wide, 44);
        const Numbers<A> g(R * D, 45);
        Sums down, up, gradient;
        for (const double value : xa.exact) down.push_back({value, std::fabs(value)});
        for (const double value : y.exact) up.push_back({value, std::fabs(value)});
        for (const double value : g.exact) gradient.push_back({value, std::fabs(value)});
        for (std::int64_t t = 0; t < T; ++t) {
          for (std::int64_t r = 0; r < R; ++r) {
            reference::Sum product;
            for (std::int64_t i = 0; i < D; ++i) {
              product.add(1.5 * x.exact[at(t * wide + i)] * a.exact[at(r * D + i)]);
              up[at(t * wide + i)].add(xa.exact[at(t * thin + r)] * a.exact[at(r * D + i)]);
              gradient[at(r * D + i)].add(xa.exact[at(t * thin + r)] * x.exact[at(t * wide + i)]);
            }
            down[at(t * thin + r)] = product;
          }
        }
        this->every_level([&](const Kernels<S>& kernels) {
          SCOPED_TRACE(testing::Message() << "T " << T << ", D " << D << ", R " << R);
          this->check(T, xa.raw, down, static_cast<double>(D + 2),
                      [&](auto begin, auto end, S* out) {
                        kernels.lora_down(begin, end, R, D, x.raw.data(), wide, a.raw.data(), out,
                                          thin, 1.5);
                      });
          this->check(T, y.raw, up, static_cast<double>(R + 2), [&](auto begin, auto end, S* out) {
            kernels.lora_up(begin, end, R, D, xa.raw.data(), thin, a.raw.data(), out, wide);
          });
          this->check(D, g.raw, gradient, static_cast<double>(T + 2),
                      [&](auto begin, auto end, A* out) {
                        kernels.lora_gradient(begin, end, T, R, D, xa.raw.data(), thin,
                                              x.raw.data(), wide, out);
                      });
        });
      }
    }
  }
}

TYPED_TEST(KernelsOf, routing_copies) {
  using S = TypeParam;
  using A = AccumOf<S>;
  constexpr std::int64_t T = 13, K = 2, kRows = T * K;
  for (const std::int64_t D : kWidths) {
    const Numbers<S> x(T * D, 51), y(kRows * D, 52), out(T * D, 53);
    const Numbers<A> scale(kRows, 54);
    std::vector<std::int32_t> token(at(kRows)), slot_of(at(kRows));
    for (std::int32_t i = 0; i < kRows; ++i) {
      slot_of[at(i)] = static_cast<std::int32_t>(i * 7 % kRows);  // 7 and 26 share no divisor
      token[at(slot_of[at(i)])] = static_cast<std::int32_t>(i / K);
    }
    Sums gathered(at(kRows * D)), plain(at(kRows * D)), combined(at(T * D)), summed(at(T * D)),
        dots(at(kRows));
    for (std::int64_t row = 0; row < kRows; ++row) {
      for (std::int64_t i = 0; i < D; ++i) {
        const double from = x.exact[at(token[at(row)] * D + i)];
        gathered[at(row * D + i)].add(scale.exact[at(row)] * from);
        plain[at(row * D + i)].add(from);
        dots[at(row)].add(y.exact[at(row * D + i)] * from);
      }
    }
    for (std::int64_t t = 0; t < T; ++t) {
      for (std::int64_t i = 0; i < D; ++i) {
        combined[at(t * D + i)].add(out.exact[at(t * D + i)]);
        summed[at(t * D + i)].add(out.exact[at(t * D + i)]);
        for (std::int64_t k = 0; k < K; ++k) {
          const std::int64_t slot = slot_of[at(t * K + k)];
          combined[at(t * D + i)].add(scale.exact[at(slot)] * y.exact[at(slot * D + i)]);
          summed[at(t * D + i)].add(y.exact[at(slot * D + i)]);
        }
      }
    }
    this->every_level([&](const Kernels<S>& kernels) {
      const std::vector<S> rows(at(kRows * D));
      this->check(kRows, rows, gathered, 2, [&](auto begin, auto end, S* to) {
        kernels.gather_rows(begin, end, D, x.raw.data(), token.data(), scale.raw.data(), to);
      });
      this->check(kRows, rows, plain, 0, [&](auto begin, auto end, S* to) {
        kernels.gather_rows(begin, end, D, x.raw.data(), token.data(), nullptr, to);
      });
      this->check(T, out.raw, combined, K + 2, [&](auto begin, auto end, S* to) {
        kernels.combine_rows(begin, end, D, K, y.raw.data(), slot_of.data(), scale.raw.data(), to);
      });
      this->check(T, out.raw, summed, K + 2, [&](auto begin, auto end, S* to) {
        kernels.combine_rows(begin, end, D, K, y.raw.data(), slot_of.data(), nullptr, to);
      });
      this->check(kRows, std::vector<A>(at(kRows)), dots, static_cast<double>(D),
                  [&](auto begin, auto end, A* to) {
                    kernels.gate_gradient(begin, end, D, y.raw.data(), x.raw.data(), token.data(),
                                          to);
                  });
    });
  }
}

TYPED_TEST(KernelsOf, cross_entropy) {
  using S = TypeParam;
  for (const std::int64_t V : {1, 50, 1030}) {
    // Ordinary rows, then: all equal, one far above, one far below, ties, the largest finite
    // numbers, minus infinity beside a finite one.
    std::vector<Numbers<S>> rows;
    for (std::uint64_t row = 0; row < 6; ++row) {
      rows.emplace_back(V, 60 + row, row < 3 ? 5.0 : 60.0);
    }
    const auto special = [&](const std::function<double(std::int64_t)>& value) {
      Numbers<S> row;
      for (std::int64_t i = 0; i < V; ++i) row.push(value(i));
      rows.push_back(row);
    };
    constexpr double kHuge = 3e38, kInfinity = std::numeric_limits<double>::infinity();
    special([](auto) { return -7.0; });
    special([](auto i) { return i == 3 ? 1e4 : -1e4; });
    special([](auto i) { return i == 3 ? -1e4 : 0.5; });
    special([](auto i) { return i % 5 == 4 ? 2.0 : 1.0; });
    special([](auto i) { return i == 1 ? kHuge : -kHuge; });
    special([](auto i) { return i % 2 == 0 ? 1.0 : -kInfinity; });
    const auto n = static_cast<std::int64_t>(rows.size());
    std::vector<S> logits;
    std::vector<std::int32_t> target;
    Doubles loss;
    std::vector<std::int32_t> best;
    Sums gradient, unchanged;
    for (std::int64_t row = 0; row < n; ++row) {
      const Numbers<S>& z = rows[at(row)];
      logits.insert(logits.end(), z.raw.begin(), z.raw.end());
      target.push_back(static_cast<std::int32_t>(V == 1 ? 0 : (row * 13 + 2) % V / 2 * 2));
      const auto want = reference::cross_entropy(z.exact.data(), V, target.back(), 0.37);
      loss.push_back(want.loss);
      best.push_back(want.best);
      gradient.insert(gradient.end(), want.gradient.begin(), want.gradient.end());
    }
    this->every_level([&](const Kernels<S>& kernels) {
      std::vector<SoftmaxRow<AccumOf<S>>> state(at(n));
      const auto check_state = [&](const std::string& how) {
        for (std::size_t row = 0; row < loss.size(); ++row) {
          EXPECT_EQ(state[row].best, best[row]) << how;
          EXPECT_NEAR(state[row].loss(), loss[row], 100 * this->kAccumulate + 1e-15 * loss[row])
              << how << ", row " << row << " of width " << V;
        }
      };
      for (const std::int64_t run : {V, std::int64_t{1}, std::int64_t{7}, std::int64_t{64}}) {
        // The classes in runs, as a streamed head has them.
        const auto each_run = [&](std::int64_t begin, std::int64_t end, const auto& use) {
          for (std::int64_t first = 0; first < V; first += run) {
            const std::int64_t width = std::min(run, V - first);
            std::vector<S> part(at(n * width));
            for (std::int64_t row = begin; row < end; ++row) {
              std::copy_n(logits.begin() + row * V + first, width, part.begin() + row * width);
            }
            use(first, width, part);
          }
        };
        state.assign(at(n), {});
        each_run(0, n, [&](std::int64_t first, std::int64_t width, std::vector<S>& part) {
          kernels.softmax_run(0, n, width, first, part.data(), target.data(), state.data());
        });
        check_state("runs of " + std::to_string(run));
        const auto losses = state;
        // The gradient, for a head that is the identity: class v's vector is the v-th unit vector.
        std::vector<S> units(at(n * V));
        for (std::int64_t row = 0; row < n; ++row) {
          units[at(row * V + target[at(row)])] = stored<S>(1.0);
        }
        // Each run's sum is rescaled and added with a rounding of its own; weights and result are
        // stored.
        const auto steps = static_cast<double>(100 + 2 * V / run);
        const auto run_all = [&](std::int64_t begin, std::int64_t end, S* out) {
          std::vector<AccumOf<S>> sum(at(n * V)), rescale(at(n));
          each_run(begin, end, [&](std::int64_t first, std::int64_t width, std::vector<S>& part) {
            kernels.softmax_weights(begin, end, width, first, part.data(), target.data(),
                                    state.data(), rescale.data());
            std::vector<S> product(at(n * V));
            for (std::int64_t row = begin; row < end; ++row) {
              std::copy_n(part.begin() + row * width, width, product.begin() + row * V + first);
            }
            kernels.softmax_sum(begin, end, V, product.data(), rescale.data(), sum.data());
          });
          std::copy_n(units.begin() + begin * V, (end - begin) * V, out + begin * V);
          kernels.softmax_gradient(begin, end, V, sum.data(), out, 0.37, state.data(), out);
        };
        this->check(n, std::vector<S>(at(n * V)), gradient, steps, run_all, 2);
        for (std::size_t row = 0; row < losses.size(); ++row) {
          EXPECT_EQ(state[row].sum, losses[row].sum) << "the losses are those of softmax_run";
          EXPECT_EQ(state[row].loss(), losses[row].loss());
        }
      }
    });
  }
}

TYPED_TEST(KernelsOf, cross_entropy_of_nan_is_nan) {
  using S = TypeParam;
  this->every_level([&](const Kernels<S>& kernels) {
    for (const std::int64_t V : {5, 50}) {
      for (const std::int64_t where : {std::int64_t{0}, V / 2, V - 1}) {
        std::vector<S> z(at(V), stored<S>(1.0));
        z[at(where)] = stored<S>(std::numeric_limits<double>::quiet_NaN());
        const std::int32_t target = 1;
        SoftmaxRow<AccumOf<S>> row;
        kernels.softmax_run(0, 1, V, 0, z.data(), &target, &row);
        EXPECT_TRUE(std::isnan(row.loss())) << "NaN at " << where << " of " << V;
        EXPECT_TRUE(row.best >= 0 && row.best < V);
      }
    }
  });
}

TYPED_TEST(KernelsOf, dropout) {
  using S = TypeParam;
  constexpr std::uint64_t kKey = 0x123456789ABCDEFULL;
  for (const std::int64_t D : kWidths) {
    const std::int64_t T = 17, stride = D + 3, out_stride = D + 6;
    const Numbers<S> x(T * stride, 71), start(T * out_stride, 72);
    std::vector<std::uint64_t> tokens;
    for (std::uint64_t t = 0; t < 17; ++t) tokens.push_back((t << 33U) | (t * 5));
    for (const double p : {0.1, 0.5}) {
      Sums want;
      for (const double value : start.exact) want.push_back({value, std::fabs(value)});
      std::int64_t kept = 0;
      for (std::int64_t t = 0; t < T; ++t) {
        for (std::int64_t i = 0; i < D; ++i) {
          const bool keep = reference::keeps(kKey, tokens[at(t)], i, p);
          kept += keep ? 1 : 0;
          const double value = keep ? x.exact[at(t * stride + i)] / (1 - p) : 0;
          want[at(t * out_stride + i)] = {value, std::fabs(value)};
        }
      }
      // Five standard deviations of a binomial count.
      const auto count = static_cast<double>(T * D);
      EXPECT_NEAR(static_cast<double>(kept) / count, 1 - p, 5 * std::sqrt(p * (1 - p) / count));
      this->every_level([&](const Kernels<S>& kernels) {
        this->check(T, start.raw, want, 3, [&](auto begin, auto end, S* out) {
          kernels.dropout(begin, end, D, x.raw.data(), stride, p, kKey, tokens.data(), out,
                          out_stride);
        });
      });
    }
  }
}

TYPED_TEST(KernelsOf, add) {
  using S = TypeParam;
  for (const std::int64_t n : kWidths) {
    const Numbers<S> x(n, 81), y(n, 82);
    Sums want(at(n));
    for (std::size_t i = 0; i < want.size(); ++i) {
      want[i].add(x.exact[i]);
      want[i].add(y.exact[i]);
    }
    this->every_level([&](const Kernels<S>& kernels) {
      this->check(n, y.raw, want, 1, [&](auto begin, auto end, S* out) {
        kernels.add(begin, end, x.raw.data(), out);
      });
    });
  }
}

TEST(Kernels, bf16_results_are_rounded_to_nearest_and_ties_to_even) {
  // In units of 2^-7: 1 + n + 1/2 lies between two neighbours, a little more or less does not.
  constexpr std::int64_t kCount = 67;  // whole vectors, pairs of them, and a short rest
  std::vector<Bf16> start, half, want;
  const double sizes[] = {0.5, 0.498046875, 0.50390625};
  for (std::int64_t i = 0; i < kCount; ++i) {
    const double n = static_cast<double>(i % 5), sign = i % 2 == 0 ? 1 : -1, more = sizes[i % 3];
    const double kept =
        more == 0.5 ? static_cast<double>((i % 5 + 1) / 2 * 2) : std::round(n + more);
    start.push_back(stored<Bf16>(sign * (1 + n * 0x1p-7)));
    half.push_back(stored<Bf16>(sign * more * 0x1p-7));
    want.push_back(stored<Bf16>(sign * (1 + kept * 0x1p-7)));
  }
  const Bf16 one = stored<Bf16>(1.0);
  const LevelList list = runnable_levels();
  for (int i = 0; i < list.count; ++i) {
    SCOPED_TRACE(list.levels[i].name);
    const Kernels<Bf16>& kernels = *list.levels[i].tables->bf16;
    std::vector<Bf16> by_vector = start, by_pair = start;
    kernels.add(0, kCount, half.data(), by_vector.data());
    kernels.lora_up(0, 1, 1, kCount, &one, 1, half.data(), by_pair.data(), kCount);
    EXPECT_TRUE(same_bits(by_vector, want));
    EXPECT_TRUE(same_bits(by_pair, want));
  }
}

TEST(Kernels, the_best_level_is_the_one_that_runs) {
  const LevelList list = runnable_levels();
  ASSERT_GE(list.count, 1);
  EXPECT_STREQ(kernel_level(), list.levels[0].name);
  EXPECT_STREQ(list.levels[list.count - 1].name, "x86-64");
  EXPECT_EQ(&kernels<float>(), list.levels[0].tables->f32);
  EXPECT_EQ(&kernels<double>(), list.levels[0].tables->f64);
  EXPECT_EQ(&kernels<Bf16>(), list.levels[0].tables->bf16);
}

}  // namespace
}  // namespace tailor
