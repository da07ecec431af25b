#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "adapters/lora.h"
#include "trainer/ops.h"
#include "trainer/workspace.h"

namespace tailor {

/// What every block of one pass shares: the factors in the blocks' dtype, where their gradients go,
/// and the dropout of this step. Gradients of factors are summed in AccumOf<S> over micro-batches.
template <class S>
struct PassContext {
  Workspace* workspace = nullptr;    ///< where all tensors of the pass live; never null in a pass
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

 private:
  struct Part {
    const LoraSite* site;
    std::int64_t column;
    std::int64_t rank_begin;
  };
  bool drops() const { return context_.dropout > 0 && context_.token_id != nullptr; }
  std::uint64_t dropout_key(const LoraSite& site, std::int64_t expert) const;

  const PassContext<S>& context_;
  std::vector<Part> parts_;
  std::int64_t rank_ = 0;
};

extern template class LoraGroup<double>;
extern template class LoraGroup<float>;
extern template class LoraGroup<Bf16>;

}  // namespace tailor
