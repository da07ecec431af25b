#include "base/text.h"

#include <gtest/gtest.h>

#include <array>

namespace tailor {
namespace {

TEST(Text, bytes_keep_three_significant_digits) {
  EXPECT_EQ(bytes_text(0), "0 B");
  EXPECT_EQ(bytes_text(999), "999 B");
  EXPECT_EQ(bytes_text(9'060'000'000), "9.06 GB");
  EXPECT_EQ(bytes_text(999'600), "1.00 MB");
  EXPECT_EQ(bytes_text(337'200'000'000), "337 GB");
}

TEST(Text, seconds_are_told_as_people_tell_them) {
  EXPECT_EQ(seconds_text(0.84), "0.8 s");
  EXPECT_EQ(seconds_text(59.4), "59 s");
  EXPECT_EQ(seconds_text(185), "3 min 05 s");
  EXPECT_EQ(seconds_text(7620), "2 h 07 min");
}

TEST(Text, small_money_keeps_two_digits) {
  EXPECT_EQ(usd_text(1'190'000), "$1.19");
  EXPECT_EQ(usd_text(1'234'500'000), "$1,234.50");
  EXPECT_EQ(usd_text(12'300), "$0.012");
  EXPECT_EQ(usd_text(0), "$0.00");
  EXPECT_EQ(usd_text(123), "$0.00012");
}

TEST(Text, nearest_name_forgives_typing_but_not_other_words) {
  const std::array<std::string, 3> names = {"learning_rate", "lr_scheduler", "seed"};
  EXPECT_EQ(nearest_name("lerning_rate", names), "learning_rate");
  EXPECT_EQ(nearest_name("sede", names), "seed");
  EXPECT_EQ(nearest_name("temperature", names), "");
}

TEST(Text, excerpt_puts_the_caret_under_the_column) {
  EXPECT_EQ(source_excerpt("a: 1\nlora:\n  rnk: 8\n", 3, 3), "3 |   rnk: 8\n  |   ^");
}

TEST(Text, utf8_refuses_surrogates_and_overlong_forms) {
  EXPECT_TRUE(is_utf8("h\xC3\xA9llo \xF0\x9F\x98\x80"));
  EXPECT_FALSE(is_utf8("\xC0\x80"));
  EXPECT_FALSE(is_utf8("\xED\xA0\x80"));
  EXPECT_FALSE(is_utf8("\xE2\x82"));
}

}  // namespace
}  // namespace tailor
