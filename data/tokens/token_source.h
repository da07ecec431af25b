#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "data/tokens/token_store.h"

namespace tailor {

/// The rows of one rank for one step, one after the other without padding: T tokens.
struct Batch {
  std::vector<std::int32_t> ids;       ///< [T]
  std::vector<std::int32_t> position;  ///< [T], from 0 in each document
  /// [T]: the id this position must predict, the next of its document, or -1 for no loss.
  std::vector<std::int32_t> target;
  /// Offsets of the documents' first tokens, then T. Documents see only themselves.
  std::vector<std::int32_t> document_start;
  /// Offsets of the micro-batches' first tokens, then T; always at a document border.
  std::vector<std::int32_t> micro_batch_start;
  /// [T]: which token of the step this is, whatever rank or micro-batch it went to: its row in the
  /// global batch in the upper 32 bits (of them the lowest 24), its place in the row below.
  std::vector<std::uint64_t> token_id;
  std::int64_t rows = 0;            ///< rows of this rank; may be 0
  std::int64_t trained_tokens = 0;  ///< positions with target >= 0

  std::int64_t tokens() const { return static_cast<std::int64_t>(ids.size()); }
};

/// Where a run's batches come from. The same (step, rank, ranks) gives the same batch, always:
/// resuming at step n is a seek, not a replay, and the step number is the whole state.
class TokenSource {
 public:
  virtual ~TokenSource() = default;
  /// The rank-th contiguous block of the step's rows. Throws Error for a damaged store only.
  virtual Batch batch_at(std::int64_t step, int rank, int ranks) const = 0;
  virtual std::int64_t rows() const = 0;
  virtual std::int64_t rows_per_step() const = 0;
  virtual std::int64_t sequence_len() const = 0;
};

struct SamplerOptions {
  std::int64_t rows_per_step = 1;     ///< over all ranks
  std::int64_t micro_batch_rows = 1;  ///< rows that pass a block together
  bool shuffle = true;                ///< false: file order
  std::uint64_t seed = 0;
};

/// Row at place `index` of the endless sequence epoch 0, epoch 1, ... of `rows` rows: each epoch
/// holds every row once; with `shuffle` in an order that is a function of (seed, epoch) alone.
/// Constant time and memory: a Feistel network keyed by Philox, walked until it lands inside.
std::int64_t row_at(std::int64_t index, std::int64_t rows, bool shuffle, std::uint64_t seed);

/// Steps of `num_epochs` epochs: ceil(rows * num_epochs / rows_per_step). Step s takes places
/// s * B .. s * B + B of the endless sequence; the last step runs on into the next epoch.
std::int64_t steps_of(std::int64_t rows, double num_epochs, std::int64_t rows_per_step);

/// Batches of a token store. Many threads may call batch_at.
class StoreTokenSource final : public TokenSource {
 public:
  StoreTokenSource(std::shared_ptr<const TokenStore> store, SamplerOptions options);
  Batch batch_at(std::int64_t step, int rank, int ranks) const override;
  std::int64_t rows() const override;
  std::int64_t rows_per_step() const override { return options_.rows_per_step; }
  std::int64_t sequence_len() const override;

 private:
  std::shared_ptr<const TokenStore> store_;
  SamplerOptions options_;
};

/// Every row of a store once, in file order, `rows_per_step` a step over all ranks; the last step
/// may be short. For evaluation: steps() of them.
class EvaluationSource final : public TokenSource {
 public:
  EvaluationSource(std::shared_ptr<const TokenStore> store, std::int64_t rows_per_step,
                   std::int64_t micro_batch_rows);
  Batch batch_at(std::int64_t step, int rank, int ranks) const override;
  std::int64_t rows() const override;
  std::int64_t rows_per_step() const override { return rows_per_step_; }
  std::int64_t sequence_len() const override;
  std::int64_t steps() const;

 private:
  std::shared_ptr<const TokenStore> store_;
  std::int64_t rows_per_step_, micro_batch_rows_;
};

}  // namespace tailor
