#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "adapters/lora.h"
#include "trainer/ops.h"
#include "trainer/stream/frozen_weights.h"
#include "trainer/workspace.h"

namespace tailor {

/// What every block of one pass shares: the factors in the blocks' dtype, where their gradients go,
/// and the dropout of this step. Gradients of factors are summed in AccumOf<S> over micro-batches.
template <class S>
struct PassContext {
  Workspace* workspace = nullptr;    ///< where all tensors of the pass live; never null in a pass
  FrozenWeights* weights = nullptr;  ///< the base; never null in a pass
  const Adapter* adapter = nullptr;  ///< null: the base model alone
  const S* factors = nullptr;        ///< arena of adapter, cast once a step
  AccumOf<S>* gradients = nullptr;   ///< arena of equal layout; null: forward only
  double dropout = 0;                ///< 0 in evaluation
  std::uint64_t seed = 0;
  std::uint64_t step = 0;
  const std::uint64_t* token_id = nullptr;  ///< [T] identity of each token in the global batch

  TensorStack& scratch_stack() const { return workspace->scratch; }
  /// A tensor of the blocks' dtype that lives until the caller's Frame ends.
  at::Tensor scratch(at::IntArrayRef shape) const {
    return workspace->scratch.take(shape, kDtype<S>);
  }
};

/// LoRA on one or several projections that read the same input, as (site, first column of y) pairs.
/// The projections' results lie side by side in y, so a site writes a slice of its columns.
template <class S>
class LoraGroup {
 public:
  LoraGroup(const PassContext<S>& context, int layer, std::initializer_list<Projection> projections,
            std::initializer_list<std::int64_t> columns);

  bool empty() const { return parts_.empty(); }
  /// Whether `expert` (0 for plain matrices) has factors: if not, it may not be asked of below.
  bool has(std::int64_t expert) const {
    return !parts_.empty() && parts_.front().site->slot(expert) >= 0;
  }
  std::int64_t rank() const { return rank_; }  ///< of all sites together

  /// y += scale (x A^T) B^T for expert `expert` (0 for plain matrices); the thin products x A^T are
  /// written to xa [T, rank()], which backward wants back. token_id: of x's rows, or null.
  void forward(const at::Tensor& x, const at::Tensor& y, const at::Tensor& xa, std::int64_t expert,
               const std::uint64_t* token_id) const;
  /// Only the thin products x A^T, for recomputing what backward wants.
  void down_only(const at::Tensor& x, const at::Tensor& xa, std::int64_t expert,
                 const std::uint64_t* token_id) const;
  /// Adds the factors' gradients and dx += scale (dy B) A.
  void backward(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& xa,
                const at::Tensor& dx, std::int64_t expert, const std::uint64_t* token_id) const;
  /// The two halves of backward(), for an input x that exists only once dx is known. The first adds
  /// B's gradient and dx, and returns what the second wants, on the scratch stack; the second adds
  /// A's. Not with dropout.
  at::Tensor backward_to_input(const at::Tensor& dy, const at::Tensor& xa, const at::Tensor& dx,
                               std::int64_t expert) const;
  void gradient_of_a(const at::Tensor& x, const at::Tensor& d, std::int64_t expert) const;
  bool drops() const { return context_.dropout > 0 && context_.token_id != nullptr; }

 private:
  struct Part {
    const LoraSite* site;
    std::int64_t column;
    std::int64_t rank_begin;
  };
  std::uint64_t dropout_key(const LoraSite& site, std::int64_t expert) const;
  /// Adds B's gradient; returns scale dy B^T [T, rank()], on the scratch stack.
  at::Tensor backward_of_b(const at::Tensor& dy, const at::Tensor& xa, std::int64_t expert) const;
  std::int64_t offset_of_a(std::int64_t expert) const;

  const PassContext<S>& context_;
  std::vector<Part> parts_;
  std::int64_t rank_ = 0;
};

/// Backward of y = down's LoRA of m and of m = silu(gate) * up, which is not kept. dm enters with
/// the frozen down projection's part and is completed; d_gate_up is written.
template <class S>
void swiglu_and_down_backward(const LoraGroup<S>& down, const PassContext<S>& context,
                              const at::Tensor& gate_up, const at::Tensor& dy,
                              const at::Tensor& xa_down, const at::Tensor& dm,
                              const at::Tensor& d_gate_up, std::int64_t expert,
                              const std::uint64_t* token_id) {
  if (!down.has(expert)) {
    ops::swiglu_backward<S>(gate_up, dm, d_gate_up);
    return;
  }
  const at::Tensor m = context.scratch(dm.sizes());
  if (down.drops()) {
    ops::swiglu<S>(gate_up, m);
    down.backward(m, dy, xa_down, dm, expert, token_id);
    ops::swiglu_backward<S>(gate_up, dm, d_gate_up);
    return;
  }
  // m comes with the activation's backward, which has the exponentials at hand.
  const at::Tensor d = down.backward_to_input(dy, xa_down, dm, expert);
  ops::swiglu_backward<S>(gate_up, dm, d_gate_up, m);
  down.gradient_of_a(m, d, expert);
}

extern template class LoraGroup<double>;
extern template class LoraGroup<float>;
extern template class LoraGroup<Bf16>;

}  // namespace tailor
