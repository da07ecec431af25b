#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "trainer/models/moe.h"

namespace tailor {
namespace {

constexpr double kNormaliseFloor = 1e-20;  // modeling_deepseek_v3.py, route_tokens_to_experts

}  // namespace

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
  routing.score.resize(slots);
  return routing;
}

template <class S>
at::Tensor Router<S>::allocate_kept(std::int64_t tokens) const {
  if (lora_.empty()) return {};
  return context_.workspace->kept.take({tokens, lora_.rank()}, kDtype<S>);
}

template <class S>
at::Tensor Router<S>::logits(const at::Tensor& n_TD, const at::Tensor& xa,
                             const std::uint64_t* ids) const {
  const std::int64_t T = n_TD.size(0), E = spec_.experts;
  const at::Tensor wide = context_.scratch_stack().take({T, E}, kDtype<A>);
  const Frame frame(context_.scratch_stack());
  const at::Tensor logits_TE = context_.scratch({T, E});
  if (spec_.router.kind == RouterSpec::Kind::llama4) {
    ops::linear(n_TD, weights_.router_ED, logits_TE);
    if (!lora_.empty()) lora_.forward(n_TD, logits_TE, xa, 0, ids);
    wide.copy_(logits_TE);
    return wide;
  }
  const at::Tensor n_wide = context_.scratch_stack().take(n_TD.sizes(), kDtype<A>);
  const at::Tensor w_wide = context_.scratch_stack().take({E, spec_.hidden}, kDtype<A>);
  ops::linear(n_wide.copy_(n_TD), w_wide.copy_(weights_.router_ED), wide);
  if (!lora_.empty()) {
    logits_TE.zero_();
    lora_.forward(n_TD, logits_TE, xa, 0, ids);
    at::Tensor sum = wide;
    at::add_out(sum, wide, logits_TE);
  }
  return wide;
}

template <class S>
void Router<S>::choose_largest(const A* logits, std::int32_t* expert, A* score, A* gate) const {
  for (std::int64_t k = 0; k < spec_.experts_per_token; ++k) {
    std::int32_t best = -1;
    for (std::int32_t e = 0; e < static_cast<std::int32_t>(spec_.experts); ++e) {
      const bool taken = std::find(expert, expert + k, e) != expert + k;
      if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
    }
    expert[k] = best;
    score[k] = gate[k] = A{1} / (A{1} + std::exp(-logits[best]));
  }
}

template <class S>
void Router<S>::choose_grouped(const A* logits, Scores& scores, std::int32_t* expert, A* score,
                               A* gate) const {
  const RouterSpec& router = spec_.router;
  const std::int64_t E = spec_.experts, G = router.groups, width = E / G,
                     K = spec_.experts_per_token;
  const float* bias = data<float>(weights_.router_bias_E);
  auto& [all, choice, of_group, open, kept] = scores;
  all.resize(static_cast<std::size_t>(E));
  choice.resize(static_cast<std::size_t>(E));
  of_group.resize(static_cast<std::size_t>(G));
  open.assign(static_cast<std::size_t>(E), 0);
  kept.assign(static_cast<std::size_t>(G), 0);
  for (std::int64_t e = 0; e < E; ++e) {
    const auto i = static_cast<std::size_t>(e);
    all[i] = A{1} / (A{1} + std::exp(-logits[e]));
    choice[i] = all[i] + static_cast<A>(bias[e]);
  }
  constexpr A kNever = -std::numeric_limits<A>::infinity();
  for (std::int64_t g = 0; g < G; ++g) {
    A first = kNever, second = kNever;
    for (std::int64_t e = g * width; e < (g + 1) * width; ++e) {
      const A value = choice[static_cast<std::size_t>(e)];
      if (value > first) {
        second = first;
        first = value;
      } else if (value > second) {
        second = value;
      }
    }
    of_group[static_cast<std::size_t>(g)] = width > 1 ? first + second : first;
  }
  for (std::int64_t n = 0; n < router.groups_kept; ++n) {
    std::int64_t best = -1;
    for (std::int64_t g = 0; g < G; ++g) {
      if (kept[static_cast<std::size_t>(g)] != 0) continue;
      if (best < 0 ||
          of_group[static_cast<std::size_t>(g)] > of_group[static_cast<std::size_t>(best)])
        best = g;
    }
    kept[static_cast<std::size_t>(best)] = 1;
    std::fill_n(open.begin() + best * width, width, char{1});
  }
  A sum = 0;
  for (std::int64_t k = 0; k < K; ++k) {
    std::int64_t best = -1;
    for (std::int64_t e = 0; e < E; ++e) {
      const auto i = static_cast<std::size_t>(e);
      if (open[i] != 0 && (best < 0 || choice[i] > choice[static_cast<std::size_t>(best)]))
        best = e;
    }
    open[static_cast<std::size_t>(best)] = 0;
    expert[k] = static_cast<std::int32_t>(best);
    score[k] = all[static_cast<std::size_t>(best)];
    sum += score[k];
  }
  const A divisor = router.normalise ? sum + static_cast<A>(kNormaliseFloor) : A{1};
  for (std::int64_t k = 0; k < K; ++k) gate[k] = score[k] / divisor * static_cast<A>(router.scale);
}

template <class S>
void Router<S>::forward(const at::Tensor& n_TD, std::int64_t begin, Routing<A>& routing,
                        const at::Tensor& xa) const {
  const std::int64_t T = n_TD.size(0), E = spec_.experts, K = routing.K;
  const Frame frame(context_.scratch_stack());
  const std::uint64_t* ids = context_.token_id == nullptr ? nullptr : context_.token_id + begin;
  const at::Tensor wide = logits(n_TD, xa, ids);
  const bool largest = spec_.router.kind == RouterSpec::Kind::llama4;
  at::parallel_for(0, T, kRowsPerTask, [&](std::int64_t from, std::int64_t to) {
    Scores scores;
    for (std::int64_t t = from; t < to; ++t) {
      const A* row = data<A>(wide) + t * E;
      const auto slot = static_cast<std::size_t>((begin + t) * K);
      std::int32_t* expert = routing.expert.data() + slot;
      A *score = routing.score.data() + slot, *gate = routing.gate.data() + slot;
      if (largest) {
        choose_largest(row, expert, score, gate);
      } else {
        choose_grouped(row, scores, expert, score, gate);
      }
    }
  });
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
  const std::int64_t T = n_TD.size(0), E = spec_.experts, K = routing.K;
  const RouterSpec& router = spec_.router;
  const Frame frame(context_.scratch_stack());
  const at::Tensor wide = context_.scratch_stack().take({T, E}, kDtype<A>).zero_();
  A* d_logits = data<A>(wide);
  for (std::int64_t t = 0; t < T; ++t) {
    const auto first = static_cast<std::size_t>((begin + t) * K);
    const auto d_of = [&](std::size_t k) {
      return d_gate[static_cast<std::size_t>(routing.row_of_slot[first + k])];
    };
    // gate_k = scale s_k / S: d s_k = scale (d gate_k - sum_j d gate_j s_j / S) / S.
    A factor = static_cast<A>(router.scale), shared = 0;
    if (router.normalise) {
      A sum = static_cast<A>(kNormaliseFloor), product = 0;
      for (std::size_t k = 0; k < static_cast<std::size_t>(K); ++k) {
        sum += routing.score[first + k];
        product += d_of(k) * routing.score[first + k];
      }
      factor /= sum;
      shared = product / sum;
    }
    for (std::size_t k = 0; k < static_cast<std::size_t>(K); ++k) {
      const A score = routing.score[first + k];
      d_logits[t * E + routing.expert[first + k]] =
          (d_of(k) - shared) * factor * score * (A{1} - score);
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
