#include "tools/launch/rank_output.h"

#include <gtest/gtest.h>

#include <string>

namespace tailor {
namespace {

TEST(RankLines, join_pieces_and_name_the_rank) {
  RankLines lines(2);
  EXPECT_EQ(lines.add("ab"), "");
  EXPECT_EQ(lines.add("c\nde"), "[rank 2] abc\n");
  EXPECT_EQ(lines.add("\n\nf"), "[rank 2] de\n[rank 2] \n");
  EXPECT_EQ(lines.finish(), "[rank 2] f\n");
  EXPECT_EQ(lines.finish(), "");
}

TEST(RankLines, cut_a_line_without_end) {
  RankLines lines(1);
  std::string out;
  for (int i = 0; i < 300; ++i) out += lines.add(std::string(1000, 'x'));
  out += lines.finish();
  std::size_t letters = 0, newlines = 0;
  for (const char letter : out) {
    letters += letter == 'x' ? 1 : 0;
    newlines += letter == '\n' ? 1 : 0;
  }
  EXPECT_EQ(letters, 300'000U);
  EXPECT_EQ(newlines, 5U);  // four of 64 KiB and the rest
}

TEST(TailText, keeps_the_end_and_begins_with_a_line) {
  TailText tail;
  tail.add("short\n");
  EXPECT_EQ(tail.text(), "short\n");
  for (int i = 0; i < 100'000; ++i) tail.add("line " + std::to_string(i) + "\n");
  const std::string text = tail.text();
  EXPECT_LE(text.size(), 64UL << 10U);
  EXPECT_GT(text.size(), 63UL << 10U);
  EXPECT_EQ(text.substr(0, 5), "line ");
  EXPECT_EQ(text.substr(text.size() - 11), "line 99999\n");
}

}  // namespace
}  // namespace tailor
