#pragma once

#include "trainer/models/attention.h"

namespace tailor {

/// Multi-head latent attention (DeepSeek-AI, "DeepSeek-V2", arXiv 2405.04434, section 2.1;
/// transformers 5.17 modeling_deepseek_v3.py). With n = norm(x):
///
///     c_q = W_qa n          q = W_qb norm(c_q)        per head [nope, rope]; or q = W_q n
///     c_kv, r = W_kva n     k, v = W_kvb norm(c_kv)   per head [nope], [value]
///     q, k of a head: [nope, rotate(q's rope)], [nope, rotate(r)], r shared by all heads
///
/// What is kept of a token is c_q, c_kv and r: 2,112 numbers for R1 where expanded queries, keys
/// and values are 73,728. Backward expands them again, one micro-batch at a time.
template <class S>
class LatentAttention final : public Attention<S> {
 public:
  LatentAttention(const ModelSpec& spec, int layer, const LayerWeights& weights,
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
  /// Rotary tables and the position of each row.
  struct Rotary {
    const std::int32_t* position;
    const AccumOf<S>*cos, *sin;
  };
  struct Queries {
    at::Tensor n_latent;  ///< [T, q_rank] after its norm; undefined without a latent
    at::Tensor q;         ///< [T, H * head_dim]
  };
  struct Keys {
    at::Tensor n_latent;  ///< [T, kv_rank] after its norm
    at::Tensor kv;        ///< [T, H * (nope + value)]
    at::Tensor k;         ///< [T, H * head_dim]
  };

  std::int64_t expanded_head() const { return latent_.nope_dim + latent_.value_dim; }
  AttentionShape shape() const;
  /// Fills the latents and the rotary key of `kept` from n.
  void compress(const at::Tensor& n_TD, const AttentionKept& kept, const Rotary& rotary,
                const std::uint64_t* token_id) const;
  Queries expand_queries(const AttentionKept& kept, const Rotary& rotary,
                         const std::uint64_t* token_id) const;
  Keys expand_keys(const at::Tensor& kv_latent, const at::Tensor& k_rope, const at::Tensor& xa_kv_b,
                   const std::uint64_t* token_id) const;
  /// Turns pairs of `dim` columns from `column` of each of `heads` heads; back with `inverse`.
  void rotate(const at::Tensor& rows, std::int64_t heads, std::int64_t head_dim,
              std::int64_t column, const Rotary& rotary, bool inverse) const;
  const std::uint64_t* token_ids(std::int64_t begin) const {
    return context_.token_id == nullptr ? nullptr : context_.token_id + begin;
  }

  const ModelSpec& spec_;
  const LatentSpec& latent_;
  const LayerWeights& weights_;
  const PassContext<S>& context_;
  LoraGroup<S> lora_a_, lora_q_b_, lora_kv_b_, lora_o_;
};

extern template class LatentAttention<double>;
extern template class LatentAttention<float>;
extern template class LatentAttention<Bf16>;

}  // namespace tailor
