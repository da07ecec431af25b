#pragma once

#include "trainer/models/context.h"
#include "trainer/models/token_layout.h"
#include "trainer/models/weights.h"

namespace tailor {

/// What attention's backward wants back from its forward, for all tokens of a step.
struct AttentionKept {
  at::Tensor qkv;     ///< [T, Q + 2KV], q and k after rotary embedding, norm and temperature
  at::Tensor o;       ///< [T, Q], before the output projection
  at::Tensor lse;     ///< [T, H] in AccumOf<S>
  at::Tensor rstd;    ///< [T, H + KV heads] in AccumOf<S>, with qk-norm
  at::Tensor xa_qkv;  ///< [T, ranks of q, k, v]
  at::Tensor xa_o;    ///< [T, rank of o]

  AttentionKept rows(TokenRange range) const;
  std::int64_t bytes() const;
};

/// Keys and values seen so far, for generating token by token.
struct KeyValueCache {
  at::Tensor kv;  ///< [positions, 2KV]
};

/// h = x + W_o attention(norm(x)); one layer's attention block with its residual connection.
template <class S>
class Attention {
 public:
  Attention(const ModelSpec& spec, int layer, const LayerWeights& weights,
            const PassContext<S>& context);

  AttentionKept allocate(std::int64_t tokens, TensorStack& stack) const;

  /// x, h: rows of micro-batch `index` of the layout; kept: its rows. Takes scratch only.
  void forward(const TokenLayout<AccumOf<S>>& layout, std::size_t index, const at::Tensor& x_TD,
               const at::Tensor& h_TD, const AttentionKept& kept) const;
  /// dx = gradient of x from dh; adds factor gradients. dx may be dh. With `wants_dx` false (the
  /// lowest layer: nothing trains below it) dx is left alone.
  void backward(const TokenLayout<AccumOf<S>>& layout, std::size_t index, const at::Tensor& x_TD,
                const at::Tensor& dh_TD, const AttentionKept& kept, const at::Tensor& dx_TD,
                bool wants_dx) const;
  /// Tokens at positions [first, first + T) of one document, earlier ones in the cache.
  void forward_cached(std::int64_t first, const at::Tensor& x_TD, const at::Tensor& h_TD,
                      const KeyValueCache& cache) const;

 private:
  QkShape qk_shape() const;
  AttentionShape shape(std::int64_t q_stride, std::int64_t kv_stride) const;
  const std::uint64_t* token_ids(std::int64_t begin) const {
    return context_.token_id == nullptr ? nullptr : context_.token_id + begin;
  }

  const ModelSpec& spec_;
  const LayerSpec& layer_;
  const LayerWeights& weights_;
  const PassContext<S>& context_;
  LoraGroup<S> lora_qkv_, lora_o_;
};

extern template class Attention<double>;
extern template class Attention<float>;
extern template class Attention<Bf16>;

}  // namespace tailor
