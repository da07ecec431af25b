#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "data/tokens/token_source.h"
#include "recipes/recipe.h"

namespace tailor {

/// Different numbers of rows in the micro-batches of a recipe's first 1, 2, 4, ... steps, as far as
/// 4,096 and once through the data; and those that only an evaluation has.
struct RowCounts {
  std::vector<std::int64_t> after;
  std::int64_t evaluation = 0;
};
/// Adds the numbers of rows in a batch's micro-batches, as they are filled (FilledBatch).
void add_row_counts(const Batch& batch, std::set<std::int64_t>& counts);
/// `validation` may be null.
RowCounts row_counts(const Recipe& recipe, const std::shared_ptr<const TokenStore>& training,
                     const std::shared_ptr<const TokenStore>& validation);

/// The batches that steps are measured on: a recipe's first ones where its data is prepared, else
/// full rows of one document each whose every token carries loss.
class ProbeBatches final : public TokenSource {
 public:
  /// `data`: of the recipe's training side; null: none. `micro_batches_max`: of a step, so many of
  /// its first.
  ProbeBatches(const Recipe& recipe, std::int64_t vocab, std::int64_t steps,
               std::shared_ptr<const TokenStore> data, std::int64_t micro_batches_max);

  /// Those of the steps that there are, over and over.
  Batch batch_at(std::int64_t step, int rank, int ranks) const override;
  std::int64_t rows() const override { return batches_.front().rows; }
  std::int64_t rows_per_step() const override { return batches_.front().rows; }
  std::int64_t sequence_len() const override { return sequence_len_; }
  double mean_tokens() const;
  double mean_trained_tokens() const;
  double most_tokens() const;  ///< of one

 private:
  std::vector<Batch> batches_;
  std::int64_t sequence_len_;
};

}  // namespace tailor
