// Micro-batches filled up to a few numbers of tokens: same losses, gradients and counts.

#include "trainer/filled_batch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/support/fixture.h"
#include "tests/support/training_run.h"
#include "trainer/trainer.h"

namespace tailor {
namespace {

using testing::ElementsAre;

TEST(FilledTokens, are_few_numbers_and_a_thirty_second_more_at_most) {
  EXPECT_EQ(filled_tokens(0), 0);
  EXPECT_EQ(filled_tokens(1), 16);
  EXPECT_EQ(filled_tokens(16), 16);
  EXPECT_EQ(filled_tokens(1000), 1008);
  EXPECT_EQ(filled_tokens(1025), 1056);
  std::set<std::int64_t> numbers;
  for (std::int64_t tokens = 1; tokens <= 65'536; ++tokens) {
    const std::int64_t filled = filled_tokens(tokens);
    numbers.insert(filled);
    ASSERT_GE(filled, tokens);
    ASSERT_EQ(filled_tokens(filled), filled);
    ASSERT_LT(filled - tokens, std::max<std::int64_t>(16, tokens / 32 + 1));
  }
  EXPECT_LE(std::ssize(numbers), 32 + 32 * 7);  // of 65,536
}

TEST(FilledBatch, adds_a_document_of_no_loss_to_each_micro_batch) {
  Batch batch;
  batch.ids = {5, 6, 7, 8, 9};
  batch.position = {0, 1, 0, 0, 1};
  batch.target = {6, -1, -1, 9, -1};
  batch.document_start = {0, 2, 3, 5};
  batch.micro_batch_start = {0, 3, 3, 5};  // one of them is empty
  batch.token_id = {10, 11, 12, 13, 14};
  const FilledBatch filled(batch);
  const TokenInput input = filled.input();
  ASSERT_EQ(input.ids.size(), 32U);
  EXPECT_THAT(std::vector(input.micro_batch_start.begin(), input.micro_batch_start.end()),
              ElementsAre(0, 16, 16, 32));
  EXPECT_THAT(std::vector(input.document_start.begin(), input.document_start.end()),
              ElementsAre(0, 2, 3, 16, 18, 32));
  EXPECT_THAT(std::vector(input.filler.begin(), input.filler.end()), ElementsAre(13, 0, 14));
  for (std::size_t t = 0; t < 32; ++t) {
    // Tokens 0 to 2 and 3 to 4 begin their micro-batches; all else fills.
    const std::size_t at = t < 16 ? t : t - 13;
    if (t % 16 >= (t < 16 ? 3U : 2U)) {
      EXPECT_EQ(input.target[t], -1);
      EXPECT_EQ(input.ids[t], t < 16 ? 7 : 9) << "a row that is read anyway";
      continue;
    }
    EXPECT_EQ(input.ids[t], batch.ids[at]);
    EXPECT_EQ(input.position[t], batch.position[at]);
    EXPECT_EQ(input.target[t], batch.target[at]);
    EXPECT_EQ(input.token_id[t], batch.token_id[at]);
  }
}

TEST(FilledBatch, of_no_rows_stays_empty) {
  Batch batch;
  batch.document_start = batch.micro_batch_start = {0};
  const FilledBatch filled(batch);
  EXPECT_TRUE(filled.input().ids.empty());
  EXPECT_THAT(
      std::vector(filled.input().document_start.begin(), filled.input().document_start.end()),
      ElementsAre(0));
}

}  // namespace
}  // namespace tailor
