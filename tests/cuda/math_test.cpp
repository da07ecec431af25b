#include "trainer/cuda/bodies/math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace tailor::cuda {
namespace {

/// |got - want| in units of the last place of a float of want's size.
double ulps(float got, double want) {
  int exponent = 0;
  std::frexp(want, &exponent);
  return std::fabs(static_cast<double>(got) - want) / std::ldexp(1.0, exponent - 24);
}

TEST(CudaMath, exp_is_within_its_bound) {
  double worst = 0;
  for (std::uint32_t bits = 0x80000000U; bits <= 0xC2AE999AU; bits += 251) {
    const auto x = bits_as<float>(bits);
    if (x < -87.3F) break;
    worst = std::max(worst, ulps(exp_nonpositive(x), std::exp(static_cast<double>(x))));
  }
  EXPECT_LE(worst, 0.9);
  EXPECT_GE(worst, 0.5) << "no float is nearer; is it measured?";
  const auto at_bound = static_cast<double>(-87.3F);
  EXPECT_LE(ulps(exp_nonpositive(-87.3F), std::exp(at_bound)), 0.9);
}

TEST(CudaMath, exp_at_its_ends) {
  EXPECT_EQ(exp_nonpositive(0.0F), 1.0F);
  EXPECT_EQ(exp_nonpositive(-0.0F), 1.0F);
  EXPECT_EQ(exp_nonpositive(-1e-30F), 1.0F);
  for (const float x : {-87.31F, -1000.0F, -3e38F, -INFINITY}) EXPECT_EQ(exp_nonpositive(x), 0.0F);
  EXPECT_TRUE(std::isnan(exp_nonpositive(NAN)));
  EXPECT_TRUE(std::isnan(exp_nonpositive(-NAN)));
}

TEST(CudaMath, log_is_within_its_bound) {
  std::mt19937_64 random(1);
  double worst = 0;
  const auto check = [&](double x) {
    const auto want = std::log(static_cast<long double>(x));
    const long double size = std::max(1.0L, std::fabs(want));
    worst = std::max(worst, static_cast<double>(std::fabs(log_of(x) - want) / size));
  };
  for (int i = 0; i < 300000; ++i) {
    const double unit = static_cast<double>(random() >> 11U) * 0x1.0p-53;
    check(1 + unit);
    check(1 + unit * 1e-6);
    check(1 - unit * 0.5);
    check(std::exp(unit * 1400 - 700));
    check(1 + unit * 202048);
  }
  for (const double x :
       {1.0, 2.0, 0x1.0p-1022, 1.7976931348623157e308, 0.70710678118654746, 0.70710678118654757}) {
    check(x);
  }
  EXPECT_LE(worst, 4e-16);
  EXPECT_EQ(log_of(1.0), 0.0);
  EXPECT_EQ(log_of(0.0), -INFINITY);
  EXPECT_EQ(log_of(INFINITY), INFINITY);
  EXPECT_TRUE(std::isnan(log_of(-1.0)));
  EXPECT_TRUE(std::isnan(log_of(NAN)));
}

TEST(CudaMath, sigmoid_is_within_its_bound) {
  double worst = 0;
  for (std::uint64_t bits = 0; bits < std::uint64_t{1} << 32U; bits += 2003) {
    const auto x = bits_as<float>(static_cast<std::uint32_t>(bits));
    if (!(std::fabs(x) <= 87.3F)) continue;
    worst = std::max(worst, ulps(sigmoid(x), 1 / (1 + std::exp(-static_cast<double>(x)))));
  }
  EXPECT_LE(worst, 3.0);
  EXPECT_EQ(sigmoid(0.0F), 0.5F);
  EXPECT_EQ(sigmoid(INFINITY), 1.0F);
  EXPECT_EQ(sigmoid(-INFINITY), 0.0F);
  EXPECT_EQ(sigmoid(-88.0F), 0.0F);
  EXPECT_TRUE(std::isnan(sigmoid(NAN)));
}

}  // namespace
}  // namespace tailor::cuda
