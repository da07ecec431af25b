#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "trainer/models/moe.h"

namespace tailor {

template <class S>
Router<S>::Router(const ModelSpec& spec, int layer, const LayerWeights& weights,
                  const PassContext<S>& context)
    : spec_(spec),
      weights_(weights),
      context_(context),
      lora_(context, layer, {Projection::router}, {0}) {}

template <class S>
Routing<AccumOf<S>> Router<S>::start(std::int64_t tokens) const {
  Routing<AccumOf<S>> routing;
  routing.K = spec_.experts_per_token;
  const auto slots = static_cast<std::size_t>(tokens * routing.K);
  routing.expert.resize(slots);
  routing.gate.resize(slots);
  return routing;
}

template <class S>
at::Tensor Router<S>::allocate_kept(std::int64_t tokens) const {
  if (lora_.empty()) return {};
  return context_.workspace->kept.take({tokens, lora_.rank()}, kDtype<S>);
}

template <class S>
void Router<S>::forward(const at::Tensor& n_TD, std::int64_t begin, Routing<AccumOf<S>>& routing,
                        const at::Tensor& xa) const {
  using A = AccumOf<S>;
  const std::int64_t T = n_TD.size(0), E = spec_.experts, K = routing.K;
  const Frame frame(context_.scratch_stack());
  const at::Tensor logits_TE = context_.scratch({T, E});
  ops::linear(n_TD, weights_.router_ED, logits_TE);
  const std::uint64_t* ids = context_.token_id == nullptr ? nullptr : context_.token_id + begin;
  if (!lora_.empty()) lora_.forward(n_TD, logits_TE, xa, 0, ids);
  const at::Tensor wide = context_.scratch_stack().take({T, E}, kDtype<A>);
  wide.copy_(logits_TE);
  const A* logits = data<A>(wide);
  for (std::int64_t t = 0; t < T; ++t) {
    const A* row = logits + t * E;
    for (std::int64_t k = 0; k < K; ++k) {
      std::int64_t best = -1;
      for (std::int64_t e = 0; e < E; ++e) {
        const auto first = routing.expert.begin() + (begin + t) * K;
        const bool taken = std::find(first, first + k, static_cast<std::int32_t>(e)) != first + k;
        if (!taken && (best < 0 || row[e] > row[best])) best = e;
      }
      const auto slot = static_cast<std::size_t>((begin + t) * K + k);
      routing.expert[slot] = static_cast<std::int32_t>(best);
      routing.gate[slot] = A{1} / (A{1} + std::exp(-row[best]));
    }
  }
}

template <class S>
void Router<S>::finish(Routing<AccumOf<S>>& routing) const {
  const auto slots = routing.expert.size();
  const auto E = static_cast<std::size_t>(spec_.experts);
  std::vector<std::int64_t> next(E + 1, 0);
  for (const std::int32_t e : routing.expert) ++next[static_cast<std::size_t>(e) + 1];
  for (std::size_t e = 0; e < E; ++e) next[e + 1] += next[e];
  routing.expert_begin = next;
  routing.token_of_row.resize(slots);
  routing.gate_of_row.resize(slots);
  routing.row_of_slot.resize(slots);
  if (context_.token_id != nullptr) routing.id_of_row.resize(slots);
  for (std::size_t slot = 0; slot < slots; ++slot) {
    const auto row =
        static_cast<std::size_t>(next[static_cast<std::size_t>(routing.expert[slot])]++);
    const std::size_t token = slot / static_cast<std::size_t>(routing.K);
    routing.row_of_slot[slot] = static_cast<std::int32_t>(row);
    routing.token_of_row[row] = static_cast<std::int32_t>(token);
    routing.gate_of_row[row] = routing.gate[slot];
    if (context_.token_id != nullptr) {
      const std::uint64_t k = slot % static_cast<std::size_t>(routing.K);
      routing.id_of_row[row] = context_.token_id[token] | (k << 56U);
    }
  }
}

template <class S>
void Router<S>::backward(const at::Tensor& n_TD, std::int64_t begin,
                         const Routing<AccumOf<S>>& routing, const std::vector<AccumOf<S>>& d_gate,
                         const at::Tensor& xa, const at::Tensor& dn_TD) const {
  using A = AccumOf<S>;
  const std::int64_t T = n_TD.size(0), E = spec_.experts, K = routing.K;
  const Frame frame(context_.scratch_stack());
  const at::Tensor wide = context_.scratch_stack().take({T, E}, kDtype<A>).zero_();
  A* d_logits = data<A>(wide);
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t k = 0; k < K; ++k) {
      const auto slot = static_cast<std::size_t>((begin + t) * K + k);
      const A gate = routing.gate[slot];
      const A d = d_gate[static_cast<std::size_t>(routing.row_of_slot[slot])];
      d_logits[t * E + routing.expert[slot]] = d * gate * (A{1} - gate);
    }
  }
  const at::Tensor d_logits_TE = context_.scratch({T, E}).copy_(wide);
  at::Tensor dn = dn_TD;
  at::addmm_out(dn, dn_TD, d_logits_TE, weights_.router_ED);
  const std::uint64_t* ids = context_.token_id == nullptr ? nullptr : context_.token_id + begin;
  if (!lora_.empty()) lora_.backward(n_TD, d_logits_TE, xa, dn_TD, 0, ids);
}

template class Router<double>;
template class Router<float>;
template class Router<Bf16>;

}  // namespace tailor
