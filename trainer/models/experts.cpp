#include <algorithm>

#include "trainer/models/moe.h"

namespace tailor {
namespace {

at::Tensor slice(const at::Tensor& tensor, std::int64_t begin, std::int64_t count) {
  return tensor.defined() ? tensor.narrow(0, begin, count) : tensor;
}

template <class S>
void gather(const at::Tensor& x_TD, const std::int32_t* token, const AccumOf<S>* scale,
            const at::Tensor& out) {
  at::parallel_for(0, out.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().gather_rows(begin, end, x_TD.size(1), data<S>(x_TD), token, scale, data<S>(out));
  });
}

template <class S>
void combine(const at::Tensor& rows, const Routing<AccumOf<S>>& routing, const AccumOf<S>* scale,
             const at::Tensor& out_TD) {
  at::parallel_for(0, out_TD.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().combine_rows(begin, end, out_TD.size(1), routing.K, data<S>(rows),
                              routing.row_of_slot.data(), scale, data<S>(out_TD));
  });
}

/// Products get this many rows or a multiple: a matrix library compiles a kernel for every number
/// of rows it meets, and an expert's share is another in every step (measured: 12 % of a step). The
/// rows past an expert's own are zero on the way in; on the way out they fall on the next expert's
/// rows, which are written after them, or on the spare rows behind the last.
constexpr std::int64_t kRowMultiple = 16;

std::int64_t padded(std::int64_t rows) {
  return (rows + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
}

void zero_past(const at::Tensor& tensor, std::int64_t rows) {
  if (rows < tensor.size(0)) tensor.narrow(0, rows, tensor.size(0) - rows).zero_();
}

/// 0, 1, 2, ...: for kernels that take rows by index, on rows as they lie.
const std::int32_t* own_rows(std::int64_t count) {
  static thread_local std::vector<std::int32_t> rows;
  while (static_cast<std::int64_t>(rows.size()) < count) {
    rows.push_back(static_cast<std::int32_t>(rows.size()));
  }
  return rows.data();
}

std::int64_t rows_max(const std::vector<std::int64_t>& expert_begin) {
  std::int64_t most = 0;
  for (std::size_t e = 0; e + 1 < expert_begin.size(); ++e) {
    most = std::max(most, expert_begin[e + 1] - expert_begin[e]);
  }
  return most;
}

}  // namespace

std::int64_t ExpertsKept::bytes() const {
  std::int64_t total = 0;
  for (const at::Tensor* tensor : {&gate_up, &xa_gate_up, &xa_down}) {
    if (tensor->defined()) total += static_cast<std::int64_t>(tensor->nbytes());
  }
  return total;
}

template <class S>
Experts<S>::Experts(const ModelSpec& spec, int layer, const PassContext<S>& context)
    : spec_(spec),
      layer_(layer),
      context_(context),
      lora_gate_up_(context, layer, {Projection::experts_gate_up}, {0}),
      lora_down_(context, layer, {Projection::experts_down}, {0}) {}

template <class S>
template <class Use>
void Experts<S>::each_expert(const Routing<AccumOf<S>>& routing, const Use& use) const {
  FrozenWeights& weights = *context_.weights;
  for (std::int64_t t = 0; t < weights.expert_tiles(); ++t) {
    const FrozenWeights::ExpertTile tile = weights.experts(layer_, t);
    for (std::int64_t e = tile.first; e < tile.first + tile.count; ++e) {
      const std::int64_t begin = routing.expert_begin[static_cast<std::size_t>(e)];
      const std::int64_t n = routing.expert_begin[static_cast<std::size_t>(e) + 1] - begin;
      if (n == 0) continue;
      const Frame of_expert(context_.scratch_stack());
      use(e, begin, n, weights.expert(tile, e, padded(n), context_.scratch_stack()));
    }
  }
}

template <class S>
ExpertsKept Experts<S>::allocate(std::int64_t rows, bool keep_gate_up, TensorStack& stack) const {
  ExpertsKept kept;
  if (keep_gate_up) {
    kept.gate_up = stack.take({rows + kRowMultiple, 2 * spec_.expert_width}, kDtype<S>);
  }
  if (!lora_gate_up_.empty()) kept.xa_gate_up = stack.take({rows, lora_gate_up_.rank()}, kDtype<S>);
  if (!lora_down_.empty()) kept.xa_down = stack.take({rows, lora_down_.rank()}, kDtype<S>);
  return kept;
}

template <class S>
void Experts<S>::forward(const at::Tensor& n_TD, const Routing<AccumOf<S>>& routing,
                         const at::Tensor& out_TD, const ExpertsKept& kept) const {
  const std::int64_t D = spec_.hidden, F = spec_.expert_width;
  const std::int64_t most = padded(rows_max(routing.expert_begin));
  const Frame frame(context_.scratch_stack());
  const at::Tensor x_scratch = context_.scratch({most, D});
  const at::Tensor m_scratch = context_.scratch({most, F});
  const at::Tensor gate_up_scratch =
      kept.gate_up.defined() ? at::Tensor() : context_.scratch({most, 2 * F});
  const at::Tensor y = context_.scratch({routing.rows() + kRowMultiple, D});
  each_expert(routing, [&](std::int64_t e, std::int64_t begin, std::int64_t n,
                           const ExpertWeights& weights) {
    const std::int64_t p = padded(n);
    const at::Tensor x_p = slice(x_scratch, 0, p), x = slice(x_p, 0, n);
    const at::Tensor m_p = slice(m_scratch, 0, p), m = slice(m_p, 0, n);
    const at::Tensor gate_up =
        kept.gate_up.defined() ? slice(kept.gate_up, begin, p) : slice(gate_up_scratch, 0, p);
    gather<S>(n_TD, routing.token_of_row.data() + begin,
              scales_input() ? routing.gate_of_row.data() + begin : nullptr, x);
    zero_past(x_p, n);
    ops::multiply(x_p, weights.gate_up_DO, gate_up);
    if (lora_gate_up_.has(e)) {
      lora_gate_up_.forward(x, slice(gate_up, 0, n), slice(kept.xa_gate_up, begin, n), e,
                            row_ids(routing, begin));
    }
    ops::swiglu<S>(gate_up, m_p);
    if (!scales_input()) {
      gather<S>(m, own_rows(n), routing.gate_of_row.data() + begin, m);
    }
    ops::multiply(m_p, weights.down_FD, slice(y, begin, p));
    if (lora_down_.has(e)) {
      lora_down_.forward(m, slice(y, begin, n), slice(kept.xa_down, begin, n), e,
                         row_ids(routing, begin));
    }
  });
  combine<S>(y, routing, nullptr, out_TD);
}

template <class S>
void Experts<S>::backward(const at::Tensor& n_TD, const Routing<AccumOf<S>>& routing,
                          const at::Tensor& dout_TD, const ExpertsKept& kept,
                          const at::Tensor& dn_TD, std::vector<AccumOf<S>>& d_gate) const {
  const std::int64_t D = spec_.hidden, F = spec_.expert_width, rows = routing.rows();
  const std::int64_t most = padded(rows_max(routing.expert_begin));
  const Frame frame(context_.scratch_stack());
  const at::Tensor x_scratch = context_.scratch({most, D}),
                   dy_scratch = context_.scratch({most, D});
  const at::Tensor m_scratch = context_.scratch({most, F}),
                   dm_scratch = context_.scratch({most, F});
  const at::Tensor d_gate_up_scratch = context_.scratch({most, 2 * F});
  const at::Tensor gate_up_scratch =
      kept.gate_up.defined() ? at::Tensor() : context_.scratch({most, 2 * F});
  const at::Tensor dx = context_.scratch({rows + kRowMultiple, D});
  d_gate.resize(static_cast<std::size_t>(rows));
  each_expert(routing, [&](std::int64_t e, std::int64_t begin, std::int64_t n,
                           const ExpertWeights& weights) {
    const std::int64_t p = padded(n);
    const at::Tensor x_p = slice(x_scratch, 0, p), x = slice(x_p, 0, n);
    const at::Tensor dy_p = slice(dy_scratch, 0, p), dy = slice(dy_p, 0, n);
    const at::Tensor dm_p = slice(dm_scratch, 0, p), dm = slice(dm_p, 0, n);
    const at::Tensor d_gate_up_p = slice(d_gate_up_scratch, 0, p);
    const at::Tensor d_gate_up = slice(d_gate_up_p, 0, n), m = slice(m_scratch, 0, n);
    const at::Tensor xa_gate_up = slice(kept.xa_gate_up, begin, n);
    const std::uint64_t* ids = row_ids(routing, begin);
    const std::int32_t* token = routing.token_of_row.data() + begin;
    const at::Tensor gate_up_p =
        kept.gate_up.defined() ? slice(kept.gate_up, begin, n) : slice(gate_up_scratch, 0, p);
    const at::Tensor gate_up = slice(gate_up_p, 0, n);
    gather<S>(n_TD, token, scales_input() ? routing.gate_of_row.data() + begin : nullptr, x);
    gather<S>(dout_TD, token, nullptr, dy);
    zero_past(dy_p, n);
    if (!kept.gate_up.defined()) {
      zero_past(x_p, n);
      ops::multiply(x_p, weights.gate_up_DO, gate_up_p);
      if (lora_gate_up_.has(e)) lora_gate_up_.forward(x, gate_up, xa_gate_up, e, ids);
    }
    ops::multiply_t(dy_p, weights.down_FD, dm_p);
    if (lora_down_.has(e) && !kept.gate_up.defined()) {
      ops::swiglu<S>(gate_up, m);
      if (!scales_input()) gather<S>(m, own_rows(n), routing.gate_of_row.data() + begin, m);
      lora_down_.down_only(m, slice(kept.xa_down, begin, n), e, ids);
    }
    if (scales_input()) {
      swiglu_and_down_backward(lora_down_, context_, gate_up, dy, slice(kept.xa_down, begin, n), dm,
                               d_gate_up, e, ids);
    } else {
      weighted_backward(routing, begin, gate_up, dy, slice(kept.xa_down, begin, n), dm, d_gate_up,
                        e, d_gate);
    }
    zero_past(d_gate_up_p, n);
    ops::multiply_t(d_gate_up_p, weights.gate_up_DO, slice(dx, begin, p));
    if (lora_gate_up_.has(e)) {
      lora_gate_up_.backward(x, d_gate_up, xa_gate_up, slice(dx, begin, n), e, ids);
    }
  });
  if (!scales_input()) return combine<S>(dx, routing, nullptr, dn_TD);
  at::parallel_for(0, rows, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().gate_gradient(begin, end, D, data<S>(dx), data<S>(n_TD),
                               routing.token_of_row.data(), d_gate.data());
  });
  combine<S>(dx, routing, routing.gate_of_row.data(), dn_TD);
}

template <class S>
void Experts<S>::weighted_backward(const Routing<AccumOf<S>>& routing, std::int64_t begin,
                                   const at::Tensor& gate_up, const at::Tensor& dy,
                                   const at::Tensor& xa_down, const at::Tensor& dm,
                                   const at::Tensor& d_gate_up, std::int64_t expert,
                                   std::vector<AccumOf<S>>& d_gate) const {
  const std::int64_t n = dm.size(0), F = spec_.expert_width;
  const AccumOf<S>* gate = routing.gate_of_row.data() + begin;
  const Frame frame(context_.scratch_stack());
  const at::Tensor m = context_.scratch({n, F}), weighted = context_.scratch({n, F});
  ops::swiglu<S>(gate_up, m);
  if (lora_down_.has(expert)) {
    gather<S>(m, own_rows(n), gate, weighted);
    lora_down_.backward(weighted, dy, xa_down, dm, expert, row_ids(routing, begin));
  }
  at::parallel_for(0, n, kRowsPerTask, [&](std::int64_t from, std::int64_t to) {
    kernels<S>().gate_gradient(from, to, F, data<S>(dm), data<S>(m), own_rows(n),
                               d_gate.data() + begin);
  });
  gather<S>(dm, own_rows(n), gate, dm);
  ops::swiglu_backward<S>(gate_up, dm, d_gate_up);
}

template class Experts<double>;
template class Experts<float>;
template class Experts<Bf16>;

}  // namespace tailor
