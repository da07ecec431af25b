#include "trainer/models/latent_attention.h"

#include <type_traits>

namespace tailor {
namespace {

/// The norms of both latents (modeling_deepseek_v3.py leaves DeepseekV3RMSNorm's own default).
constexpr double kLatentEps = 1e-6;

/// A number that can be computed with, of the same bits as S.
template <class S>
using Number = std::conditional_t<std::is_same_v<S, Bf16>, at::BFloat16, S>;

}  // namespace

template <class S>
LatentAttention<S>::LatentAttention(const ModelSpec& spec, int layer, const LayerWeights& weights,
                                    const PassContext<S>& context)
    : spec_(spec),
      latent_(spec.latent),
      weights_(weights),
      context_(context),
      lora_a_(context, layer, {Projection::q_proj, Projection::q_a_proj, Projection::kv_a_proj},
              {0, 0, spec.q_latent_width()}),
      lora_q_b_(context, layer, {Projection::q_b_proj}, {0}),
      lora_kv_b_(context, layer, {Projection::kv_b_proj}, {0}),
      lora_o_(context, layer, {Projection::o_proj}, {0}) {}

template <class S>
AttentionShape LatentAttention<S>::shape() const {
  AttentionShape out{};
  out.heads = out.kv_heads = spec_.heads;
  out.head_dim = spec_.head_dim;
  out.value_dim = latent_.value_dim;
  out.q_stride = out.k_stride = spec_.query_width();
  out.v_stride = spec_.heads * expanded_head();
  out.v_head = expanded_head();
  out.o_stride = spec_.attention_width();
  out.scale = spec_.softmax_scale();
  return out;
}

template <class S>
AttentionKept LatentAttention<S>::allocate(std::int64_t tokens, TensorStack& stack) const {
  const auto take = [&](std::int64_t columns, at::ScalarType dtype) {
    return stack.take({tokens, columns}, dtype);
  };
  AttentionKept kept;
  kept.q_latent = take(spec_.q_latent_width(), kDtype<S>);
  kept.kv_latent = take(latent_.kv_rank, kDtype<S>);
  kept.k_rope = take(latent_.rope_dim, kDtype<S>);
  kept.o = take(spec_.attention_width(), kDtype<S>);
  kept.lse = take(spec_.heads, kDtype<AccumOf<S>>);
  if (!lora_a_.empty()) kept.xa_qkv = take(lora_a_.rank(), kDtype<S>);
  if (!lora_q_b_.empty()) kept.xa_q_b = take(lora_q_b_.rank(), kDtype<S>);
  if (!lora_kv_b_.empty()) kept.xa_kv_b = take(lora_kv_b_.rank(), kDtype<S>);
  if (!lora_o_.empty()) kept.xa_o = take(lora_o_.rank(), kDtype<S>);
  return kept;
}

// Interleaved pairs are turned where they are. transformers moves them apart first; the same move
// on queries and keys leaves their products as they were.
template <class S>
void LatentAttention<S>::rotate(const at::Tensor& rows, std::int64_t heads, std::int64_t head_dim,
                                std::int64_t column, const Rotary& rotary, bool inverse) const {
  using A = AccumOf<S>;
  const std::int64_t half = latent_.rope_dim / 2, stride = rows.stride(0);
  const std::int64_t step = spec_.rope.pairs ? 2 : 1, other = spec_.rope.pairs ? 1 : half;
  const A sign = inverse ? A{-1} : A{1};
  auto* all = static_cast<Number<S>*>(rows.data_ptr());
  at::parallel_for(0, rows.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const A* cos = rotary.cos + rotary.position[t] * half;
      const A* sin = rotary.sin + rotary.position[t] * half;
      for (std::int64_t h = 0; h < heads; ++h) {
        Number<S>* x = all + t * stride + h * head_dim + column;
        for (std::int64_t i = 0; i < half; ++i) {
          const A a = static_cast<A>(x[i * step]), b = static_cast<A>(x[i * step + other]);
          const A s = sign * sin[i];
          x[i * step] = static_cast<Number<S>>(a * cos[i] - b * s);
          x[i * step + other] = static_cast<Number<S>>(b * cos[i] + a * s);
        }
      }
    }
  });
}

template <class S>
void LatentAttention<S>::compress(const at::Tensor& n_TD, const AttentionKept& kept,
                                  const Rotary& rotary, const std::uint64_t* token_id) const {
  const std::int64_t Q = spec_.q_latent_width(), R = latent_.kv_rank;
  const Frame frame(context_.scratch_stack());
  const at::Tensor both = context_.scratch({n_TD.size(0), spec_.qkv_width()});
  ops::linear(n_TD, weights_.qkv_OD, both);
  if (!lora_a_.empty()) lora_a_.forward(n_TD, both, kept.xa_qkv, 0, token_id);
  kept.q_latent.copy_(both.narrow(1, 0, Q));
  kept.kv_latent.copy_(both.narrow(1, Q, R));
  kept.k_rope.copy_(both.narrow(1, Q + R, latent_.rope_dim));
  rotate(kept.k_rope, 1, latent_.rope_dim, 0, rotary, false);
}

template <class S>
typename LatentAttention<S>::Queries LatentAttention<S>::expand_queries(
    const AttentionKept& kept, const Rotary& rotary, const std::uint64_t* token_id) const {
  const std::int64_t T = kept.q_latent.size(0);
  Queries out;
  out.q = context_.scratch({T, spec_.query_width()});
  if (latent_.q_rank == 0) {
    out.q.copy_(kept.q_latent);
  } else {
    out.n_latent = context_.scratch(kept.q_latent.sizes());
    ops::rms_norm<S>(kept.q_latent, weights_.q_a_norm, kLatentEps, out.n_latent);
    ops::linear(out.n_latent, weights_.q_b_OR, out.q);
    if (!lora_q_b_.empty()) lora_q_b_.forward(out.n_latent, out.q, kept.xa_q_b, 0, token_id);
  }
  rotate(out.q, spec_.heads, spec_.head_dim, latent_.nope_dim, rotary, false);
  return out;
}

template <class S>
typename LatentAttention<S>::Keys LatentAttention<S>::expand_keys(
    const at::Tensor& kv_latent, const at::Tensor& k_rope, const at::Tensor& xa_kv_b,
    const std::uint64_t* token_id) const {
  const std::int64_t T = kv_latent.size(0), H = spec_.heads, N = latent_.nope_dim;
  Keys out;
  out.n_latent = context_.scratch(kv_latent.sizes());
  out.kv = context_.scratch({T, H * expanded_head()});
  out.k = context_.scratch({T, spec_.query_width()});
  ops::rms_norm<S>(kv_latent, weights_.kv_a_norm, kLatentEps, out.n_latent);
  ops::linear(out.n_latent, weights_.kv_b_OR, out.kv);
  if (!lora_kv_b_.empty()) lora_kv_b_.forward(out.n_latent, out.kv, xa_kv_b, 0, token_id);
  const at::Tensor k_THd = out.k.view({T, H, spec_.head_dim});
  k_THd.narrow(2, 0, N).copy_(out.kv.view({T, H, expanded_head()}).narrow(2, 0, N));
  k_THd.narrow(2, N, latent_.rope_dim).copy_(k_rope.unsqueeze(1));
  return out;
}

template <class S>
void LatentAttention<S>::forward(const TokenLayout<AccumOf<S>>& layout, std::size_t index,
                                 const at::Tensor& x_TD, const at::Tensor& h_TD,
                                 const AttentionKept& kept) const {
  using A = AccumOf<S>;
  const TokenRange range = layout.micro_batches()[index];
  const Rotary rotary{layout.position() + range.begin, layout.cos(), layout.sin()};
  const std::uint64_t* ids = token_ids(range.begin);
  const Frame frame(context_.scratch_stack());
  {
    const Frame of_norm(context_.scratch_stack());
    const at::Tensor n_TD = context_.scratch(x_TD.sizes());
    ops::rms_norm<S>(x_TD, weights_.input_norm_D, spec_.norm_eps, n_TD);
    compress(n_TD, kept, rotary, ids);
  }
  {
    const Frame of_heads(context_.scratch_stack());
    const Queries queries = expand_queries(kept, rotary, ids);
    const Keys keys = expand_keys(kept.kv_latent, kept.k_rope, kept.xa_kv_b, ids);
    const auto segments = layout.segments(index, 0);
    const std::int64_t tasks = static_cast<std::int64_t>(segments.size()) * spec_.heads;
    at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
      kernels<S>().attention(begin, end, segments.data(), shape(), data<S>(queries.q),
                             data<S>(keys.k), data<S>(keys.kv) + latent_.nope_dim, data<S>(kept.o),
                             data<A>(kept.lse));
    });
  }
  at::Tensor out = h_TD;
  at::addmm_out(out, x_TD, kept.o, weights_.o_DO.t());
  if (!lora_o_.empty()) lora_o_.forward(kept.o, h_TD, kept.xa_o, 0, ids);
}

template <class S>
void LatentAttention<S>::backward(const TokenLayout<AccumOf<S>>& layout, std::size_t index,
                                  const at::Tensor& x_TD, const at::Tensor& dh_TD,
                                  const AttentionKept& kept, const at::Tensor& dx_TD,
                                  bool wants_dx) const {
  using A = AccumOf<S>;
  const TokenRange range = layout.micro_batches()[index];
  const Rotary rotary{layout.position() + range.begin, layout.cos(), layout.sin()};
  const std::uint64_t* ids = token_ids(range.begin);
  const std::int64_t T = range.size(), H = spec_.heads, N = latent_.nope_dim;
  const std::int64_t Q = spec_.q_latent_width(), R = latent_.kv_rank;
  const Frame frame(context_.scratch_stack());
  const at::Tensor d_both = context_.scratch({T, spec_.qkv_width()});
  {
    const Frame of_heads(context_.scratch_stack());
    const at::Tensor d_o = context_.scratch(kept.o.sizes());
    ops::linear_backward(dh_TD, weights_.o_DO, d_o);
    if (!lora_o_.empty()) lora_o_.backward(kept.o, dh_TD, kept.xa_o, d_o, 0, ids);

    const Queries queries = expand_queries(kept, rotary, ids);
    const Keys keys = expand_keys(kept.kv_latent, kept.k_rope, kept.xa_kv_b, ids);
    const at::Tensor d_q = context_.scratch(queries.q.sizes());
    const at::Tensor d_k = context_.scratch(keys.k.sizes());
    const at::Tensor d_kv = context_.scratch(keys.kv.sizes());
    const auto segments = layout.segments(index, 0);
    const std::int64_t tasks = static_cast<std::int64_t>(segments.size()) * H;
    at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
      kernels<S>().attention_backward(begin, end, segments.data(), shape(), data<S>(queries.q),
                                      data<S>(keys.k), data<S>(keys.kv) + N, data<S>(kept.o),
                                      data<A>(kept.lse), data<S>(d_o), data<S>(d_q), data<S>(d_k),
                                      data<S>(d_kv) + N);
    });
    const at::Tensor d_k_THd = d_k.view({T, H, spec_.head_dim});
    d_kv.view({T, H, expanded_head()}).narrow(2, 0, N).copy_(d_k_THd.narrow(2, 0, N));
    // All heads share the rotary key: its gradient is their sum, added up wide.
    const at::Tensor d_rope = d_both.narrow(1, Q + R, latent_.rope_dim);
    d_rope.copy_(d_k_THd.narrow(2, N, latent_.rope_dim).sum(1, false, kDtype<A>));
    rotate(d_rope, 1, latent_.rope_dim, 0, rotary, true);
    rotate(d_q, H, spec_.head_dim, N, rotary, true);

    const at::Tensor d_kv_latent = context_.scratch(kept.kv_latent.sizes());
    ops::linear_backward(d_kv, weights_.kv_b_OR, d_kv_latent);
    if (!lora_kv_b_.empty()) {
      lora_kv_b_.backward(keys.n_latent, d_kv, kept.xa_kv_b, d_kv_latent, 0, ids);
    }
    ops::rms_norm_backward<S>(kept.kv_latent, weights_.kv_a_norm, d_kv_latent, {}, kLatentEps,
                              d_kv_latent);
    d_both.narrow(1, Q, R).copy_(d_kv_latent);
    if (latent_.q_rank == 0) {
      d_both.narrow(1, 0, Q).copy_(d_q);
    } else {
      const at::Tensor d_q_latent = context_.scratch(kept.q_latent.sizes());
      ops::linear_backward(d_q, weights_.q_b_OR, d_q_latent);
      if (!lora_q_b_.empty()) {
        lora_q_b_.backward(queries.n_latent, d_q, kept.xa_q_b, d_q_latent, 0, ids);
      }
      ops::rms_norm_backward<S>(kept.q_latent, weights_.q_a_norm, d_q_latent, {}, kLatentEps,
                                d_q_latent);
      d_both.narrow(1, 0, Q).copy_(d_q_latent);
    }
  }
  at::Tensor dn_TD;
  if (wants_dx) {
    dn_TD = context_.scratch(x_TD.sizes());
    ops::linear_backward(d_both, weights_.qkv_OD, dn_TD);
  }
  if (!lora_a_.empty()) {
    const at::Tensor n_TD = context_.scratch(x_TD.sizes());
    ops::rms_norm<S>(x_TD, weights_.input_norm_D, spec_.norm_eps, n_TD);
    lora_a_.backward(n_TD, d_both, kept.xa_qkv, dn_TD, 0, ids);
  }
  if (wants_dx) {
    ops::rms_norm_backward<S>(x_TD, weights_.input_norm_D, dn_TD, dh_TD, spec_.norm_eps, dx_TD);
  }
}

template <class S>
void LatentAttention<S>::forward_cached(std::int64_t first, const at::Tensor& x_TD,
                                        const at::Tensor& h_TD, const KeyValueCache& cache) const {
  using A = AccumOf<S>;
  const std::int64_t T = x_TD.size(0), R = latent_.kv_rank, seen = first + T;
  const Frame frame(context_.scratch_stack());
  const AttentionKept kept = allocate(T, context_.scratch_stack());
  const at::Tensor n_TD = context_.scratch(x_TD.sizes());
  ops::rms_norm<S>(x_TD, weights_.input_norm_D, spec_.norm_eps, n_TD);
  std::vector<std::int32_t> position;
  for (std::int64_t t = 0; t < T; ++t) position.push_back(static_cast<std::int32_t>(first + t));
  std::vector<A> cos, sin;
  rope_tables(spec_, seen, cos, sin);
  const Rotary rotary{position.data(), cos.data(), sin.data()};
  compress(n_TD, kept, rotary, nullptr);
  cache.kv.narrow(0, first, T).narrow(1, 0, R).copy_(kept.kv_latent);
  cache.kv.narrow(0, first, T).narrow(1, R, latent_.rope_dim).copy_(kept.k_rope);

  const Queries queries = expand_queries(kept, rotary, nullptr);
  const at::Tensor kv_latent = context_.scratch({seen, R});
  kv_latent.copy_(cache.kv.narrow(0, 0, seen).narrow(1, 0, R));
  const at::Tensor xa =
      lora_kv_b_.empty() ? at::Tensor() : context_.scratch({seen, lora_kv_b_.rank()});
  const Keys keys = expand_keys(
      kv_latent, cache.kv.narrow(0, 0, seen).narrow(1, R, latent_.rope_dim), xa, nullptr);
  const AttentionSegment segment{0, T, 0, seen};
  at::parallel_for(0, spec_.heads, 1, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().attention(begin, end, &segment, shape(), data<S>(queries.q), data<S>(keys.k),
                           data<S>(keys.kv) + latent_.nope_dim, data<S>(kept.o), nullptr);
  });
  at::Tensor out = h_TD;
  at::addmm_out(out, x_TD, kept.o, weights_.o_DO.t());
  if (!lora_o_.empty()) lora_o_.forward(kept.o, h_TD, kept.xa_o, 0, nullptr);
}

template class LatentAttention<double>;
template class LatentAttention<float>;
template class LatentAttention<Bf16>;

}  // namespace tailor
