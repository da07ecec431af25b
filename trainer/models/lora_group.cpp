#include "base/error.h"
#include "base/random.h"
#include "trainer/models/context.h"

namespace tailor {
namespace {

template <class S>
void drop(const at::Tensor& x, double probability, std::uint64_t key, const std::uint64_t* token_id,
          const at::Tensor& out) {
  at::parallel_for(0, x.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().dropout(begin, end, x.size(1), data<S>(x), x.stride(0), probability, key, token_id,
                         data<S>(out), out.stride(0));
  });
}

}  // namespace

template <class S>
LoraGroup<S>::LoraGroup(const PassContext<S>& context, int layer,
                        std::initializer_list<Projection> projections,
                        std::initializer_list<std::int64_t> columns)
    : context_(context) {
  if (context.adapter == nullptr) return;
  const std::int64_t* column = columns.begin();
  for (const Projection projection : projections) {
    if (const LoraSite* site = context.adapter->find(layer, projection)) {
      parts_.push_back({site, *column, rank_});
      rank_ += site->rank;
    }
    ++column;
  }
}

template <class S>
std::uint64_t LoraGroup<S>::dropout_key(const LoraSite& site, std::int64_t expert) const {
  const auto place = (static_cast<std::uint64_t>(site.layer) << 32U) |
                     (static_cast<std::uint64_t>(site.projection) << 24U) |
                     static_cast<std::uint64_t>(expert);
  return random_bits(context_.seed, RandomStream::dropout, context_.step, place);
}

template <class S>
void LoraGroup<S>::down_only(const at::Tensor& x, const at::Tensor& xa, std::int64_t expert,
                             const std::uint64_t* token_id) const {
  const auto a_of = [&](const LoraSite& site) {
    return context_.factors + site.a_offset + site.slot(expert) * site.rank * site.in;
  };
  // The A of sites that share an input lie side by side: one product serves all, if their scales
  // agree and dropout does not give each its own input.
  const LoraSite& first = *parts_.front().site;
  bool together = !drops();
  for (const Part& part : parts_) together = together && part.site->scale == first.scale;
  if (together) {
    ops::lora_down<S>(x, a_of(first), rank_, first.scale, data<S>(xa), rank_);
    return;
  }
  const Frame frame(context_.scratch_stack());
  const at::Tensor kept = drops() ? context_.scratch(x.sizes()) : x;
  for (const Part& part : parts_) {
    const LoraSite& site = *part.site;
    if (drops()) drop<S>(x, context_.dropout, dropout_key(site, expert), token_id, kept);
    ops::lora_down<S>(kept, a_of(site), site.rank, site.scale, data<S>(xa) + part.rank_begin,
                      rank_);
  }
}

template <class S>
void LoraGroup<S>::forward(const at::Tensor& x, const at::Tensor& y, const at::Tensor& xa,
                           std::int64_t expert, const std::uint64_t* token_id) const {
  const std::int64_t T = x.size(0);
  if (T == 0) return;
  down_only(x, xa, expert, token_id);
  for (const Part& part : parts_) {
    const LoraSite& site = *part.site;
    ops::lora_up<S>(data<S>(xa) + part.rank_begin, rank_,
                    context_.factors + site.b_offset + site.slot(expert) * site.rank * site.out,
                    site.rank, site.out, T, data<S>(y) + part.column, y.stride(0));
  }
}

// With xa = scale x A^T (kept), y += xa B: dB += xa^T dy, d = scale dy B^T, dA += d^T x, dx += d A.
template <class S>
void LoraGroup<S>::backward(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& xa,
                            const at::Tensor& dx, std::int64_t expert,
                            const std::uint64_t* token_id) const {
  if (x.size(0) == 0) return;
  const Frame frame(context_.scratch_stack());
  if (!drops()) {
    gradient_of_a(x, backward_to_input(dy, xa, dx, expert), expert);
    return;
  }
  const at::Tensor d = backward_of_b(dy, xa, expert);
  for (const Part& part : parts_) {  // dropout gives each site its own input
    const LoraSite& site = *part.site;
    const Frame of_part(context_.scratch_stack());
    const std::int64_t a_at = site.a_offset + site.slot(expert) * site.rank * site.in;
    const std::uint64_t key = dropout_key(site, expert);
    const at::Tensor kept = context_.scratch(x.sizes());
    S* d_part = data<S>(d) + part.rank_begin;
    drop<S>(x, context_.dropout, key, token_id, kept);
    ops::lora_gradient<S>(x.size(0), site.rank, site.in, d_part, rank_, data<S>(kept),
                          kept.stride(0), context_.gradients + a_at);
    if (!dx.defined()) continue;
    kept.zero_();
    ops::lora_up<S>(d_part, rank_, context_.factors + a_at, site.rank, site.in, x.size(0),
                    data<S>(kept), kept.stride(0));
    drop<S>(kept, context_.dropout, key, token_id, kept);
    ops::add<S>(kept, dx);
  }
}

template <class S>
at::Tensor LoraGroup<S>::backward_of_b(const at::Tensor& dy, const at::Tensor& xa,
                                       std::int64_t expert) const {
  const std::int64_t T = dy.size(0);
  const at::Tensor d = context_.scratch({T, rank_});
  for (const Part& part : parts_) {
    const LoraSite& site = *part.site;
    const std::int64_t b_at = site.b_offset + site.slot(expert) * site.rank * site.out;
    const at::Tensor dy_part = dy.narrow(1, part.column, site.out);
    ops::lora_down<S>(dy_part, context_.factors + b_at, site.rank, site.scale,
                      data<S>(d) + part.rank_begin, rank_);
    ops::lora_gradient<S>(T, site.rank, site.out, data<S>(xa) + part.rank_begin, rank_,
                          data<S>(dy_part), dy.stride(0), context_.gradients + b_at);
  }
  return d;
}

// A of all sites at once: their A, and their gradients, lie side by side (plain matrices).
template <class S>
std::int64_t LoraGroup<S>::offset_of_a(std::int64_t expert) const {
  const LoraSite& first = *parts_.front().site;
  TAILOR_CHECK(parts_.size() == 1 || first.experts == 1);
  return first.a_offset + first.slot(expert) * first.rank * first.in;
}

template <class S>
at::Tensor LoraGroup<S>::backward_to_input(const at::Tensor& dy, const at::Tensor& xa,
                                           const at::Tensor& dx, std::int64_t expert) const {
  TAILOR_CHECK(!drops());
  const at::Tensor d = backward_of_b(dy, xa, expert);
  if (dx.defined()) {
    ops::lora_up<S>(data<S>(d), rank_, context_.factors + offset_of_a(expert), rank_, dx.size(1),
                    dx.size(0), data<S>(dx), dx.stride(0));
  }
  return d;
}

template <class S>
void LoraGroup<S>::gradient_of_a(const at::Tensor& x, const at::Tensor& d,
                                 std::int64_t expert) const {
  ops::lora_gradient<S>(x.size(0), rank_, x.size(1), data<S>(d), rank_, data<S>(x), x.stride(0),
                        context_.gradients + offset_of_a(expert));
}

template class LoraGroup<double>;
template class LoraGroup<float>;
template class LoraGroup<Bf16>;

}  // namespace tailor
