#include "data/tokens/token_source.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "base/error.h"
#include "base/random.h"
#include "base/units.h"

namespace tailor {
namespace {

/// A permutation of 0 .. 4^half_bits - 1 (Luby, Rackoff 1988): each round adds a keyed function of
/// one half to the other, which can always be taken back, so no two values meet.
std::uint64_t feistel(std::uint64_t value, unsigned half_bits, std::uint64_t seed,
                      std::uint64_t epoch) {
  const std::uint64_t mask = (std::uint64_t{1} << half_bits) - 1;
  std::uint64_t left = value >> half_bits;
  std::uint64_t right = value & mask;
  for (std::uint64_t round = 0; round < 8; ++round) {
    const std::uint64_t mixed =
        left ^ (random_bits(seed, RandomStream::shuffle, right | (round << 56U), epoch) & mask);
    left = right;
    right = mixed;
  }
  return (left << half_bits) | right;
}

class BatchBuilder {
 public:
  BatchBuilder(const TokenStore& store, std::int64_t micro_batch_rows)
      : store_(store), micro_batch_rows_(micro_batch_rows) {}

  void add_row(std::int64_t row, std::int64_t row_of_step) {
    if (batch_.rows % micro_batch_rows_ == 0) batch_.micro_batch_start.push_back(size());
    ++batch_.rows;
    const auto starts = store_.document_start();
    const std::int64_t begin = store_.row_start()[static_cast<std::size_t>(row)];
    const std::int64_t end = store_.row_start()[static_cast<std::size_t>(row) + 1];
    TAILOR_CHECK(std::int64_t{size()} + (end - begin) <= std::numeric_limits<std::int32_t>::max(),
                 "one rank's rows of a step hold 2^31 tokens or more");
    const auto ids = store_.ids();
    const auto trained = store_.trained();
    auto start = std::lower_bound(starts.begin(), starts.end(), begin);
    for (; *start < end; ++start) {
      const auto first = static_cast<std::size_t>(*start);
      const auto last = static_cast<std::size_t>(*(start + 1));
      batch_.document_start.push_back(size());
      for (std::size_t t = first; t < last; ++t) {
        const bool counts = t + 1 < last && trained[t + 1] != 0;
        batch_.ids.push_back(ids[t]);
        batch_.position.push_back(static_cast<std::int32_t>(t - first));
        const auto place = static_cast<std::uint64_t>(t) - static_cast<std::uint64_t>(begin);
        batch_.token_id.push_back((static_cast<std::uint64_t>(row_of_step) << 32U) | place);
        batch_.target.push_back(counts ? ids[t + 1] : -1);
        batch_.trained_tokens += counts ? 1 : 0;
      }
    }
  }

  Batch take() {
    batch_.document_start.push_back(size());
    batch_.micro_batch_start.push_back(size());
    return std::move(batch_);
  }

 private:
  std::int32_t size() const { return static_cast<std::int32_t>(batch_.ids.size()); }
  const TokenStore& store_;
  std::int64_t micro_batch_rows_;
  Batch batch_;
};

/// The rank-th of `ranks` contiguous blocks of `count` things; block sizes differ by one at most.
std::pair<std::int64_t, std::int64_t> block_of(std::int64_t count, int rank, int ranks) {
  TAILOR_CHECK(ranks > 0 && rank >= 0 && rank < ranks);
  return {checked_multiply(count, rank) / ranks, checked_multiply(count, rank + 1) / ranks};
}

}  // namespace

std::int64_t row_at(std::int64_t index, std::int64_t rows, bool shuffle, std::uint64_t seed) {
  TAILOR_CHECK(rows > 0 && index >= 0);
  const std::int64_t place = index % rows;
  if (!shuffle || rows == 1) return place;
  const auto epoch = static_cast<std::uint64_t>(index / rows);
  // At least 256 values: a network over a handful of them mixes badly.
  const auto bits = static_cast<unsigned>(std::bit_width(static_cast<std::uint64_t>(rows) - 1));
  const unsigned half_bits = std::max(4U, (bits + 1) / 2);
  auto value = static_cast<std::uint64_t>(place);
  do {
    value = feistel(value, half_bits, seed, epoch);
  } while (value >= static_cast<std::uint64_t>(rows));
  return static_cast<std::int64_t>(value);
}

std::int64_t steps_of(std::int64_t rows, double num_epochs, std::int64_t rows_per_step) {
  TAILOR_CHECK(rows > 0 && num_epochs > 0 && rows_per_step > 0);
  const double places = std::ceil(static_cast<double>(rows) * num_epochs - 1e-9);
  return div_ceil(static_cast<std::int64_t>(places), rows_per_step);
}

StoreTokenSource::StoreTokenSource(std::shared_ptr<const TokenStore> store, SamplerOptions options)
    : store_(std::move(store)), options_(options) {
  TAILOR_CHECK(options_.rows_per_step > 0 && options_.micro_batch_rows > 0);
}

std::int64_t StoreTokenSource::rows() const { return store_->rows(); }
std::int64_t StoreTokenSource::sequence_len() const { return store_->sequence_len(); }

Batch StoreTokenSource::batch_at(std::int64_t step, int rank, int ranks) const {
  TAILOR_CHECK(step >= 0);
  const std::int64_t first = checked_multiply(step, options_.rows_per_step);
  const auto [begin, end] = block_of(options_.rows_per_step, rank, ranks);
  BatchBuilder builder(*store_, options_.micro_batch_rows);
  for (std::int64_t i = begin; i < end; ++i) {
    builder.add_row(row_at(first + i, store_->rows(), options_.shuffle, options_.seed), i);
  }
  return builder.take();
}

EvaluationSource::EvaluationSource(std::shared_ptr<const TokenStore> store,
                                   std::int64_t rows_per_step, std::int64_t micro_batch_rows)
    : store_(std::move(store)), rows_per_step_(rows_per_step), micro_batch_rows_(micro_batch_rows) {
  TAILOR_CHECK(rows_per_step_ > 0 && micro_batch_rows_ > 0);
}

std::int64_t EvaluationSource::rows() const { return store_->rows(); }
std::int64_t EvaluationSource::sequence_len() const { return store_->sequence_len(); }
std::int64_t EvaluationSource::steps() const { return div_ceil(store_->rows(), rows_per_step_); }

Batch EvaluationSource::batch_at(std::int64_t step, int rank, int ranks) const {
  TAILOR_CHECK(step >= 0 && step < steps());
  const std::int64_t first = step * rows_per_step_;
  const auto [begin, end] = block_of(std::min(rows_per_step_, store_->rows() - first), rank, ranks);
  BatchBuilder builder(*store_, micro_batch_rows_);
  for (std::int64_t i = begin; i < end; ++i) builder.add_row(first + i, i);
  return builder.take();
}

}  // namespace tailor
