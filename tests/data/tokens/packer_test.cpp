#include "data/tokens/packer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "base/random.h"

namespace tailor {
namespace {

std::vector<std::int64_t> lengths_of(std::size_t count, std::int64_t longest, std::uint64_t seed) {
  std::vector<std::int64_t> out(count);
  for (std::size_t i = 0; i < count; ++i) {
    const double u = random_unit(seed, RandomStream::sample, i);
    out[i] =
        1 + static_cast<std::int64_t>(u * u * static_cast<double>(longest - 1));  // mostly short
  }
  return out;
}

TEST(Packer, keeps_every_document_once_and_cuts_none) {
  for (const std::int64_t window :
       {std::int64_t{1}, std::int64_t{7}, std::int64_t{100}, std::int64_t{16384}}) {
    const auto lengths = lengths_of(1000, 256, 3);
    const auto rows = pack_documents(lengths, 256, window);
    std::vector<int> seen(lengths.size());
    for (const auto& row : rows) {
      std::int64_t sum = 0;
      for (const std::int64_t document : row) {
        ++seen[static_cast<std::size_t>(document)];
        sum += lengths[static_cast<std::size_t>(document)];
      }
      EXPECT_GT(sum, 0);
      EXPECT_LE(sum, 256);
      EXPECT_TRUE(std::is_sorted(row.begin(), row.end()));
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), 1000);
  }
}

TEST(Packer, fills_rows_well) {
  const auto lengths = lengths_of(20'000, 512, 5);
  const auto rows = pack_documents(lengths, 512);
  const auto tokens = std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
  const double fill = static_cast<double>(tokens) / (512.0 * static_cast<double>(rows.size()));
  EXPECT_GT(fill, 0.99);
}

TEST(Packer, depends_on_the_lengths_alone) {
  const auto lengths = lengths_of(5000, 300, 9);
  EXPECT_EQ(pack_documents(lengths, 300, 512), pack_documents(lengths, 300, 512));
}

TEST(Packer, a_document_moves_no_further_than_two_windows) {
  const auto lengths = lengths_of(2000, 100, 11);
  const auto rows = pack_documents(lengths, 100, 50);
  for (const auto& row : rows) EXPECT_LT(row.back() - row.front(), 100);
}

TEST(Packer, full_length_documents_stand_alone) {
  const std::vector<std::int64_t> lengths = {8, 8, 3, 5};
  EXPECT_EQ(pack_documents(lengths, 8), (std::vector<std::vector<std::int64_t>>{{0}, {1}, {2, 3}}));
  EXPECT_EQ(one_document_a_row(2), (std::vector<std::vector<std::int64_t>>{{0}, {1}}));
}

}  // namespace
}  // namespace tailor
