#include "data/quant/codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "base/error.h"
#include "data/quant/cpu/encode.h"
#include "data/quant/numbers.h"
#include "tests/support/stored_matrix.h"

namespace tailor {
namespace {

using testing_support::bell_weights;
using testing_support::StoredMatrix;

const std::vector<WeightFormat>& every_format() {
  static const std::vector<WeightFormat> all = {
      WeightFormat::f32(),      WeightFormat::bf16(),       WeightFormat::fp8_blocks(),
      WeightFormat::fp8_rows(), {WeightKind::fp8, 0, 3, 5}, WeightFormat::int4(128),
      WeightFormat::int4(32),   WeightFormat::int4(7),      WeightFormat::int4(1),
      WeightFormat::nf4()};
  return all;
}
struct Shape {
  std::int64_t rows, columns;
};
constexpr Shape kShapes[] = {{1, 1}, {3, 7}, {5, 33}, {131, 1}, {2, 129}, {130, 260}, {300, 64}};

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

StoredMatrix encoded(const WeightFormat& format, std::int64_t rows, std::int64_t columns,
                     const std::vector<float>& values, EncodeStatistics* statistics = nullptr,
                     const EncodeOptions& options = {}) {
  StoredMatrix out(format, rows, columns);
  MatrixEncoder encoder(format, rows, columns, out.codes.data(), out.scales.data(), options);
  encoder.add_rows(0, rows, values.data());
  const EncodeStatistics found = encoder.finish();
  if (statistics != nullptr) *statistics = found;
  return out;
}

/// The most |decoded - original| / bound over the matrix; bounds of 0 demand equality.
double worst_share(const StoredMatrix& matrix, const std::vector<float>& values) {
  const auto decoded = matrix.decoded();
  std::vector<double> bounds(at(matrix.columns));
  double worst = 0;
  for (std::int64_t row = 0; row < matrix.rows; ++row) {
    error_bounds(matrix.view(), row, values.data() + row * matrix.columns, bounds.data());
    for (std::int64_t c = 0; c < matrix.columns; ++c) {
      const std::size_t i = at(row * matrix.columns + c);
      const double off =
          std::fabs(static_cast<double>(decoded[i]) - static_cast<double>(values[i]));
      if (!(off <= bounds[at(c)])) return std::numeric_limits<double>::infinity();
      if (bounds[at(c)] > 0) worst = std::max(worst, off / bounds[at(c)]);
    }
  }
  return worst;
}

double squared_distance(const std::vector<float>& a, const std::vector<float>& b) {
  double total = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double off = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    total += off * off;
  }
  return total;
}

TEST(codec, int4_by_hand) {
  StoredMatrix matrix(WeightFormat::int4(2), 1, 5);
  const std::uint32_t word = 0x0E078F;  // 15, 8, 7, 0, 14: codes 7, 0, -1, -8, 6
  const std::uint16_t scales[] = {0x3F81, 0xC000, 0x7F00};  // 1.0078125, -2, 1.7e38
  std::memcpy(matrix.codes.data(), &word, 4);
  std::memcpy(matrix.scales.data(), scales, 6);
  const auto decoded = matrix.decoded();
  EXPECT_EQ(decoded[0], 7.0625F);  // 7.0546875 has 11 bits: to bfloat16, ties to even
  EXPECT_EQ(decoded[1], 0.0F);
  EXPECT_EQ(decoded[2], 2.0F);
  EXPECT_EQ(decoded[3], 16.0F);
  EXPECT_TRUE(std::isinf(decoded[4]));
}

TEST(codec, nf4_scale_is_rounded_twice_not_fused) {
  // map[255] = 1, map[254] = 0.99296874: a product with more than 24 bits, and an offset that
  // cancels most of it, so that one rounding shows.
  StoredMatrix matrix(WeightFormat::nf4(), 1, 2);
  const float second = 1.0000001F, offset = -0.9929688F;
  matrix.codes.data()[0] = std::byte{0xF0};  // 1, -1
  std::memcpy(matrix.scales.data(), &offset, 4);
  std::memcpy(matrix.scales.data() + 4, &second, 4);
  matrix.scales.data()[8] = std::byte{254};
  volatile float product = 0.99296874F * second;
  const float twice = product + offset;
  const float fused = std::fma(0.99296874F, second, offset);
  ASSERT_NE(twice, fused);
  EXPECT_EQ(matrix.decoded(), (std::vector<float>{twice, -twice}));
}

TEST(codec, fp8_no_number_gives_no_number_with_the_code_s_sign) {
  StoredMatrix matrix(WeightFormat::fp8_rows(), 2, 2);
  const std::uint8_t codes[] = {0x7F, 0xFF, 0x00, 0x80};
  const float scales[] = {1, std::numeric_limits<float>::infinity()};
  std::memcpy(matrix.codes.data(), codes, 4);
  std::memcpy(matrix.scales.data(), scales, 8);
  EXPECT_EQ(matrix.decoded_bf16(), (std::vector<std::uint16_t>{0x7FC0, 0xFFC0, 0x7FC0, 0xFFC0}));
  std::vector<std::uint32_t> bits;
  for (const float value : matrix.decoded()) bits.push_back(std::bit_cast<std::uint32_t>(value));
  EXPECT_EQ(bits, (std::vector<std::uint32_t>{0x7FC00000, 0xFFC00000, 0x7FC00000, 0xFFC00000}));
}

TEST(codec, rows_alone_are_rows_of_the_whole) {
  for (const WeightFormat& format : every_format()) {
    for (const auto& [rows, columns] : kShapes) {
      SCOPED_TRACE(format_text(format));
      const auto matrix = testing_support::random_matrix(format, rows, columns, 7);
      const auto whole = matrix.decoded_bf16();
      std::vector<std::uint16_t> part(at(columns));
      for (const std::int64_t row : {std::int64_t{0}, rows / 2, rows - 1}) {
        decode_rows_bf16(matrix.view(), row, row + 1, part.data());
        EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + row * columns));
      }
    }
  }
}

TEST(encoder, round_trip_stays_within_the_bounds) {
  for (const WeightFormat& format : every_format()) {
    for (const auto& [rows, columns] : kShapes) {
      SCOPED_TRACE(format_text(format) + " " + std::to_string(rows) + "x" +
                   std::to_string(columns));
      const auto values = bell_weights(rows, columns, 3);
      EncodeStatistics statistics;
      const auto matrix = encoded(format, rows, columns, values, &statistics);
      const double worst = worst_share(matrix, values);
      EXPECT_LE(worst, 1);
      // The bounds are no wider than they need be: something comes near.
      if (rows * columns > 10'000 && format.kind != WeightKind::f32 && format.group != 1) {
        EXPECT_GT(worst, 0.5);
      }
      const double off = squared_distance(matrix.decoded(), values);
      // Where a value has its own scale there is nothing but float32's rounding.
      EXPECT_NEAR(statistics.squared_error, off, 1e-4 * off + 0x1p-46 * statistics.squares);
      EXPECT_NEAR(statistics.squares, squared_distance(values, std::vector<float>(values.size())),
                  1e-9 * statistics.squares);
    }
  }
}

TEST(encoder, a_code_off_by_one_breaks_a_bound) {
  for (const WeightFormat& format :
       {WeightFormat::fp8_blocks(), WeightFormat::int4(32), WeightFormat::nf4()}) {
    SCOPED_TRACE(format_text(format));
    const auto values = bell_weights(8, 64, 3);
    auto matrix = encoded(format, 8, 64, values);
    const auto changed = [&](std::size_t byte, int step) {
      auto copy = matrix;
      auto& code = copy.codes.data()[byte];
      code = static_cast<std::byte>(static_cast<int>(code) + step);
      return std::isinf(worst_share(copy, values));
    };
    int noticed = 0;
    for (std::size_t i = 0; i < matrix.codes.size(); ++i) {
      // Away from a value that lies half-way; for the 4-bit formats in the low half of the byte.
      if (changed(i, 1) || changed(i, -1)) ++noticed;
    }
    EXPECT_GT(noticed, static_cast<int>(matrix.codes.size()) * 9 / 10);
  }
}

TEST(encoder, neither_chunks_nor_the_machine_show) {
  for (const WeightFormat& format : every_format()) {
    for (const auto& [rows, columns] : kShapes) {
      const auto values = bell_weights(rows, columns, 11);
      for (const Int4Scales signs : {Int4Scales::positive, Int4Scales::any_sign}) {
        EncodeStatistics whole;
        const auto want = encoded(format, rows, columns, values, &whole, {signs});
        const EncodeLevels levels = runnable_encode_levels();
        for (int level = 0; level < levels.count; ++level) {
          SCOPED_TRACE(format_text(format) + " " + std::to_string(rows) + "x" +
                       std::to_string(columns) + " " + levels.levels[level].name);
          StoredMatrix got(format, rows, columns);
          MatrixEncoder encoder(format, rows, columns, got.codes.data(), got.scales.data(), {signs},
                                *levels.levels[level].kernels);
          for (std::int64_t begin = 0, step = 1; begin < rows; step = step * 3 % 70 + 1) {
            const std::int64_t end = std::min(rows, begin + step);
            encoder.add_rows(begin, end, values.data() + begin * columns);
            begin = end;
          }
          const EncodeStatistics found = encoder.finish();
          EXPECT_EQ(got.codes, want.codes);
          EXPECT_EQ(got.scales, want.scales);
          EXPECT_NEAR(found.squared_error, whole.squared_error, 1e-12 * whole.squared_error);
          EXPECT_EQ(found.absmax_squared_error, whole.absmax_squared_error);
        }
      }
    }
  }
}

TEST(encoder, zeros_stay_zeros_under_harmless_scales) {
  for (const WeightFormat& format : every_format()) {
    SCOPED_TRACE(format_text(format));
    std::vector<float> values(130 * 130);
    values[3] = -0.0F;
    auto matrix = encoded(format, 130, 130, values);
    for (const float value : matrix.decoded()) ASSERT_EQ(value, 0.0F);
    EXPECT_LE(worst_share(matrix, values), 1);
    // Among others, too: a row of ones, and zeros elsewhere.
    std::fill_n(values.begin() + 5 * 130, 130, 1.0F);
    matrix = encoded(format, 130, 130, values);
    const auto decoded = matrix.decoded();
    EXPECT_LE(worst_share(matrix, values), 1);
    EXPECT_EQ(decoded[0], 0.0F);
    EXPECT_NEAR(static_cast<double>(decoded[5 * 130 + 7]), 1, 0.01);
  }
}

TEST(encoder, int4_scales_are_normal_numbers_whatever_the_weights) {
  for (const float size : {0.0F, 0x1p-149F, 0x1p-130F, 0x1p-126F, 1e-30F, 1.0F, 1e30F, 3.3e38F,
                           std::numeric_limits<float>::max()}) {
    for (const Int4Scales signs : {Int4Scales::positive, Int4Scales::any_sign}) {
      auto values = bell_weights(1, 256, 5);
      for (float& value : values) value = value * 128 / 2 * size;  // within [-size, size]
      values[200] = size;
      values[40] = -size;
      EncodeStatistics statistics;
      const auto matrix = encoded(WeightFormat::int4(128), 1, 256, values, &statistics, {signs});
      for (std::int64_t g = 0; g < 2; ++g) {
        std::uint16_t bits = 0;
        std::memcpy(&bits, matrix.scales.data() + 2 * g, 2);
        const float scale = bf16_to_float(bits);
        EXPECT_TRUE(std::isnormal(scale)) << size;
        EXPECT_TRUE(std::isfinite(8 * scale)) << size;
        EXPECT_TRUE(scale > 0 || signs == Int4Scales::any_sign);
      }
      for (const float value : matrix.decoded()) EXPECT_TRUE(std::isfinite(value)) << size;
      EXPECT_LE(worst_share(matrix, values), 1) << size;
      EXPECT_TRUE(std::isfinite(statistics.squared_error));
      EXPECT_LE(statistics.squared_error, statistics.absmax_squared_error);
    }
  }
}

TEST(encoder, fp8_scales_may_be_bfloat16s) {
  const auto values = bell_weights(131, 130, 5);
  for (const WeightFormat& format : {WeightFormat::fp8_blocks(), WeightFormat::fp8_rows()}) {
    EncodeStatistics statistics;
    const auto matrix =
        encoded(format, 131, 130, values, &statistics, {Int4Scales::positive, Fp8Scales::bf16});
    const auto plain = encoded(format, 131, 130, values);
    for (std::size_t i = 0; i < matrix.scales.size(); i += sizeof(float)) {
      float scale = 0, exact = 0;
      std::memcpy(&scale, matrix.scales.data() + i, sizeof scale);
      std::memcpy(&exact, plain.scales.data() + i, sizeof exact);
      EXPECT_EQ(scale, bf16_to_float(bf16_from_float(exact)));
    }
    EXPECT_LE(worst_share(matrix, values), 1) << format_text(format);
    EXPECT_NEAR(statistics.squared_error, squared_distance(matrix.decoded(), values),
                1e-5 * statistics.squared_error);
  }
}

TEST(encoder, fp8_in_columns_is_fp8_in_rows_turned) {
  for (const auto& [rows, columns] : kShapes) {
    const auto values = bell_weights(rows, columns, 13);
    for (const Fp8Scales type : {Fp8Scales::f32, Fp8Scales::bf16}) {
      std::vector<float> turned(values.size());
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < columns; ++c)
          turned[at(c * rows + r)] = values[at(r * columns + c)];
      }
      const auto want = encoded(WeightFormat::fp8_rows(), columns, rows, turned, nullptr,
                                {Int4Scales::positive, type});
      const EncodeLevels levels = runnable_encode_levels();
      for (int level = 0; level < levels.count; ++level) {
        const EncodeKernels& kernels = *levels.levels[level].kernels;
        std::vector<float> scales(at(columns));
        kernels.largest_in_columns(values.data(), rows, columns, scales.data());
        for (float& scale : scales) scale = fp8_scale(scale, type == Fp8Scales::bf16);
        std::vector<std::uint8_t> codes(values.size());
        kernels.fp8_columns(values.data(), rows, columns, scales.data(), codes.data());
        EXPECT_EQ(std::memcmp(scales.data(), want.scales.data(), want.scales.size()), 0);
        for (std::int64_t r = 0; r < rows; ++r) {
          for (std::int64_t c = 0; c < columns; ++c) {
            ASSERT_EQ(codes[at(r * columns + c)],
                      std::to_integer<std::uint8_t>(want.codes.data()[c * rows + r]))
                << levels.levels[level].name << " " << r << " " << c;
          }
        }
      }
    }
  }
}

TEST(encoder, very_small_and_very_large_weights) {
  for (const WeightFormat& format : every_format()) {
    for (const float size : {0x1p-140F, 0x1p-126F, 1e-36F, 1e36F, 3e38F}) {
      SCOPED_TRACE(format_text(format) + " of " + std::to_string(size));
      auto values = bell_weights(9, 70, 5);
      for (float& value : values) value = value * 8 / 2 * size;
      const auto matrix = encoded(format, 9, 70, values);
      EXPECT_LE(worst_share(matrix, values), 1);
    }
  }
}

TEST(encoder, int4_codes_are_compressed_tensors_rounding_under_our_scales) {
  const auto values = bell_weights(20, 256, 9);
  const auto matrix = encoded(WeightFormat::int4(128), 20, 256, values);
  for (std::int64_t i = 0; i < 20 * 256; ++i) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, matrix.scales.data() + i / 128 * 2, 2);
    const float code = std::clamp(std::nearbyint(values[at(i)] / bf16_to_float(bits)), -8.0F, 7.0F);
    const auto byte = static_cast<unsigned>(matrix.codes.data()[i / 2]);
    ASSERT_EQ(static_cast<float>(byte >> (i % 2 * 4) & 15U) - 8, code) << i;
  }
}

TEST(encoder, int4_search_beats_absmax) {
  // Normal numbers by Box and Muller, as weights are; and with outliers, as they also are.
  for (const bool outliers : {false, true}) {
    std::vector<float> values;
    for (std::uint64_t i = 0; i < 128 * 1024; ++i) {
      const double u = random_unit(1, RandomStream::sample, i),
                   v = random_unit(2, RandomStream::sample, i);
      const double normal = std::sqrt(-2 * std::log1p(-u)) * std::cos(2 * M_PI * v);
      values.push_back(static_cast<float>(0.02 * normal * (outliers && i % 128 == 5 ? 4 : 1)));
    }
    double ratio[2];
    for (const Int4Scales signs : {Int4Scales::positive, Int4Scales::any_sign}) {
      EncodeStatistics statistics;
      encoded(WeightFormat::int4(128), 128, 1024, values, &statistics, {signs});
      ratio[static_cast<int>(signs)] = statistics.squared_error / statistics.absmax_squared_error;
    }
    std::printf("squared error in absmax's: %.4f, with scales of any sign %.4f\n", ratio[0],
                ratio[1]);
    EXPECT_LT(ratio[0], 0.84);
    EXPECT_LT(ratio[1], 0.78);
  }
}

TEST(encoder, refuses_what_is_not_finite) {
  for (const WeightFormat& format : every_format()) {
    for (const float bad :
         {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
          std::numeric_limits<float>::quiet_NaN()}) {
      auto values = bell_weights(3, 37, 1);
      values[37 + 35] = bad;
      try {
        encoded(format, 3, 37, values);
        ADD_FAILURE() << format_text(format);
      } catch (const Error& error) {
        EXPECT_EQ(error.fault(), Fault::bad_file);
        EXPECT_EQ(error.parts().where, "row 1, column 35");
      }
    }
  }
}

TEST(encoder, rows_out_of_order_are_our_mistake) {
  const auto values = bell_weights(4, 8, 1);
  StoredMatrix out(WeightFormat::bf16(), 4, 8);
  MatrixEncoder encoder(out.format, 4, 8, out.codes.data(), out.scales.data());
  encoder.add_rows(0, 2, values.data());
  EXPECT_THROW(encoder.add_rows(3, 4, values.data()), Error);
  EXPECT_THROW(encoder.finish(), Error);
}

}  // namespace
}  // namespace tailor
