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
  std::vector<A> gate;                     ///< [T * K] weight of the choice
  std::vector<A> score;                    ///< [T * K] sigmoid(router logit) of the choice
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
/// sigmoid(logit) (transformers 5.17 modeling_llama4.py, Llama4Router).
/// DeepSeek V3's: logits in AccumOf<S>; score = sigmoid(logit); groups are ranked by their two
/// largest score + bias, the K largest score + bias of the groups kept are chosen, gate = score
/// (divided by the sum of the chosen, if asked) * scale (modeling_deepseek_v3.py,
/// DeepseekV3TopkRouter). The bias is frozen. Works a micro-batch at a time; the step's choices are
/// pooled by finish().
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
  using A = AccumOf<S>;
  /// Room for one token's scores, with and without bias, and for what may still be chosen.
  struct Scores {
    std::vector<A> all, choice, of_group;
    std::vector<char> open, kept;
  };
  at::Tensor logits(const at::Tensor& n_TD, const at::Tensor& xa, const std::uint64_t* ids) const;
  /// One token's choices from its E logits: K experts, their scores and gates.
  void choose_largest(const A* logits, std::int32_t* expert, A* score, A* gate) const;
  void choose_grouped(const A* logits, Scores& scores, std::int32_t* expert, A* score,
                      A* gate) const;

  const ModelSpec& spec_;
  const LayerWeights& weights_;
  const PassContext<S>& context_;
  LoraGroup<S> lora_;
};

/// The routed experts over the pooled rows of a whole step: each expert's weights are met once a
/// pass, whatever the number of micro-batches, as they come in tiles. A token's K results are added
/// in slot order. Llama 4 scales the input: expert e sees x' = gate * x, y = W_down (silu(W_gate
/// x')
/// * W_up x'). DeepSeek V3 weights the output, y = gate * W_down m with m of the unscaled x, which
/// is computed as W_down (gate * m): the same, and LoRA on W_down sees its true input.
template <class S>
class Experts {
 public:
  Experts(const ModelSpec& spec, int layer, const PassContext<S>& context);

  /// With `keep_gate_up` false only the thin products are kept.
  ExpertsKept allocate(std::int64_t rows, bool keep_gate_up, TensorStack& stack) const;
  /// out += experts(n).
  void forward(const at::Tensor& n_TD, const Routing<AccumOf<S>>& routing, const at::Tensor& out_TD,
               const ExpertsKept& kept) const;
  /// dn += gradient of n through the experts' input; d_gate [rows] = <dx', n>, or <d(gate m), m>.
  /// Gate and up are recomputed where they were not kept; the down projection never is: it is not
  /// needed.
  void backward(const at::Tensor& n_TD, const Routing<AccumOf<S>>& routing,
                const at::Tensor& dout_TD, const ExpertsKept& kept, const at::Tensor& dn_TD,
                std::vector<AccumOf<S>>& d_gate) const;

 private:
  /// Calls use(expert, weights) for every expert that has rows, tile by tile.
  template <class Use>
  void each_expert(const Routing<AccumOf<S>>& routing, const Use& use) const;
  bool scales_input() const { return spec_.router.kind == RouterSpec::Kind::llama4; }
  /// d_gate_up from dm (dy W_down already in it) where the gate weights the output.
  void weighted_backward(const Routing<AccumOf<S>>& routing, std::int64_t begin,
                         const at::Tensor& gate_up, const at::Tensor& dy, const at::Tensor& xa_down,
                         const at::Tensor& dm, const at::Tensor& d_gate_up, std::int64_t expert,
                         std::vector<AccumOf<S>>& d_gate) const;
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
