#include "data/store/transpose.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <vector>

#include "data/store/halves.h"

namespace tailor {
namespace {

template <class T>
void turns(std::int64_t rows, std::int64_t columns, std::int64_t stride, std::int64_t out_stride) {
  std::vector<T> in(static_cast<std::size_t>(rows * stride));
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<T>(i * 2654435761U >> 7U);
  const T untouched = 77;
  std::vector<T> out(static_cast<std::size_t>(columns * out_stride), untouched), wanted = out;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      wanted[static_cast<std::size_t>(c * out_stride + r)] =
          in[static_cast<std::size_t>(r * stride + c)];
    }
  }
  transpose(MatrixView<T>{in.data(), rows, columns, stride}, out.data(), out_stride);
  EXPECT_EQ(out, wanted) << rows << " x " << columns;
}

TEST(Transpose, puts_every_element_in_its_place_and_touches_no_other) {
  for (const std::int64_t rows : {1, 3, 8, 15, 16, 17, 63, 64, 65, 100, 130}) {
    for (const std::int64_t columns : {1, 4, 7, 16, 31, 64, 72, 129}) {
      turns<std::uint8_t>(rows, columns, columns + 5, rows + 3);
      turns<std::uint16_t>(rows, columns, columns, rows);
      turns<std::uint32_t>(rows, columns, columns + 1, rows + 1);
    }
  }
}

TEST(Transpose, widens_as_the_types_say) {
  std::vector<std::uint16_t> in(70 * 90);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<std::uint16_t>(i * 40503U);
  std::vector<float> bf16(in.size()), half(in.size());
  transpose_bf16({in.data(), 70, 90, 90}, bf16.data(), 70);
  transpose_half({in.data(), 70, 90, 90}, half.data(), 70);
  for (std::size_t r = 0; r < 70; ++r) {
    for (std::size_t c = 0; c < 90; ++c) {
      const std::uint16_t bits = in[r * 90 + c];
      EXPECT_EQ(std::bit_cast<std::uint32_t>(bf16[c * 70 + r]), std::uint32_t{bits} << 16U);
      EXPECT_EQ(std::bit_cast<std::uint32_t>(half[c * 70 + r]),
                std::bit_cast<std::uint32_t>(half_to_float(bits)));
    }
  }
}

TEST(Halves, all_of_them_have_the_value_ieee_gives_them) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = half_to_float(static_cast<std::uint16_t>(bits));
    const int exponent = static_cast<int>(bits >> 10U & 31U);
    const std::uint32_t fraction = bits & 1023U;
    const double sign = (bits & 0x8000U) != 0 ? -1 : 1;
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(value), fraction != 0);
      EXPECT_EQ(std::isinf(value), fraction == 0);
      EXPECT_EQ(std::signbit(value), sign < 0);
    } else {
      const double size =
          exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024.0 + fraction, exponent - 25);
      EXPECT_EQ(double{value}, sign * size) << bits;
      EXPECT_EQ(std::signbit(value), sign < 0);
      EXPECT_EQ(rounded_to_half(value), value);
    }
  }
}

TEST(Halves, rounds_to_the_nearest_and_ties_to_even) {
  for (std::uint32_t bits = 0; bits < 0x7BFF; ++bits) {
    const float low = half_to_float(static_cast<std::uint16_t>(bits));
    const float high = half_to_float(static_cast<std::uint16_t>(bits + 1));
    const float middle = low + (high - low) / 2;
    EXPECT_EQ(rounded_to_half(middle), bits % 2 == 0 ? low : high) << bits;
    EXPECT_EQ(rounded_to_half(std::nextafter(middle, low)), low);
    EXPECT_EQ(rounded_to_half(-std::nextafter(middle, high)), -high);
  }
  EXPECT_EQ(rounded_to_half(65519), 65504);
  EXPECT_EQ(rounded_to_half(65520), INFINITY);
  EXPECT_EQ(rounded_to_half(-1e9F), -INFINITY);
  EXPECT_TRUE(std::isnan(rounded_to_half(NAN)));
}

}  // namespace
}  // namespace tailor
