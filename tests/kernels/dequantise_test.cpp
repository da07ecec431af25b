// Every format, every storage type, every instruction-set level this machine runs, to the bit
// against data/quant/codec.h.

#include <gtest/gtest.h>

#include "tests/support/stored_matrix.h"
#include "trainer/kernels/levels.h"

namespace tailor {
namespace {

using testing_support::AlignedBytes;
using testing_support::random_matrix;
using testing_support::StoredMatrix;

template <class S>
const Kernels<S>& table_of(const LevelTables& tables) {
  if constexpr (std::is_same_v<S, double>) return *tables.f64;
  if constexpr (std::is_same_v<S, float>) return *tables.f32;
  if constexpr (std::is_same_v<S, Bf16>) return *tables.bf16;
}

template <class S>
std::vector<S> truth(const StoredMatrix& matrix) {
  std::vector<S> out;
  if constexpr (std::is_same_v<S, Bf16>) {
    for (const std::uint16_t bits : matrix.decoded_bf16()) out.push_back({bits});
  } else {
    for (const float value : matrix.decoded()) out.push_back(static_cast<S>(value));
  }
  return out;
}

template <class S>
class Dequantise : public testing::Test {};
struct TypeNames {
  template <class S>
  static std::string GetName(int) {
    if (std::is_same_v<S, double>) return "double";
    return std::is_same_v<S, float> ? "float" : "bfloat16";
  }
};
using Stored = testing::Types<double, float, Bf16>;
TYPED_TEST_SUITE(Dequantise, Stored, TypeNames);

struct Shape {
  std::int64_t rows, columns;
};

TYPED_TEST(Dequantise, is_the_codec_to_the_bit) {
  using S = TypeParam;
  const WeightFormat formats[] = {
      WeightFormat::f32(),      WeightFormat::bf16(),       WeightFormat::fp8_blocks(),
      WeightFormat::fp8_rows(), {WeightKind::fp8, 0, 3, 5}, WeightFormat::int4(128),
      WeightFormat::int4(32),   WeightFormat::int4(7),      WeightFormat::int4(1),
      WeightFormat::int4(1000), WeightFormat::nf4()};
  // Ragged tails, rows that start within a word, a byte, a block; more than 256 blocks of NF4.
  constexpr Shape kShapes[] = {{1, 1},   {3, 7},    {5, 33},   {131, 1},   {2, 129},
                               {9, 127}, {130, 64}, {17, 300}, {270, 131}, {3, 5120}};
  for (const WeightFormat& format : formats) {
    for (const auto& [rows, columns] : kShapes) {
      const StoredMatrix matrix = random_matrix(format, rows, columns, 17);
      const std::vector<S> want = truth<S>(matrix);
      const LevelList levels = runnable_levels();
      for (int level = 0; level < levels.count; ++level) {
        SCOPED_TRACE(format_text(format) + " " + std::to_string(rows) + "x" +
                     std::to_string(columns) + " " + levels.levels[level].name);
        const auto kernel = table_of<S>(*levels.levels[level].tables).dequantise;
        // Ranges of rows into rows that lie apart, with a guard before, between and behind.
        const std::int64_t stride = columns + 3;
        S guard;
        std::memset(&guard, 0x5A, sizeof guard);
        std::vector<S> expected(static_cast<std::size_t>(rows * stride + 1), guard);
        for (std::int64_t row = 0; row < rows; ++row) {
          std::copy_n(want.begin() + row * columns, columns, expected.begin() + 1 + row * stride);
        }
        std::vector<S> got(expected.size(), guard);
        for (std::int64_t begin = 0, step = 1; begin < rows; step = step * 3 % 140 + 1) {
          const std::int64_t end = std::min(rows, begin + step);
          kernel(begin, end, matrix.view(), got.data() + 1 + begin * stride, stride);
          begin = end;
        }
        ASSERT_EQ(std::memcmp(got.data(), expected.data(), got.size() * sizeof(S)), 0)
            << "first difference at element "
            << std::mismatch(
                   got.begin(), got.end(), expected.begin(),
                   [](const S& a, const S& b) {
                     return std::memcmp(&a, &b, sizeof a) == 0;
                   }).first -
                   got.begin();
      }
    }
  }
}

// From 8 MiB on, results are stored past the caches where they lie so that they can be.
TYPED_TEST(Dequantise, large_outputs) {
  using S = TypeParam;
  const std::int64_t columns = 4096 + 64, rows = (std::int64_t{9} << 20) / 2 / columns;
  for (const WeightFormat& format :
       {WeightFormat::fp8_blocks(), WeightFormat::fp8_rows(), WeightFormat::int4(32),
        WeightFormat::int4(5000), WeightFormat::nf4()}) {
    const StoredMatrix matrix = random_matrix(format, rows, columns, 23);
    const std::vector<S> want = truth<S>(matrix);
    const LevelList levels = runnable_levels();
    for (int level = 0; level < levels.count; ++level) {
      SCOPED_TRACE(format_text(format) + " " + levels.levels[level].name);
      const auto kernel = table_of<S>(*levels.levels[level].tables).dequantise;
      for (const std::int64_t shift : {0, 1}) {
        const AlignedBytes bytes((rows * columns + shift) * static_cast<std::int64_t>(sizeof(S)));
        S* got = reinterpret_cast<S*>(bytes.data()) + shift;
        kernel(0, rows, matrix.view(), got, columns);
        EXPECT_EQ(std::memcmp(got, want.data(), want.size() * sizeof(S)), 0);
      }
    }
  }
}

}  // namespace
}  // namespace tailor
