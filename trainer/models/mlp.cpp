#include "trainer/models/mlp.h"

namespace tailor {

MlpKept MlpKept::rows(std::int64_t begin, std::int64_t count) const {
  const auto cut = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.narrow(0, begin, count) : tensor;
  };
  return {cut(gate_up), cut(xa_gate_up), cut(xa_down)};
}

std::int64_t MlpKept::bytes() const {
  std::int64_t total = 0;
  for (const at::Tensor* tensor : {&gate_up, &xa_gate_up, &xa_down}) {
    if (tensor->defined()) total += static_cast<std::int64_t>(tensor->nbytes());
  }
  return total;
}

template <class S>
Mlp<S>::Mlp(Kind kind, const ModelSpec& spec, int layer, const LayerWeights& weights,
            const PassContext<S>& context)
    : width_(kind == Kind::dense ? spec.dense_width : spec.shared_width),
      weights_(weights),
      context_(context),
      lora_gate_up_(context, layer,
                    {kind == Kind::dense ? Projection::gate_proj : Projection::shared_gate_proj,
                     kind == Kind::dense ? Projection::up_proj : Projection::shared_up_proj},
                    {0, width_}),
      lora_down_(context, layer,
                 {kind == Kind::dense ? Projection::down_proj : Projection::shared_down_proj},
                 {0}) {}

template <class S>
MlpKept Mlp<S>::allocate(std::int64_t tokens, TensorStack& stack) const {
  MlpKept kept;
  kept.gate_up = stack.take({tokens, 2 * width_}, kDtype<S>);
  if (!lora_gate_up_.empty())
    kept.xa_gate_up = stack.take({tokens, lora_gate_up_.rank()}, kDtype<S>);
  if (!lora_down_.empty()) kept.xa_down = stack.take({tokens, lora_down_.rank()}, kDtype<S>);
  return kept;
}

template <class S>
void Mlp<S>::gate_up(const at::Tensor& n_TD, const MlpKept& kept,
                     const std::uint64_t* token_id) const {
  ops::linear(n_TD, weights_.gate_up_OD, kept.gate_up);
  if (!lora_gate_up_.empty()) {
    lora_gate_up_.forward(n_TD, kept.gate_up, kept.xa_gate_up, 0, token_id);
  }
}

template <class S>
void Mlp<S>::forward(const at::Tensor& n_TD, const at::Tensor& base_TD, const at::Tensor& out_TD,
                     const MlpKept& kept, const std::uint64_t* token_id) const {
  const Frame frame(context_.scratch_stack());
  gate_up(n_TD, kept, token_id);
  const at::Tensor m_TF = context_.scratch({n_TD.size(0), width_});
  ops::swiglu<S>(kept.gate_up, m_TF);
  at::Tensor out = out_TD;
  at::addmm_out(out, base_TD, m_TF, weights_.down_DF.t());
  if (!lora_down_.empty()) lora_down_.forward(m_TF, out_TD, kept.xa_down, 0, token_id);
}

template <class S>
void Mlp<S>::recompute(const at::Tensor& n_TD, const MlpKept& kept,
                       const std::uint64_t* token_id) const {
  gate_up(n_TD, kept, token_id);
  if (lora_down_.empty()) return;
  const Frame frame(context_.scratch_stack());
  const at::Tensor m_TF = context_.scratch({n_TD.size(0), width_});
  ops::swiglu<S>(kept.gate_up, m_TF);
  lora_down_.down_only(m_TF, kept.xa_down, 0, token_id);
}

template <class S>
void Mlp<S>::backward(const at::Tensor& n_TD, const at::Tensor& dout_TD, const MlpKept& kept,
                      const at::Tensor& dn_TD, const std::uint64_t* token_id) const {
  const std::int64_t T = n_TD.size(0), F = width_;
  const Frame frame(context_.scratch_stack());
  const at::Tensor dm_TF = context_.scratch({T, F});
  ops::linear_backward(dout_TD, weights_.down_DF, dm_TF);
  const at::Tensor d_gate_up = context_.scratch(kept.gate_up.sizes());
  swiglu_and_down_backward(lora_down_, context_, kept.gate_up, dout_TD, kept.xa_down, dm_TF,
                           d_gate_up, 0, token_id);
  ops::linear_backward(d_gate_up, weights_.gate_up_OD, dn_TD);
  if (!lora_gate_up_.empty()) {
    lora_gate_up_.backward(n_TD, d_gate_up, kept.xa_gate_up, dn_TD, 0, token_id);
  }
}

template class Mlp<double>;
template class Mlp<float>;
template class Mlp<Bf16>;

}  // namespace tailor
