#include "trainer/models/attention.h"

#include <algorithm>
#include <cmath>

#include "trainer/models/latent_attention.h"

namespace tailor {
namespace {

at::Tensor rows_of(const at::Tensor& tensor, TokenRange range) {
  return tensor.defined() ? tensor.narrow(0, range.begin, range.size()) : tensor;
}

}  // namespace

AttentionKept AttentionKept::rows(TokenRange range) const {
  return {rows_of(qkv, range),      rows_of(o, range),         rows_of(lse, range),
          rows_of(rstd, range),     rows_of(xa_qkv, range),    rows_of(xa_o, range),
          rows_of(q_latent, range), rows_of(kv_latent, range), rows_of(k_rope, range),
          rows_of(xa_q_b, range),   rows_of(xa_kv_b, range)};
}

std::int64_t AttentionKept::bytes() const {
  std::int64_t total = 0;
  for (const at::Tensor* tensor :
       {&qkv, &o, &lse, &rstd, &xa_qkv, &xa_o, &q_latent, &kv_latent, &k_rope, &xa_q_b, &xa_kv_b}) {
    if (tensor->defined()) total += static_cast<std::int64_t>(tensor->nbytes());
  }
  return total;
}

template <class S>
GroupedAttention<S>::GroupedAttention(const ModelSpec& spec, int layer, const LayerWeights& weights,
                                      const PassContext<S>& context)
    : spec_(spec),
      layer_(spec.layers[static_cast<std::size_t>(layer)]),
      weights_(weights),
      context_(context),
      lora_qkv_(context, layer, {Projection::q_proj, Projection::k_proj, Projection::v_proj},
                {0, spec.query_width(), spec.query_width() + spec.kv_width()}),
      lora_o_(context, layer, {Projection::o_proj}, {0}) {}

template <class S>
QkShape GroupedAttention<S>::qk_shape() const {
  QkShape out{};
  out.heads = spec_.heads + spec_.kv_heads;
  out.query_heads = spec_.heads;
  out.head_dim = spec_.head_dim;
  out.stride = spec_.query_width() + 2 * spec_.kv_width();
  out.rotate = layer_.rope;
  out.pairs = spec_.rope.pairs;
  out.norm = spec_.qk_norm && layer_.rope;
  out.eps = spec_.norm_eps;
  return out;
}

template <class S>
AttentionShape GroupedAttention<S>::shape(std::int64_t q_stride, std::int64_t kv_stride) const {
  AttentionShape out{};
  out.heads = spec_.heads;
  out.kv_heads = spec_.kv_heads;
  out.head_dim = out.value_dim = out.v_head = spec_.head_dim;
  out.q_stride = q_stride;
  out.k_stride = out.v_stride = kv_stride;
  out.o_stride = spec_.query_width();
  out.scale = spec_.softmax_scale();
  return out;
}

template <class S>
AttentionKept GroupedAttention<S>::allocate(std::int64_t tokens, TensorStack& stack) const {
  const auto take = [&](std::int64_t columns, at::ScalarType dtype) {
    return stack.take({tokens, columns}, dtype);
  };
  AttentionKept kept;
  kept.qkv = take(spec_.query_width() + 2 * spec_.kv_width(), kDtype<S>);
  kept.o = take(spec_.query_width(), kDtype<S>);
  kept.lse = take(spec_.heads, kDtype<AccumOf<S>>);
  if (qk_shape().norm) kept.rstd = take(spec_.heads + spec_.kv_heads, kDtype<AccumOf<S>>);
  if (!lora_qkv_.empty()) kept.xa_qkv = take(lora_qkv_.rank(), kDtype<S>);
  if (!lora_o_.empty()) kept.xa_o = take(lora_o_.rank(), kDtype<S>);
  return kept;
}

template <class S>
void GroupedAttention<S>::project(const at::Tensor& n_TD, const AttentionKept& kept,
                                  const std::uint64_t* token_id) const {
  if (weights_.qkv_bias_O.defined()) {
    at::Tensor qkv = kept.qkv;
    at::addmm_out(qkv, weights_.qkv_bias_O, n_TD, weights_.qkv_OD.t());
  } else {
    ops::linear(n_TD, weights_.qkv_OD, kept.qkv);
  }
  if (!lora_qkv_.empty()) lora_qkv_.forward(n_TD, kept.qkv, kept.xa_qkv, 0, token_id);
}

template <class S>
void GroupedAttention<S>::forward(const TokenLayout<AccumOf<S>>& layout, std::size_t index,
                                  const at::Tensor& x_TD, const at::Tensor& h_TD,
                                  const AttentionKept& kept) const {
  using A = AccumOf<S>;
  const TokenRange range = layout.micro_batches()[index];
  const std::int64_t T = range.size();
  const Frame frame(context_.scratch_stack());
  const at::Tensor n_TD = context_.scratch(x_TD.sizes());
  ops::rms_norm<S>(x_TD, weights_.input_norm_D, spec_.norm_eps, n_TD);
  project(n_TD, kept, token_ids(range.begin));

  const QkShape qk = qk_shape();
  const A* temperature =
      layer_.rope || layout.temperature() == nullptr ? nullptr : layout.temperature() + range.begin;
  at::parallel_for(0, T, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().qk_prepare(begin, end, qk, data<S>(kept.qkv), layout.position() + range.begin,
                            layout.cos(), layout.sin(), temperature,
                            qk.norm ? data<A>(kept.rstd) : nullptr);
  });

  const auto segments = layout.segments(index, layer_.attention_chunk);
  const AttentionShape heads = shape(qk.stride, qk.stride);
  const std::int64_t tasks = static_cast<std::int64_t>(segments.size()) * spec_.kv_heads;
  const S* q = data<S>(kept.qkv);
  const S* k = q + spec_.query_width();
  const S* v = k + spec_.kv_width();
  at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().attention(begin, end, segments.data(), heads, q, k, v, data<S>(kept.o),
                           data<A>(kept.lse));
  });
  at::Tensor out = h_TD;
  at::addmm_out(out, x_TD, kept.o, weights_.o_DO.t());
  if (!lora_o_.empty()) lora_o_.forward(kept.o, h_TD, kept.xa_o, 0, token_ids(range.begin));
}

template <class S>
void GroupedAttention<S>::backward(const TokenLayout<AccumOf<S>>& layout, std::size_t index,
                                   const at::Tensor& x_TD, const at::Tensor& dh_TD,
                                   const AttentionKept& kept, const at::Tensor& dx_TD,
                                   bool wants_dx) const {
  using A = AccumOf<S>;
  const TokenRange range = layout.micro_batches()[index];
  const std::int64_t T = range.size();
  const Frame frame(context_.scratch_stack());
  const at::Tensor d_o = context_.scratch(kept.o.sizes());
  ops::linear_backward(dh_TD, weights_.o_DO, d_o);
  if (!lora_o_.empty()) lora_o_.backward(kept.o, dh_TD, kept.xa_o, d_o, 0, token_ids(range.begin));

  const QkShape qk = qk_shape();
  const at::Tensor d_qkv = context_.scratch(kept.qkv.sizes());
  const auto segments = layout.segments(index, layer_.attention_chunk);
  const AttentionShape heads = shape(qk.stride, qk.stride);
  const std::int64_t tasks = static_cast<std::int64_t>(segments.size()) * spec_.kv_heads;
  const std::int64_t to_k = spec_.query_width(), to_v = to_k + spec_.kv_width();
  const S* q = data<S>(kept.qkv);
  S* dq = data<S>(d_qkv);
  at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().attention_backward(begin, end, segments.data(), heads, q, q + to_k, q + to_v,
                                    data<S>(kept.o), data<A>(kept.lse), data<S>(d_o), dq, dq + to_k,
                                    dq + to_v);
  });
  const A* temperature =
      layer_.rope || layout.temperature() == nullptr ? nullptr : layout.temperature() + range.begin;
  at::parallel_for(0, T, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().qk_prepare_backward(begin, end, qk, q, dq, layout.position() + range.begin,
                                     layout.cos(), layout.sin(), temperature,
                                     qk.norm ? data<A>(kept.rstd) : nullptr);
  });

  at::Tensor dn_TD;
  if (wants_dx) {
    dn_TD = context_.scratch(x_TD.sizes());
    ops::linear_backward(d_qkv, weights_.qkv_OD, dn_TD);
  }
  if (!lora_qkv_.empty()) {
    const at::Tensor n_TD = context_.scratch(x_TD.sizes());
    ops::rms_norm<S>(x_TD, weights_.input_norm_D, spec_.norm_eps, n_TD);
    lora_qkv_.backward(n_TD, d_qkv, kept.xa_qkv, dn_TD, 0, token_ids(range.begin));
  }
  if (wants_dx) {
    ops::rms_norm_backward<S>(x_TD, weights_.input_norm_D, dn_TD, dh_TD, spec_.norm_eps, dx_TD);
  }
}

template <class S>
void GroupedAttention<S>::forward_cached(std::int64_t first, const at::Tensor& x_TD,
                                         const at::Tensor& h_TD, const KeyValueCache& cache) const {
  using A = AccumOf<S>;
  const std::int64_t T = x_TD.size(0), Q = spec_.query_width(), KV = spec_.kv_width();
  const Frame frame(context_.scratch_stack());
  const AttentionKept kept = allocate(T, context_.scratch_stack());
  const at::Tensor n_TD = context_.scratch(x_TD.sizes());
  ops::rms_norm<S>(x_TD, weights_.input_norm_D, spec_.norm_eps, n_TD);
  project(n_TD, kept, nullptr);
  std::vector<std::int32_t> position;
  std::vector<A> cos, sin, temperature;
  rope_tables(spec_, first + T, cos, sin);
  for (std::int64_t t = 0; t < T; ++t) {
    position.push_back(static_cast<std::int32_t>(first + t));
    temperature.push_back(temperature_at<A>(spec_, first + t));
  }
  const bool scaled = spec_.temperature && !layer_.rope;
  kernels<S>().qk_prepare(0, T, qk_shape(), data<S>(kept.qkv), position.data(), cos.data(),
                          sin.data(), scaled ? temperature.data() : nullptr,
                          kept.rstd.defined() ? data<A>(kept.rstd) : nullptr);
  cache.kv.narrow(0, first, T).copy_(kept.qkv.narrow(1, Q, 2 * KV));
  // With chunked attention a run of tokens that crosses a chunk border is two segments.
  std::vector<AttentionSegment> segments;
  for (std::int64_t at = 0; at < T;) {
    const std::int64_t chunk = layer_.attention_chunk;
    const std::int64_t p = first + at, chunk_begin = chunk == 0 ? 0 : p / chunk * chunk;
    const std::int64_t n = chunk == 0 ? T - at : std::min(T - at, chunk_begin + chunk - p);
    segments.push_back({at, n, chunk_begin, p + n - chunk_begin});
    at += n;
  }
  const std::int64_t tasks = static_cast<std::int64_t>(segments.size()) * spec_.kv_heads;
  const AttentionShape heads = shape(Q + 2 * KV, 2 * KV);
  at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().attention(begin, end, segments.data(), heads, data<S>(kept.qkv), data<S>(cache.kv),
                           data<S>(cache.kv) + KV, data<S>(kept.o), nullptr);
  });
  at::Tensor out = h_TD;
  at::addmm_out(out, x_TD, kept.o, weights_.o_DO.t());
  if (!lora_o_.empty()) lora_o_.forward(kept.o, h_TD, kept.xa_o, 0, nullptr);
}

template <class S>
std::unique_ptr<Attention<S>> Attention<S>::create(const ModelSpec& spec, int layer,
                                                   const LayerWeights& weights,
                                                   const PassContext<S>& context) {
  if (spec.is_latent()) {
    return std::make_unique<LatentAttention<S>>(spec, layer, weights, context);
  }
  return std::make_unique<GroupedAttention<S>>(spec, layer, weights, context);
}

template class GroupedAttention<double>;
template class GroupedAttention<float>;
template class GroupedAttention<Bf16>;
template class Attention<double>;
template class Attention<float>;
template class Attention<Bf16>;

}  // namespace tailor
