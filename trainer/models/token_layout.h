#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "data/checkpoint/model_spec.h"
#include "trainer/kernels/kernels.h"

namespace tailor {

/// The tokens of one step on this rank, flat and without padding, and who sees whom.
struct TokenInput {
  std::span<const std::int32_t> ids;                ///< [T]
  std::span<const std::int32_t> position;           ///< [T], from 0 in each document
  std::span<const std::int32_t> target;             ///< [T], -1: no loss; empty: no loss at all
  std::span<const std::int32_t> document_start;     ///< document offsets, then T
  std::span<const std::int32_t> micro_batch_start;  ///< micro-batch offsets, then T
  std::span<const std::uint64_t> token_id;          ///< [T] for dropout; may be empty without it
  /// Of each micro-batch, how many of its last tokens only fill it up (see FilledBatch); empty:
  /// none do. They are computed like others; neither counts nor observers of routing have them.
  std::span<const std::int32_t> filler = {};
};

/// A contiguous run of tokens that pass a block together.
struct TokenRange {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

/// What attention needs to know about a step's tokens, worked out once: micro-batches, segments per
/// kind of layer, rotary tables and temperatures.
template <class A>
class TokenLayout {
 public:
  TokenLayout(const ModelSpec& spec, const TokenInput& input);

  std::int64_t tokens() const { return tokens_; }
  std::span<const TokenRange> micro_batches() const { return micro_batches_; }
  /// Segments of micro-batch `index`, token offsets counted from its begin. `chunk` 0: documents
  /// whole; else documents cut where position is a multiple of it (Llama 4's chunked attention,
  /// by each document's own positions).
  std::span<const AttentionSegment> segments(std::size_t index, std::int64_t chunk) const;
  const std::int32_t* position() const { return position_.data(); }
  const A* cos() const { return cos_.data(); }
  const A* sin() const { return sin_.data(); }
  /// [T] factor on q of layers without rotary embedding, or null: Llama 4's temperature,
  /// 1 + attn_scale * log(1 + floor((position + 1) / floor_scale)).
  const A* temperature() const { return temperature_.empty() ? nullptr : temperature_.data(); }

 private:
  std::int64_t tokens_;
  std::vector<TokenRange> micro_batches_;
  std::map<std::int64_t, std::vector<std::vector<AttentionSegment>>> segments_;  // by chunk
  std::vector<std::int32_t> position_;
  std::vector<A> cos_, sin_, temperature_;
};

/// Inverse frequencies of the rotary embedding, [head_dim / 2], computed in float32 as transformers
/// does (modeling_rope_utils.py): 1 / theta^(2i/d), changed as `rope` says.
std::vector<float> rope_frequencies(const RopeSpec& rope, std::int64_t head_dim);

/// cos and sin of positions [0, positions), [positions, rope_width / 2], times attention_factor.
template <class A>
void rope_tables(const ModelSpec& spec, std::int64_t positions, std::vector<A>& cos,
                 std::vector<A>& sin);
template <class A>
A temperature_at(const ModelSpec& spec, std::int64_t position);

}  // namespace tailor
