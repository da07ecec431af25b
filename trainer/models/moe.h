#pragma once

#include "trainer/models/context.h"
#include "trainer/models/weights.h"

namespace tailor {

/// Which experts the tokens of a step go to in one layer, and with which weight. Decided once in
/// the forward pass, kept, and replayed by everything after it. A row is one (token, slot) pair;
/// rows are sorted by expert, by token and slot within an expert.
template <class A>
struct Routing {
  std::int64_t K = 1;
  std::vector<std::int32_t> expert;        ///< [T * K], of token t's slot k at t * K + k
  std::vector<A> gate;                     ///< [T * K] sigmoid(router logit)
  std::vector<std::int32_t> token_of_row;  ///< [rows]
  std::vector<std::int32_t> row_of_slot;   ///< [T * K]
  std::vector<A> gate_of_row;              ///< [rows]
  std::vector<std::uint64_t> id_of_row;    ///< [rows] for dropout: token id with the slot on top
  std::vector<std::int64_t> expert_begin;  ///< [E + 1] first row of each expert

  std::int64_t rows() const { return static_cast<std::int64_t>(token_of_row.size()); }
};

/// What the pooled experts' backward wants back, rows in routing order.
struct ExpertsKept {
  at::Tensor gate_up;     ///< [rows, 2F]; undefined: recomputed
  at::Tensor xa_gate_up;  ///< [rows, rank]
  at::Tensor xa_down;     ///< [rows, rank]

  std::int64_t bytes() const;
};

/// Llama 4's router: logits = x W^T, the K largest are chosen (lowest index on ties), gate =
/// sigmoid(logit) (transformers 5.17 modeling_llama4.py, Llama4Router). Works a micro-batch at a
/// time; the step's choices are pooled by finish().
template <class S>
class Router {
 public:
  Router(const ModelSpec& spec, int layer, const LayerWeights& weights,
         const PassContext<S>& context);

  Routing<AccumOf<S>> start(std::int64_t tokens) const;
  /// xa of the router's own factors, on the stack of what is kept.
  at::Tensor allocate_kept(std::int64_t tokens) const;
  /// Fills tokens [begin, begin + n) of `routing`.
  void forward(const at::Tensor& n_TD, std::int64_t begin, Routing<AccumOf<S>>& routing,
               const at::Tensor& xa) const;
  /// Sorts the step's rows by expert.
  void finish(Routing<AccumOf<S>>& routing) const;
  /// dn += gradient through the gates; d_gate [rows] is the gradient of each row's gate.
  void backward(const at::Tensor& n_TD, std::int64_t begin, const Routing<AccumOf<S>>& routing,
                const std::vector<AccumOf<S>>& d_gate, const at::Tensor& xa,
                const at::Tensor& dn_TD) const;

 private:
  const ModelSpec& spec_;
  const LayerWeights& weights_;
  const PassContext<S>& context_;
  LoraGroup<S> lora_;
};

/// The routed experts over the pooled rows of a whole step: each expert's weights are met once a
/// pass, whatever the number of micro-batches, as they come in tiles. Expert e sees x' = gate * x
/// (Llama 4 scales the input), y = W_down (silu(W_gate x') * W_up x'); a token's K results are
/// added in slot order.
template <class S>
class Experts {
 public:
  Experts(const ModelSpec& spec, int layer, const PassContext<S>& context);

  /// With `keep_gate_up` false only the thin products are kept.
  ExpertsKept allocate(std::int64_t rows, bool keep_gate_up, TensorStack& stack) const;
  /// out += experts(n).
  void forward(const at::Tensor& n_TD, const Routing<AccumOf<S>>& routing, const at::Tensor& out_TD,
               const ExpertsKept& kept) const;
  /// dn += gradient of n through the experts' input; d_gate [rows] = <dx', n>. Gate and up are
  /// recomputed where they were not kept; the down projection never is: it is not needed.
  void backward(const at::Tensor& n_TD, const Routing<AccumOf<S>>& routing,
                const at::Tensor& dout_TD, const ExpertsKept& kept, const at::Tensor& dn_TD,
                std::vector<AccumOf<S>>& d_gate) const;

 private:
  /// Calls use(expert, weights) for every expert that has rows, tile by tile.
  template <class Use>
  void each_expert(const Routing<AccumOf<S>>& routing, const Use& use) const;
  const std::uint64_t* row_ids(const Routing<AccumOf<S>>& routing, std::int64_t begin) const {
    return routing.id_of_row.empty() ? nullptr : routing.id_of_row.data() + begin;
  }

  const ModelSpec& spec_;
  int layer_;
  const PassContext<S>& context_;
  LoraGroup<S> lora_gate_up_, lora_down_;
};

extern template class Router<double>;
extern template class Router<float>;
extern template class Router<Bf16>;
extern template class Experts<double>;
extern template class Experts<float>;
extern template class Experts<Bf16>;

}  // namespace tailor
