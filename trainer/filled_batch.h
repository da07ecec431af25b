#pragma once

#include <cstdint>
#include <vector>

#include "data/tokens/token_source.h"
#include "trainer/models/decoder.h"

namespace tailor {

/// A batch whose micro-batches are filled up to a few numbers of tokens. LibTorch's matrix library
/// compiles products for every number of rows it meets and keeps them, some 10 MB each
/// (docs/log.md): packed rows of a little other fill in every step would make a process grow for a
/// thousand steps.
///
/// What fills is one more document, of no loss, at the end of a micro-batch: it sees nobody, nobody
/// sees it, and its gradient is zero. A micro-batch grows by less than 1 part in 32, or 16 tokens.
class FilledBatch {
 public:
  explicit FilledBatch(const Batch& batch);
  /// Valid while this lives.
  TokenInput input() const;

 private:
  std::vector<std::int32_t> ids_, position_, target_, document_start_, micro_batch_start_, filler_;
  std::vector<std::uint64_t> token_id_;
};

/// Tokens of a micro-batch of `tokens`, filled: the next multiple of the largest power of two that
/// is at most a 32nd of it, and of 16 at least.
std::int64_t filled_tokens(std::int64_t tokens);

}  // namespace tailor
