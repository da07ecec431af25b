#include <gmock/gmock.h>

#include "tests/cuda/cpu_launch.h"

namespace tailor::cuda {
namespace {

TEST(CudaWords, bf16_is_rounded_to_nearest_even) {
  std::mt19937 random(5);
  const auto check = [](std::uint32_t bits) {
    const auto value = bits_as<float>(bits);
    const std::uint32_t pair = to_bf16_pair(value, -value);
    ASSERT_EQ(pair & 0xFFFFU, reference_bf16(value)) << std::hexfloat << value;
    ASSERT_EQ(pair >> 16U, reference_bf16(-value)) << std::hexfloat << -value;
  };
  for (std::uint32_t high = 0; high < 0x10000U; ++high) {
    for (const std::uint32_t low : {0x0U, 0x1U, 0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU}) {
      check(high << 16U | low);
    }
    check(high << 16U | (random() & 0xFFFFU));
  }
}

TEST(CudaWords, a_divider_divides) {
  std::mt19937 random(6);
  std::vector<std::uint32_t> divisors = {
      1,    2,     3,     5,     7,       8,           16,          640,         641,        896,
      1024, 65535, 65536, 65537, 1000003, 0x3FFFFFFFU, 0x40000000U, 0x40000001U, 0x7FFFFFFFU};
  for (int i = 0; i < 200; ++i) {
    divisors.push_back(static_cast<std::uint32_t>(random() % 0x7FFFFFFFU) + 1);
  }
  for (const std::uint32_t divisor : divisors) {
    const Divider by(divisor);
    const auto check = [&](std::uint64_t value) {
      if (value >= std::uint64_t{1} << 31U) return;
      const auto small = static_cast<std::uint32_t>(value);
      ASSERT_EQ(by.divide(small), small / divisor) << small << " / " << divisor;
    };
    for (std::uint64_t times : {0U, 1U, 2U, 3U, 1000U, 0x7FFFFFFFU / divisor}) {
      check(times * divisor);
      check(times * divisor + divisor - 1);
      check(times * divisor + 1);
    }
    for (int i = 0; i < 1000; ++i) check(random() & 0x7FFFFFFFU);
    check(0x7FFFFFFFU);
  }
  EXPECT_THROW(Divider(0), Error);
  EXPECT_THROW(Divider(std::int64_t{1} << 31U), Error);
}

TEST(CudaWords, a_grid_covers_every_number_once) {
  for (const std::int64_t rows : {0, 1, 2, 5}) {
    for (const std::int64_t columns : {0, 1, 7, 8, 9, 16, 31, 64}) {
      const WordGrid grid(rows, columns);
      std::vector<int> seen(static_cast<std::size_t>(rows * columns), 0);
      for (std::uint32_t word = 0; word < grid.words(); ++word) {
        const WordGrid::Spot spot = grid.spot(word);
        ASSERT_GE(spot.count, 1U);
        ASSERT_LE(spot.count, kWord);
        ASSERT_EQ(spot.offset, spot.row * columns + spot.column);
        ASSERT_LE(spot.column + spot.count, columns);
        for (std::uint32_t i = 0; i < spot.count; ++i) {
          ++seen[static_cast<std::size_t>(spot.offset) + i];
        }
      }
      EXPECT_THAT(seen, testing::Each(1)) << rows << " x " << columns;
    }
  }
}

TEST(CudaWords, a_misaligned_word_is_noticed_on_the_cpu) {
  Guarded<Bf16Bits> numbers(std::vector<Bf16Bits>(17, 0x3F80));
  EXPECT_THROW(load_eight(numbers.data() + 1, 8, 8), Error);
  EXPECT_EQ(load_eight(numbers.data(), 8, 8).at[7], 1.0F);
  EXPECT_EQ(load_eight(numbers.data(), 9, 8).at[7], 1.0F) << "number by number";
  EXPECT_EQ(load_eight(numbers.data(), 16, 1).at[1], 0.0F) << "past the end";
}

}  // namespace
}  // namespace tailor::cuda
