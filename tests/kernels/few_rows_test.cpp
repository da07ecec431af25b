// Products of few rows at every level that has its own, against a plain double loop.
//
// A product of two bfloat16 numbers is exact in float, so that a sum over K passes through at most
// K + 1 roundings of 2^-24 of the sum of the magnitudes, and the result through one of 2^-8.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "base/random.h"
#include "data/quant/codec.h"
#include "trainer/kernels/levels.h"

namespace tailor {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr std::uint16_t kGuard = 0x7FC5;  // a NaN, so that reading one is seen as well

double value_of(Bf16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16U;
  float out = 0;
  std::memcpy(&out, &bits, sizeof out);
  return static_cast<double>(out);
}
Bf16 rounded(double x) {  // to nearest, ties to even, of a number that float holds
  const auto single = static_cast<float>(x);
  std::uint32_t bits = 0;
  std::memcpy(&bits, &single, sizeof bits);
  if (std::isnan(x)) return {0x7FC0};
  return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U)};
}

/// Rows that lie `gap` elements apart, all of them guards, as are those behind the last.
struct Matrix {
  std::int64_t rows, columns, stride;
  std::vector<Bf16> all;
  Matrix(std::int64_t r, std::int64_t c, std::int64_t gap)
      : rows(r), columns(c), stride(c + gap), all(static_cast<std::size_t>(r * (c + gap) + 40)) {
    for (Bf16& x : all) x.bits = kGuard;
  }
  Bf16& at(std::int64_t r, std::int64_t c) { return all[static_cast<std::size_t>(r * stride + c)]; }
  double value(std::int64_t r, std::int64_t c) const {
    return value_of(all[static_cast<std::size_t>(r * stride + c)]);
  }
  template <class Draw>
  void fill(std::uint64_t name, const Draw& draw) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) {
        const auto index = static_cast<std::uint64_t>(r * columns + c);
        at(r, c) = rounded(draw(random_unit(name, RandomStream::sample, index)));
      }
    }
  }
};
bool same_bits(const Matrix& a, const Matrix& b) {
  return std::memcmp(a.all.data(), b.all.data(), a.all.size() * sizeof(Bf16)) == 0;
}

struct Product {
  Matrix x, w, y;
  Product(std::int64_t M, std::int64_t K, std::int64_t N, std::int64_t gap)
      : x(M, K, gap), w(K, N, 2 * gap), y(M, N, 3 * gap) {}

  void run(const Kernels<Bf16>& kernels, std::int64_t begin, std::int64_t end) {
    kernels.few_rows(begin, end, x.rows, x.columns, x.all.data(), x.stride, w.all.data(), w.stride,
                     y.all.data(), y.stride);
  }
  double sum(std::int64_t m, std::int64_t n, double* mass = nullptr) const {
    double out = 0, magnitudes = 0;
    for (std::int64_t k = 0; k < x.columns; ++k) {
      out += x.value(m, k) * w.value(k, n);
      magnitudes += std::fabs(x.value(m, k) * w.value(k, n));
    }
    if (mass != nullptr) *mass = magnitudes;
    return out;
  }
};

/// body(kernels) at every level with a product of its own.
template <class Body>
void at_each_level(const Body& body) {
  const LevelList list = runnable_levels();
  int run = 0;
  for (int i = 0; i < list.count; ++i) {
    const Kernels<Bf16>& kernels = *list.levels[i].tables->bf16;
    if (kernels.few_rows == nullptr) continue;
    SCOPED_TRACE(list.levels[i].name);
    body(kernels);
    ++run;
  }
  if (run == 0) GTEST_SKIP() << "no bfloat16 products at " << list.levels[0].name;
}

struct Shape {
  std::int64_t M, K, N;
};
// Less and more than a row tile, a deep block (64), a wide block (32) and a panel (256); odd K.
constexpr Shape kShapes[] = {{1, 1, 1},    {2, 3, 5},     {16, 64, 32},   {7, 31, 33},
                             {17, 65, 31}, {15, 129, 64}, {33, 63, 300},  {48, 200, 257},
                             {5, 130, 70}, {64, 97, 513}, {100, 259, 40}, {16, 32, 600}};

TEST(FewRows, is_there_where_the_instructions_are) {
  const LevelList list = runnable_levels();
  for (int i = 0; i < list.count; ++i) {
    const std::string name = list.levels[i].name;
    EXPECT_EQ(list.levels[i].tables->bf16->few_rows != nullptr,
              name == "x86-64-v4+amx" || name == "x86-64-v4+bf16")
        << name;
    EXPECT_EQ(list.levels[i].tables->f32->few_rows, nullptr);
    EXPECT_EQ(list.levels[i].tables->f64->few_rows, nullptr);
  }
}

// Numbers of -3 .. 3: every sum is an integer that float holds, so that the result is its rounding.
TEST(FewRows, small_integers_to_the_bit) {
  at_each_level([](const Kernels<Bf16>& kernels) {
    for (const auto& [M, K, N] : kShapes) {
      for (const std::int64_t gap : {0, 3}) {
        SCOPED_TRACE(testing::Message() << M << "x" << K << "x" << N << " gap " << gap);
        Product product(M, K, N, gap);
        const auto integer = [](double unit) { return std::floor(7 * unit) - 3; };
        product.x.fill(1, integer);
        product.w.fill(2, integer);
        Matrix want(M, N, 3 * gap);
        for (std::int64_t m = 0; m < M; ++m) {
          for (std::int64_t n = 0; n < N; ++n) want.at(m, n) = rounded(product.sum(m, n));
        }
        product.run(kernels, 0, N);
        EXPECT_TRUE(same_bits(product.y, want));
      }
    }
  });
}

TEST(FewRows, is_within_the_bound) {
  at_each_level([](const Kernels<Bf16>& kernels) {
    for (const auto& [M, K, N] : kShapes) {
      SCOPED_TRACE(testing::Message() << M << "x" << K << "x" << N);
      Product product(M, K, N, 5);
      const auto wide = [](double unit) {  // of sizes 2^-8 .. 1
        return std::ldexp(2 * std::fmod(unit * 4096, 1.0) - 1, -static_cast<int>(unit * 8));
      };
      product.x.fill(3, wide);
      product.w.fill(4, wide);
      product.run(kernels, 0, N);
      int wrong = 0;
      for (std::int64_t m = 0; m < M; ++m) {
        for (std::int64_t n = 0; n < N; ++n) {
          double mass = 0;
          const double want = product.sum(m, n, &mass);
          const double summing = static_cast<double>(K + 1) * 0x1p-24 * mass;
          const double bound = summing + 0x1p-8 * (std::fabs(want) + summing);
          const double got = product.y.value(m, n);
          if (!(std::fabs(got - want) <= bound) && ++wrong < 5) {
            ADD_FAILURE() << m << ", " << n << ": got " << got << ", want " << want << " within "
                          << bound;
          }
        }
      }
      EXPECT_EQ(wrong, 0);
    }
  });
}

TEST(FewRows, ranges_and_threads_do_not_change_bits) {
  at_each_level([](const Kernels<Bf16>& kernels) {
    for (const auto& [M, K, N] : kShapes) {
      SCOPED_TRACE(testing::Message() << M << "x" << K << "x" << N);
      Product product(M, K, N, 1);
      const auto draw = [](double unit) { return 2 * unit - 1; };
      product.x.fill(5, draw);
      product.w.fill(6, draw);
      Product halves = product, pieces = product;
      product.run(kernels, 0, N);
      std::thread other([&] { halves.run(kernels, N / 2, N); });
      halves.run(kernels, 0, N / 2);
      other.join();
      EXPECT_TRUE(same_bits(halves.y, product.y));
      for (std::int64_t begin = 0, step = 1; begin < N; step = step * 5 % 71 + 1) {
        const std::int64_t end = std::min(N, begin + step);
        pieces.run(kernels, begin, end);
        begin = end;
      }
      EXPECT_TRUE(same_bits(pieces.y, product.y));
    }
  });
}

TEST(FewRows, what_is_no_number_stays_in_its_row_and_column) {
  at_each_level([](const Kernels<Bf16>& kernels) {
    Product product(19, 71, 45, 2);
    const auto draw = [](double unit) { return unit + 0.5; };
    product.x.fill(7, draw);
    product.w.fill(8, draw);
    Product clean = product;
    clean.run(kernels, 0, 45);
    product.x.at(3, 70) = rounded(kNaN);
    product.x.at(17, 12) = rounded(-kInf);
    product.w.at(64, 44) = rounded(kInf);
    product.run(kernels, 0, 45);
    for (std::int64_t m = 0; m < 19; ++m) {
      for (std::int64_t n = 0; n < 45; ++n) {
        SCOPED_TRACE(testing::Message() << m << ", " << n);
        const double got = product.y.value(m, n);
        if (m == 3 || (m == 17 && n == 44)) {
          EXPECT_TRUE(std::isnan(got));
        } else if (m == 17) {
          EXPECT_EQ(got, -kInf);
        } else if (n == 44) {
          EXPECT_EQ(got, kInf);
        } else {
          EXPECT_EQ(product.y.at(m, n).bits, clean.y.at(m, n).bits);
        }
      }
    }
  });
}

// ------------------------------------------------------------------ y = x W^T, and W as stored

/// y = x w^T by few_rows_t for rows [begin, end) of w.
void run_t(const Kernels<Bf16>& kernels, const Matrix& x, const Matrix& w, Matrix& y,
           std::int64_t begin, std::int64_t end) {
  kernels.few_rows_t(begin, end, x.rows, x.columns, x.all.data(), x.stride, w.all.data(), w.stride,
                     y.all.data(), y.stride);
}

// few_rows is compared with double above; both take a sum's pairs in the same order.
TEST(FewRowsT, has_the_bits_of_few_rows) {
  at_each_level([](const Kernels<Bf16>& kernels) {
    for (const auto& [M, K, N] : kShapes) {
      SCOPED_TRACE(testing::Message() << M << "x" << K << "x" << N);
      Product product(M, K, N, 3);
      const auto draw = [](double unit) { return 2 * unit - 1; };
      product.x.fill(11, draw);
      product.w.fill(12, draw);
      Matrix turned(N, K, 5), y(M, N, 9);
      for (std::int64_t k = 0; k < K; ++k) {
        for (std::int64_t n = 0; n < N; ++n) turned.at(n, k) = product.w.at(k, n);
      }
      product.run(kernels, 0, N);
      run_t(kernels, product.x, turned, y, 0, N);
      EXPECT_TRUE(same_bits(y, product.y));
      Matrix pieces(M, N, 9);
      for (std::int64_t begin = 0, step = 1; begin < N; step = step * 5 % 71 + 1) {
        const std::int64_t end = std::min(N, begin + step);
        run_t(kernels, product.x, turned, pieces, begin, end);
        begin = end;
      }
      EXPECT_TRUE(same_bits(pieces, product.y));
    }
  });
}

/// Two matrices, encoded; and decoded, one below the other, with rows that lie `gap` apart.
struct Stored {
  std::vector<std::vector<std::byte>> bytes;
  std::vector<EncodedMatrix> parts;
  Matrix decoded;

  Stored(const WeightFormat& format, const std::vector<std::int64_t>& rows, std::int64_t columns)
      : decoded(rows[0] + rows[1], columns, 0) {
    std::int64_t first = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto codes = aligned(code_bytes(format, rows[i], columns));
      const auto scales = aligned(scale_bytes(format, rows[i], columns));
      MatrixEncoder encoder(format, rows[i], columns, codes, scales);
      for (std::int64_t r = 0; r < rows[i]; ++r) {
        std::vector<float> row;
        for (std::int64_t c = 0; c < columns; ++c) {
          const auto index = static_cast<std::uint64_t>((first + r) * columns + c);
          row.push_back(static_cast<float>(random_unit(21, RandomStream::sample, index) - 0.5));
        }
        encoder.add_rows(r, r + 1, row.data());
      }
      encoder.finish();
      parts.push_back({format, rows[i], columns, codes, scales});
      decode_rows_bf16(parts[i], 0, rows[i],
                       &decoded.all[static_cast<std::size_t>(first * columns)].bits);
      first += rows[i];
    }
  }
  std::byte* aligned(std::int64_t size) {
    bytes.emplace_back(static_cast<std::size_t>(size + 64));
    const auto at = reinterpret_cast<std::uintptr_t>(bytes.back().data());
    return bytes.back().data() + (64 - at % 64) % 64;
  }
  StoredParts all() const { return {parts.data(), 2}; }
};

const WeightFormat kStoredFormats[] = {WeightFormat::int4(128),    WeightFormat::int4(64),
                                       WeightFormat::int4(32),     WeightFormat::nf4(),
                                       WeightFormat::fp8_blocks(), WeightFormat::fp8_rows()};

TEST(FewRowsStored, have_the_bits_of_decoding_first) {
  at_each_level([](const Kernels<Bf16>& kernels) {
    for (const WeightFormat& format : kStoredFormats) {
      for (const std::int64_t columns : {128, 640, 1152}) {
        const Stored w(format, {64, 192}, columns);
        for (const std::int64_t M : {1, 16, 37}) {
          SCOPED_TRACE(testing::Message() << format_text(format) << " " << M << " " << columns);
          const auto draw = [](double unit) { return 2 * unit - 1; };
          Matrix dy(M, 256, 2), x(M, columns, 4);
          dy.fill(22, draw);
          x.fill(23, draw);
          Matrix want(M, columns, 6), whole = want, split = want;
          kernels.few_rows(0, columns, M, 256, dy.all.data(), dy.stride, w.decoded.all.data(),
                           columns, want.all.data(), want.stride);
          const auto run = [&](std::int64_t begin, std::int64_t end, Matrix& y) {
            kernels.few_rows_stored(begin, end, M, dy.all.data(), dy.stride, w.all(), y.all.data(),
                                    y.stride);
          };
          run(0, columns, whole);
          EXPECT_TRUE(same_bits(whole, want));
          run(0, 128, split);
          run(128, columns, split);
          EXPECT_TRUE(same_bits(split, want));

          Matrix want_t(M, 256, 8), whole_t = want_t, split_t = want_t;
          run_t(kernels, x, w.decoded, want_t, 0, 256);
          const auto run_stored_t = [&](std::int64_t begin, std::int64_t end, Matrix& y) {
            kernels.few_rows_t_stored(begin, end, M, x.all.data(), x.stride, w.all(), y.all.data(),
                                      y.stride);
          };
          run_stored_t(0, 256, whole_t);
          EXPECT_TRUE(same_bits(whole_t, want_t));
          run_stored_t(0, 128, split_t);
          run_stored_t(128, 256, split_t);
          EXPECT_TRUE(same_bits(split_t, want_t));
        }
      }
    }
  });
}

}  // namespace
}  // namespace tailor
