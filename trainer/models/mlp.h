#pragma once

#include "trainer/models/context.h"
#include "trainer/models/weights.h"

namespace tailor {

/// What a gated MLP's backward wants back from its forward.
struct MlpKept {
  at::Tensor gate_up;     ///< [T, 2F], before the activation
  at::Tensor xa_gate_up;  ///< [T, ranks of gate and up]
  at::Tensor xa_down;     ///< [T, rank of down]

  MlpKept rows(std::int64_t begin, std::int64_t count) const;
  std::int64_t bytes() const;
};

/// y = W_down (silu(W_gate x) * W_up x): a dense layer's MLP or a shared expert.
template <class S>
class Mlp {
 public:
  enum class Kind { dense, shared_expert };
  Mlp(Kind kind, const ModelSpec& spec, int layer, const LayerWeights& weights,
      const PassContext<S>& context);

  MlpKept allocate(std::int64_t tokens, TensorStack& stack) const;
  /// out = base + y(n); fills kept. out may be base.
  void forward(const at::Tensor& n_TD, const at::Tensor& base_TD, const at::Tensor& out_TD,
               const MlpKept& kept, const std::uint64_t* token_id) const;
  /// Only what backward wants back: everything but the down projection.
  void recompute(const at::Tensor& n_TD, const MlpKept& kept, const std::uint64_t* token_id) const;
  /// dn = gradient of n; adds factor gradients.
  void backward(const at::Tensor& n_TD, const at::Tensor& dout_TD, const MlpKept& kept,
                const at::Tensor& dn_TD, const std::uint64_t* token_id) const;

 private:
  void gate_up(const at::Tensor& n_TD, const MlpKept& kept, const std::uint64_t* token_id) const;

  std::int64_t width_;
  const LayerWeights& weights_;
  const PassContext<S>& context_;
  LoraGroup<S> lora_gate_up_, lora_down_;
};

extern template class Mlp<double>;
extern template class Mlp<float>;
extern template class Mlp<Bf16>;

}  // namespace tailor
