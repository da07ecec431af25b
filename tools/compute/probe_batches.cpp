#include "tools/compute/probe_batches.h"

#include <algorithm>
#include <set>

#include "trainer/filled_batch.h"

namespace tailor {
namespace {

/// Rows of one document each. Ids and targets are spread over the vocabulary: rows of the embedding
/// that lie apart, as in text.
Batch full_rows(const Recipe& recipe, std::int64_t vocab) {
  Batch out;
  out.rows = recipe.global_batch_rows();
  for (std::int64_t row = 0; row < out.rows; ++row) {
    const auto begin = static_cast<std::int32_t>(out.ids.size());
    out.document_start.push_back(begin);
    if (row % recipe.training.micro_batch_size == 0) out.micro_batch_start.push_back(begin);
    for (std::int64_t t = 0; t < recipe.data.sequence_len; ++t) {
      const auto place = static_cast<std::int64_t>(out.ids.size());
      out.ids.push_back(static_cast<std::int32_t>((place * 7919 + 13) % vocab));
      out.position.push_back(static_cast<std::int32_t>(t));
      out.target.push_back(static_cast<std::int32_t>((place * 104'729 + 7) % vocab));
      out.token_id.push_back((static_cast<std::uint64_t>(row) << 32U) |
                             static_cast<std::uint64_t>(t));
    }
  }
  const auto end = static_cast<std::int32_t>(out.ids.size());
  out.document_start.push_back(end);
  out.micro_batch_start.push_back(end);
  out.trained_tokens = end;
  return out;
}

/// Leaves the first `most` micro-batches.
void cut(Batch& batch, std::int64_t most) {
  if (std::ssize(batch.micro_batch_start) - 1 <= most) return;
  batch.micro_batch_start.resize(static_cast<std::size_t>(most) + 1);
  const std::int32_t end = batch.micro_batch_start.back();
  for (auto* values : {&batch.ids, &batch.position, &batch.target})
    values->resize(static_cast<std::size_t>(end));
  batch.token_id.resize(static_cast<std::size_t>(end));
  std::erase_if(batch.document_start, [&](std::int32_t start) { return start > end; });
  batch.trained_tokens = std::count_if(batch.target.begin(), batch.target.end(),
                                       [](std::int32_t target) { return target >= 0; });
}

SamplerOptions sampler(const Recipe& recipe) {
  return {recipe.global_batch_rows(), recipe.training.micro_batch_size, recipe.training.shuffle,
          static_cast<std::uint64_t>(recipe.seed)};
}

}  // namespace

void add_row_counts(const Batch& batch, std::set<std::int64_t>& counts) {
  const std::vector<std::int32_t>& start = batch.micro_batch_start;
  for (std::size_t m = 0; m + 1 < start.size(); ++m) {
    counts.insert(filled_tokens(start[m + 1] - start[m]));
  }
}

RowCounts row_counts(const Recipe& recipe, const std::shared_ptr<const TokenStore>& training,
                     const std::shared_ptr<const TokenStore>& validation) {
  constexpr std::int64_t kStepsMax = 4096;
  RowCounts out;
  std::set<std::int64_t> counts;
  const StoreTokenSource source(training, sampler(recipe));
  const std::int64_t epoch = steps_of(source.rows(), 1, source.rows_per_step());
  for (std::int64_t step = 0, told = 1; step < std::min(kStepsMax, epoch); ++step) {
    add_row_counts(source.batch_at(step, 0, 1), counts);
    if (step + 1 != told) continue;
    out.after.push_back(std::ssize(counts));
    told *= 2;
  }
  if (!validation) return out;
  const auto trained = std::ssize(counts);
  const EvaluationSource rows(validation, recipe.training.micro_batch_size,
                              recipe.training.micro_batch_size);
  for (std::int64_t step = 0; step < std::min(kStepsMax, rows.steps()); ++step)
    add_row_counts(rows.batch_at(step, 0, 1), counts);
  out.evaluation = std::ssize(counts) - trained;
  return out;
}

ProbeBatches::ProbeBatches(const Recipe& recipe, std::int64_t vocab, std::int64_t steps,
                           std::shared_ptr<const TokenStore> data, std::int64_t micro_batches_max)
    : sequence_len_(recipe.data.sequence_len) {
  if (data) {
    const StoreTokenSource source(std::move(data), sampler(recipe));
    for (std::int64_t step = 0; step < steps; ++step)
      batches_.push_back(source.batch_at(step, 0, 1));
  } else {
    batches_.push_back(full_rows(recipe, vocab));
  }
  for (Batch& batch : batches_) cut(batch, micro_batches_max);
}

Batch ProbeBatches::batch_at(std::int64_t step, int, int) const {
  return batches_[static_cast<std::size_t>(step) % batches_.size()];
}

double ProbeBatches::mean_tokens() const {
  double sum = 0;
  for (const Batch& batch : batches_) sum += static_cast<double>(batch.tokens());
  return sum / static_cast<double>(batches_.size());
}
double ProbeBatches::most_tokens() const {
  const auto most = std::max_element(
      batches_.begin(), batches_.end(),
      [](const Batch& one, const Batch& other) { return one.tokens() < other.tokens(); });
  return static_cast<double>(most->tokens());
}
double ProbeBatches::mean_trained_tokens() const {
  double sum = 0;
  for (const Batch& batch : batches_) sum += static_cast<double>(batch.trained_tokens);
  return sum / static_cast<double>(batches_.size());
}

}  // namespace tailor
