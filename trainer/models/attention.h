#pragma once

#include <memory>

#include "trainer/models/context.h"
#include "trainer/models/token_layout.h"
#include "trainer/models/weights.h"

namespace tailor {

/// What attention's backward wants back from its forward, for all tokens of a step. Latent
/// attention keeps latents: keys and values are expanded again a micro-batch at a time.
struct AttentionKept {
  at::Tensor qkv;        ///< [T, Q + 2KV], q and k after rotary embedding, norm and temperature
  at::Tensor o;          ///< [T, Q], before the output projection
  at::Tensor lse;        ///< [T, H] in AccumOf<S>
  at::Tensor rstd;       ///< [T, H + KV heads] in AccumOf<S>, with qk-norm
  at::Tensor xa_qkv;     ///< [T, ranks of q, k, v]
  at::Tensor xa_o;       ///< [T, rank of o]
  at::Tensor q_latent;   ///< [T, q_latent_width], before its norm; q itself without a latent
  at::Tensor kv_latent;  ///< [T, kv_rank], before its norm
  at::Tensor k_rope;     ///< [T, rope_dim], after rotary embedding
  at::Tensor xa_q_b, xa_kv_b;  ///< [T, rank]

  AttentionKept rows(TokenRange range) const;
  std::int64_t bytes() const;
};

/// What generation keeps of the tokens seen so far: keys and values, or latents and rotary keys.
struct KeyValueCache {
  at::Tensor kv;  ///< [positions, cache_width]
};

/// h = x + W_o attention(norm(x)); one layer's attention block with its residual connection.
template <class S>
class Attention {
 public:
  /// The kind that the model has.
  static std::unique_ptr<Attention> create(const ModelSpec& spec, int layer,
                                           const LayerWeights& weights,
                                           const PassContext<S>& context);
  virtual ~Attention() = default;

  virtual AttentionKept allocate(std::int64_t tokens, TensorStack& stack) const = 0;

  /// x, h: rows of micro-batch `index` of the layout; kept: its rows. Takes scratch only.
  virtual void forward(const TokenLayout<AccumOf<S>>& layout, std::size_t index,
                       const at::Tensor& x_TD, const at::Tensor& h_TD,
                       const AttentionKept& kept) const = 0;
  /// dx = gradient of x from dh; adds factor gradients. dx may be dh. With `wants_dx` false (the
  /// lowest layer: nothing trains below it) dx is left alone.
  virtual void backward(const TokenLayout<AccumOf<S>>& layout, std::size_t index,
                        const at::Tensor& x_TD, const at::Tensor& dh_TD, const AttentionKept& kept,
                        const at::Tensor& dx_TD, bool wants_dx) const = 0;
  /// Tokens at positions [first, first + T) of one document, earlier ones in the cache.
  virtual void forward_cached(std::int64_t first, const at::Tensor& x_TD, const at::Tensor& h_TD,
                              const KeyValueCache& cache) const = 0;
};

/// Attention with keys and values of their own (multi-head, grouped-query).
template <class S>
class GroupedAttention final : public Attention<S> {
 public:
  GroupedAttention(const ModelSpec& spec, int layer, const LayerWeights& weights,
                   const PassContext<S>& context);
  AttentionKept allocate(std::int64_t tokens, TensorStack& stack) const override;
  void forward(const TokenLayout<AccumOf<S>>& layout, std::size_t index, const at::Tensor& x_TD,
               const at::Tensor& h_TD, const AttentionKept& kept) const override;
  void backward(const TokenLayout<AccumOf<S>>& layout, std::size_t index, const at::Tensor& x_TD,
                const at::Tensor& dh_TD, const AttentionKept& kept, const at::Tensor& dx_TD,
                bool wants_dx) const override;
  void forward_cached(std::int64_t first, const at::Tensor& x_TD, const at::Tensor& h_TD,
                      const KeyValueCache& cache) const override;

 private:
  void project(const at::Tensor& n_TD, const AttentionKept& kept,
               const std::uint64_t* token_id) const;
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
extern template class GroupedAttention<double>;
extern template class GroupedAttention<float>;
extern template class GroupedAttention<Bf16>;

}  // namespace tailor
