#include "data/tokens/token_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>

#include "base/error.h"

namespace tailor {
namespace {

using testing::ElementsAre;

/// 13 rows; row r holds 1 + r % 3 documents of 2 + (r + d) % 4 tokens; ids name their place.
class Source : public testing::Test {
 protected:
  static constexpr std::int64_t kRows = 13;

  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() / ("tailor_source_" + std::to_string(::getpid()));
    fs::create_directories(folder_);
    std::vector<std::vector<std::int32_t>> ids;
    std::vector<std::vector<std::uint8_t>> trained;
    TokenStoreContent content;
    for (std::int32_t row = 0; row < kRows; ++row) {
      content.rows.emplace_back();
      for (std::int32_t d = 0; d < 1 + row % 3; ++d) {
        content.rows.back().push_back(static_cast<std::int64_t>(ids.size()));
        ids.emplace_back();
        trained.emplace_back();
        for (std::int32_t t = 0; t < 2 + (row + d) % 4; ++t) {
          ids.back().push_back(row * 100 + d * 10 + t);
          trained.back().push_back(t % 2 == 0 || t == 3 ? 1 : 0);
        }
      }
    }
    content.sequence_len = 16;
    content.document = [&](std::int64_t d) {
      const auto i = static_cast<std::size_t>(d);
      return TokenStoreContent::Document{ids[i], trained[i], 0, d};
    };
    write_token_store(folder_ / "s.h5", content);
    store_ = std::make_shared<TokenStore>(TokenStore::open(folder_ / "s.h5"));
  }
  static void TearDownTestSuite() {
    store_.reset();
    fs::remove_all(folder_);
  }
  static std::vector<std::int64_t> rows_of(const Batch& batch) {
    std::vector<std::int64_t> out;
    for (std::size_t t = 0; t < batch.ids.size(); ++t) {
      if (batch.ids[t] % 100 == 0) out.push_back(batch.ids[t] / 100);
    }
    return out;
  }
  static inline fs::path folder_;
  static inline std::shared_ptr<const TokenStore> store_;
};

TEST_F(Source, positions_count_from_zero_in_each_document) {
  const StoreTokenSource source(store_, {2, 1, false, 0});
  const Batch batch =
      source.batch_at(0, 0, 1);  // rows 0 (1 document of 2) and 1 (2 documents: 3, 4)
  EXPECT_THAT(batch.ids, ElementsAre(0, 1, 100, 101, 102, 110, 111, 112, 113));
  EXPECT_THAT(batch.position, ElementsAre(0, 1, 0, 1, 2, 0, 1, 2, 3));
  EXPECT_THAT(batch.document_start, ElementsAre(0, 2, 5, 9));
  EXPECT_THAT(batch.micro_batch_start, ElementsAre(0, 2, 9));
  EXPECT_EQ(batch.rows, 2);
}

TEST_F(Source, targets_stay_in_their_document_and_skip_what_is_not_trained) {
  const StoreTokenSource source(store_, {2, 2, false, 0});
  const Batch batch = source.batch_at(0, 0, 1);
  EXPECT_THAT(batch.target, ElementsAre(-1, -1, -1, 102, -1, -1, 112, 113, -1));
  EXPECT_EQ(batch.trained_tokens, 3);
  EXPECT_THAT(batch.micro_batch_start, ElementsAre(0, 9));
}

TEST_F(Source, an_epoch_holds_every_row_once_and_runs_on_into_the_next) {
  for (const bool shuffle : {false, true}) {
    const StoreTokenSource source(store_, {4, 2, shuffle, 42});
    std::vector<std::int64_t> order;
    for (std::int64_t step = 0; step < 13; ++step) {
      const auto rows = rows_of(source.batch_at(step, 0, 1));
      ASSERT_EQ(rows.size(), 4U);
      order.insert(order.end(), rows.begin(), rows.end());
    }
    for (std::size_t epoch = 0; epoch < 4; ++epoch) {
      const auto begin = order.begin() + static_cast<std::ptrdiff_t>(epoch * 13);
      EXPECT_EQ(std::set<std::int64_t>(begin, begin + 13).size(), 13U);
    }
    EXPECT_EQ(std::is_sorted(order.begin(), order.begin() + 13), !shuffle);
    const bool same = std::equal(order.begin(), order.begin() + 13, order.begin() + 13);
    EXPECT_EQ(same, !shuffle);
  }
}

TEST_F(Source, a_seek_gives_what_a_replay_gives) {
  const StoreTokenSource replayed(store_, {3, 2, true, 7});
  for (std::int64_t step = 0; step < 30; ++step) {
    const StoreTokenSource fresh(store_, {3, 2, true, 7});
    const Batch a = replayed.batch_at(step, 0, 1);
    const Batch b = fresh.batch_at(step, 0, 1);
    EXPECT_EQ(a.ids, b.ids);
    EXPECT_EQ(a.target, b.target);
    EXPECT_EQ(a.micro_batch_start, b.micro_batch_start);
  }
}

TEST_F(Source, the_ranks_together_are_the_global_batch_in_order) {
  const StoreTokenSource source(store_, {6, 2, true, 1});
  for (const int ranks : {1, 2, 3, 4, 5, 6, 8}) {
    for (std::int64_t step = 0; step < 5; ++step) {
      const Batch all = source.batch_at(step, 0, 1);
      std::vector<std::int32_t> ids, target, position;
      std::vector<std::uint64_t> token_id;
      std::int64_t trained = 0, rows = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        const Batch part = source.batch_at(step, rank, ranks);
        EXPECT_LE(part.rows, 6 / ranks + 1);
        ids.insert(ids.end(), part.ids.begin(), part.ids.end());
        target.insert(target.end(), part.target.begin(), part.target.end());
        position.insert(position.end(), part.position.begin(), part.position.end());
        token_id.insert(token_id.end(), part.token_id.begin(), part.token_id.end());
        trained += part.trained_tokens;
        rows += part.rows;
        EXPECT_EQ(part.document_start.back(), part.tokens());
        EXPECT_EQ(part.micro_batch_start.back(), part.tokens());
        EXPECT_TRUE(std::includes(part.document_start.begin(), part.document_start.end(),
                                  part.micro_batch_start.begin(), part.micro_batch_start.end()));
      }
      EXPECT_EQ(ids, all.ids);
      EXPECT_EQ(target, all.target);
      EXPECT_EQ(position, all.position);
      EXPECT_EQ(token_id, all.token_id);
      EXPECT_EQ(std::set<std::uint64_t>(token_id.begin(), token_id.end()).size(), token_id.size());
      EXPECT_EQ(trained, all.trained_tokens);
      EXPECT_EQ(rows, 6);
    }
  }
}

TEST_F(Source, evaluation_sees_every_row_once_in_file_order) {
  const EvaluationSource source(store_, 5, 2);
  EXPECT_EQ(source.steps(), 3);
  std::vector<std::int64_t> order;
  for (std::int64_t step = 0; step < source.steps(); ++step) {
    for (int rank = 0; rank < 2; ++rank) {
      const auto rows = rows_of(source.batch_at(step, rank, 2));
      order.insert(order.end(), rows.begin(), rows.end());
    }
  }
  EXPECT_EQ(order.size(), 13U);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
}

TEST_F(Source, threads_read_at_the_same_time) {
  const StoreTokenSource source(store_, {4, 2, true, 3});
  const auto expected = source.batch_at(17, 0, 1).ids;
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 50; ++k) wrong += source.batch_at(17, 0, 1).ids == expected ? 0 : 1;
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(RowOrder, is_a_permutation_for_every_count_and_epoch) {
  for (const std::int64_t rows : {1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 70'000}) {
    for (const std::int64_t epoch : {0, 1, 5}) {
      std::vector<bool> seen(static_cast<std::size_t>(rows));
      for (std::int64_t i = 0; i < rows; ++i) {
        const auto row = static_cast<std::size_t>(row_at(epoch * rows + i, rows, true, 42));
        ASSERT_LT(row, seen.size());
        EXPECT_FALSE(seen[row]);
        seen[row] = true;
      }
    }
  }
}

TEST(RowOrder, first_places_are_spread_evenly) {
  // 20 rows, 4,000 seeds: each row comes first about 200 times; 5 standard deviations are 69.
  std::vector<int> first(20);
  for (std::uint64_t seed = 0; seed < 4000; ++seed)
    ++first[static_cast<std::size_t>(row_at(0, 20, true, seed))];
  for (const int count : first) EXPECT_NEAR(count, 200, 69);
}

TEST(RowOrder, steps_cover_the_epochs) {
  EXPECT_EQ(steps_of(13, 1, 4), 4);
  EXPECT_EQ(steps_of(13, 2, 4), 7);
  EXPECT_EQ(steps_of(12, 1, 4), 3);
  EXPECT_EQ(steps_of(10, 0.5, 5), 1);
  EXPECT_EQ(steps_of(1, 1, 100), 1);
}

}  // namespace
}  // namespace tailor
