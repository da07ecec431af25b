#include "trainer/models/decoder.h"

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "trainer/models/attention.h"
#include "trainer/models/mlp.h"
#include "trainer/models/moe.h"

namespace tailor {
namespace {

/// One layer's parts, bound to this pass's factors.
template <class S>
struct Layer {
  Layer(const ModelSpec& spec, std::size_t layer, const PassContext<S>& context)
      : index(static_cast<std::int64_t>(layer)),
        moe(spec.layers[layer].moe),
        attention(Attention<S>::create(spec, static_cast<int>(layer), weights, context)),
        mlp(moe ? Mlp<S>::Kind::shared_expert : Mlp<S>::Kind::dense, spec, static_cast<int>(layer),
            weights, context) {
    if (!moe) return;
    router.emplace(spec, static_cast<int>(layer), weights, context);
    experts.emplace(spec, static_cast<int>(layer), context);
  }
  Layer(const Layer&) = delete;  // its parts hold the address of `weights`
  Layer& operator=(const Layer&) = delete;

  std::int64_t index;
  LayerWeights weights;  ///< the parts that are leased now
  bool moe;
  std::unique_ptr<const Attention<S>> attention;
  Mlp<S> mlp;
  std::optional<Router<S>> router;
  std::optional<Experts<S>> experts;
};

/// What one layer keeps for its backward pass. With Activations::recomputed only x, routing and
/// router_xa are on the stack of what is kept; the rest is scratch, gone with the layer.
template <class S>
struct LayerKept {
  at::Tensor x_TD, h_TD;
  AttentionKept attention;
  MlpKept mlp;
  ExpertsKept experts;
  Routing<AccumOf<S>> routing;
  at::Tensor router_xa;
};

at::Tensor rows_of(const at::Tensor& tensor, TokenRange range) {
  return tensor.defined() ? tensor.narrow(0, range.begin, range.size()) : tensor;
}

/// use(slot) for every slot of every token that is not filler, in order.
template <class Use>
void each_slot(const TokenInput& input, std::int64_t K, const Use& use) {
  for (std::size_t m = 0; m + 1 < input.micro_batch_start.size(); ++m) {
    const std::int64_t filler = input.filler.empty() ? 0 : input.filler[m];
    const std::int64_t end = input.micro_batch_start[m + 1] - filler;
    for (std::int64_t i = input.micro_batch_start[m] * K; i < end * K; ++i) {
      use(static_cast<std::size_t>(i));
    }
  }
}

/// Appends the rows that each of a layer's experts was given.
template <class A>
void count_rows(const Routing<A>& routing, const TokenInput& input,
                std::vector<std::int64_t>& rows) {
  const std::size_t first = rows.size();
  rows.resize(first + routing.expert_begin.size() - 1);
  each_slot(input, routing.K, [&](std::size_t slot) {
    ++rows[first + static_cast<std::size_t>(routing.expert[slot])];
  });
}

template <class A>
void tell(const RoutingObserver& observer, std::size_t layer, const Routing<A>& routing,
          const TokenInput& input) {
  std::vector<std::int32_t> expert;
  std::vector<double> gate;
  each_slot(input, routing.K, [&](std::size_t slot) {
    expert.push_back(routing.expert[slot]);
    gate.push_back(static_cast<double>(routing.gate[slot]));
  });
  observer(static_cast<int>(layer), expert, gate);
}

template <class S>
class DecoderOf final : public Decoder {
  using A = AccumOf<S>;
  using Layout = TokenLayout<A>;
  using Pass = FrozenWeights::Pass;
  using Lease = FrozenWeights::Lease;

 public:
  explicit DecoderOf(std::unique_ptr<FrozenWeights> weights)
      : weights_(std::move(weights)), spec_(weights_->spec()) {
    context_.workspace = &workspace_;
    context_.weights = weights_.get();
  }
  DecoderOf(const DecoderOf&) = delete;  // context_ holds the address of workspace_
  DecoderOf& operator=(const DecoderOf&) = delete;

  const ModelSpec& spec() const override { return spec_; }
  FrozenWeights& weights() override { return *weights_; }

  void set_adapter(const Adapter* adapter) override {
    context_.adapter = adapter;
    if (adapter == nullptr) return;
    if (pager_ != nullptr) pager_->flush();
    if (pager_ == nullptr) {
      cast_.cast_all(*adapter);
    } else if (cast_.adapter() != adapter) {
      pager_->first_cast(*adapter);
    }
    context_.factors = data<S>(cast_.tensor());
  }
  const Adapter* adapter() const override { return context_.adapter; }
  at::Tensor factors() override { return cast_.tensor(); }
  CastFactors& cast_factors() override { return cast_; }

  void set_pager(FactorPager* pager, const ArenaHome& home) override {
    pager_ = pager;
    context_.adapter = nullptr;
    context_.factors = nullptr;
    cast_.move_to(home);
  }
  void keep_in(const ArenaHome& home) override { workspace_.kept.move_to(home); }

  LossResult forward_backward(const TokenInput& input, const TrainPass& pass,
                              const at::Tensor& gradients) override {
    TAILOR_CHECK(context_.adapter != nullptr && gradients.scalar_type() == kDtype<A> &&
                 gradients.numel() == cast_.tensor().numel());
    context_.gradients = data<A>(gradients);
    context_.dropout = pass.dropout;
    context_.seed = pass.seed;
    context_.step = pass.step;
    TAILOR_CHECK(pass.dropout == 0 || input.token_id.size() == input.ids.size());
    context_.token_id = pass.dropout > 0 ? input.token_id.data() : nullptr;
    const LossResult result = run_training(input, pass);
    context_.gradients = nullptr;
    context_.dropout = 0;
    context_.token_id = nullptr;
    return result;
  }

  LossResult evaluate(const TokenInput& input, bool another_follows) override {
    const Frame kept(workspace_.kept), scratch(workspace_.scratch);
    weights_->begin(Pass::forward, another_follows);
    const at::Tensor x_TD = run_forward(input, nullptr, nullptr);
    return head_loss<S>(*weights_, x_TD, input.target, 0, at::Tensor(), workspace_.scratch);
  }

  Trace trace(const TokenInput& input) override {
    Trace out;
    const Frame kept_frame(workspace_.kept), scratch_frame(workspace_.scratch);
    weights_->begin(Pass::forward, false);
    const at::Tensor x_TD = run_forward(input, &out, nullptr);
    const at::Tensor n_TD = at::empty_like(x_TD);
    ops::rms_norm<S>(x_TD, weights_->final_norm_D(), spec_.norm_eps, n_TD);
    out.hidden_TD.push_back(n_TD);
    out.logits_TV = head_logits<S>(*weights_, x_TD, workspace_.scratch);
    return out;
  }

  void observe_routing(const TokenInput& input, const RoutingObserver& observer,
                       bool another_follows) override {
    const Frame kept(workspace_.kept), scratch(workspace_.scratch);
    weights_->begin(Pass::layers, another_follows);
    run_forward(input, nullptr, &observer);
  }

  std::int64_t pass_bytes_peak() const override {
    return workspace_.kept.bytes_peak() + workspace_.scratch.bytes_peak();
  }

  GenerationState start_generation(std::int64_t positions_max) override {
    GenerationState state;
    for (std::size_t l = 0; l < spec_.layers.size(); ++l) {
      state.kv.push_back(
          at::empty({positions_max, spec_.cache_width()}, at::TensorOptions(kDtype<S>)));
    }
    return state;
  }

  at::Tensor next_logits(GenerationState& state, std::span<const std::int32_t> ids) override {
    const Frame kept_frame(workspace_.kept);
    weights_->begin(Pass::generate, true);
    const at::Tensor x_TD = embed(ids);
    const std::int64_t T = x_TD.size(0);
    TAILOR_CHECK(T > 0 && state.position + T <= state.kv.front().size(0));
    LayerKept<S> kept;
    kept.h_TD = take_kept({T, spec_.hidden});
    for (std::size_t l = 0; l < spec_.layers.size(); ++l) {
      const Frame of_layer(workspace_.kept), scratch(workspace_.scratch);
      const LayerVisit visit(pager_, l, FactorPager::Way::forward);
      Layer<S> layer(spec_, l, context_);
      {
        const Frame of_attention(workspace_.scratch);
        const Lease lease = weights_->attention(layer.index, layer.weights, workspace_.scratch);
        layer.attention->forward_cached(state.position, x_TD, kept.h_TD, {state.kv[l]});
      }
      const TokenRange all{0, T};
      feed_forward(layer, std::span(&all, 1), kept, x_TD, false);
    }
    state.position += T;
    return head_logits<S>(*weights_, x_TD.narrow(0, T - 1, 1), workspace_.scratch)[0];
  }

 private:
  at::Tensor take_kept(at::IntArrayRef shape) { return workspace_.kept.take(shape, kDtype<S>); }

  /// Rows of the embedding, on the stack of what is kept.
  at::Tensor embed(std::span<const std::int32_t> ids) {
    const auto T = static_cast<std::int64_t>(ids.size());
    for (const std::int32_t id : ids) TAILOR_CHECK(id >= 0 && id < spec_.vocab);
    const at::Tensor x_TD = take_kept({T, spec_.hidden});
    weights_->embed(ids, x_TD);
    return x_TD;
  }

  const std::uint64_t* token_ids(TokenRange range) const {
    return context_.token_id == nullptr ? nullptr : context_.token_id + range.begin;
  }

  void attention_forward(Layer<S>& layer, const Layout& layout, const LayerKept<S>& kept) {
    const Frame of_weights(workspace_.scratch);
    const Lease lease = weights_->attention(layer.index, layer.weights, workspace_.scratch);
    attention_micro_batches(layer, layout, kept);
  }

  void attention_micro_batches(const Layer<S>& layer, const Layout& layout,
                               const LayerKept<S>& kept) const {
    for (std::size_t m = 0; m < layout.micro_batches().size(); ++m) {
      const TokenRange range = layout.micro_batches()[m];
      layer.attention->forward(layout, m, rows_of(kept.x_TD, range), rows_of(kept.h_TD, range),
                               kept.attention.rows(range));
    }
  }

  /// out = h + feed-forward(norm(h)): dense and shared parts a micro-batch at a time, routed
  /// experts over all of them. With `keep`, kept.mlp and kept.experts are taken and filled.
  void feed_forward(Layer<S>& layer, std::span<const TokenRange> micro_batches, LayerKept<S>& kept,
                    const at::Tensor& out_TD, bool keep) {
    const Frame frame(workspace_.scratch);
    const at::Tensor n_TD = layer.moe ? context_.scratch(kept.h_TD.sizes()) : at::Tensor();
    mlp_and_router_forward(layer, micro_batches, kept, n_TD, out_TD, keep);
    if (!layer.moe) return;
    layer.router->finish(kept.routing);
    ExpertsKept experts = layer.experts->allocate(kept.routing.rows(), keep,
                                                  keep ? workspace_.kept : workspace_.scratch);
    layer.experts->forward(n_TD, kept.routing, out_TD, experts);
    if (keep) kept.experts = std::move(experts);
  }

  /// All of it but the routed experts, for which n_TD is left behind.
  void mlp_and_router_forward(Layer<S>& layer, std::span<const TokenRange> micro_batches,
                              LayerKept<S>& kept, const at::Tensor& n_TD, const at::Tensor& out_TD,
                              bool keep) {
    const std::int64_t T = kept.h_TD.size(0);
    const Frame of_weights(workspace_.scratch);
    const Lease lease = weights_->feed_forward(layer.index, layer.weights, workspace_.scratch);
    if (keep) kept.mlp = layer.mlp.allocate(T, workspace_.kept);
    if (layer.moe) {
      kept.routing = layer.router->start(T);
      kept.router_xa = layer.router->allocate_kept(T);
    }
    for (const TokenRange range : micro_batches) {
      const Frame of_micro_batch(workspace_.scratch);
      const at::Tensor h = rows_of(kept.h_TD, range);
      const at::Tensor n = layer.moe ? rows_of(n_TD, range) : context_.scratch(h.sizes());
      ops::rms_norm<S>(h, layer.weights.post_norm_D, spec_.norm_eps, n);
      if (layer.moe) {
        layer.router->forward(n, range.begin, kept.routing, rows_of(kept.router_xa, range));
      }
      layer.mlp.forward(n, h, rows_of(out_TD, range),
                        keep ? kept.mlp.rows(range.begin, range.size())
                             : layer.mlp.allocate(range.size(), workspace_.scratch),
                        token_ids(range));
    }
  }

  /// Forward through all layers keeping nothing but, if asked, a trace.
  at::Tensor run_forward(const TokenInput& input, Trace* trace, const RoutingObserver* observer) {
    const Layout layout(spec_, input);
    LayerKept<S> kept;
    kept.x_TD = embed(input.ids);
    kept.h_TD = take_kept(kept.x_TD.sizes());
    for (std::size_t l = 0; l < spec_.layers.size(); ++l) {
      const Frame of_layer(workspace_.kept), scratch(workspace_.scratch);
      const LayerVisit visit(pager_, l, FactorPager::Way::forward);
      Layer<S> layer(spec_, l, context_);
      kept.attention = layer.attention->allocate(layout.tokens(), workspace_.scratch);
      if (trace != nullptr) trace->hidden_TD.push_back(kept.x_TD.clone());
      attention_forward(layer, layout, kept);
      feed_forward(layer, layout.micro_batches(), kept, kept.x_TD, false);
      if (observer != nullptr && layer.moe) tell(*observer, l, kept.routing, input);
      if (trace != nullptr) {
        trace->expert.push_back(layer.moe ? kept.routing.expert : std::vector<std::int32_t>());
        trace->gate.emplace_back();
        if (layer.moe)
          trace->gate.back().assign(kept.routing.gate.begin(), kept.routing.gate.end());
      }
    }
    return kept.x_TD;
  }

  LossResult run_training(const TokenInput& input, const TrainPass& pass) {
    const Layout layout(spec_, input);
    const bool keep = pass.keep == Activations::kept;
    const std::int64_t T = layout.tokens();
    const Frame kept_frame(workspace_.kept), scratch_frame(workspace_.scratch);
    std::vector<LayerKept<S>> kept(spec_.layers.size());
    // Where on the stack of what is kept a layer's input begins, and what it adds itself.
    std::vector<TensorStack::Mark> input_mark(kept.size() + 1), before(kept.size());
    weights_->begin(keep ? Pass::train_kept : Pass::train_recompute, pass.another_follows);
    input_mark[0] = workspace_.kept.mark();
    at::Tensor x_TD = embed(input.ids);
    const at::Tensor h_scratch = keep ? at::Tensor() : context_.scratch(x_TD.sizes());
    for (std::size_t l = 0; l < kept.size(); ++l) {
      before[l] = workspace_.kept.mark();
      const Frame scratch(workspace_.scratch);
      const LayerVisit visit(pager_, l, FactorPager::Way::forward);
      Layer<S> layer(spec_, l, context_);
      LayerKept<S>& mine = kept[l];
      mine.x_TD = x_TD;
      mine.h_TD = keep ? take_kept(x_TD.sizes()) : h_scratch;
      mine.attention = layer.attention->allocate(T, keep ? workspace_.kept : workspace_.scratch);
      attention_forward(layer, layout, mine);
      input_mark[l + 1] = workspace_.kept.mark();
      x_TD = take_kept(x_TD.sizes());
      feed_forward(layer, layout.micro_batches(), mine, x_TD, keep);
      if (pass.expert_rows != nullptr && layer.moe) {
        count_rows(mine.routing, input, *pass.expert_rows);
      }
      if (!keep) mine.attention = {};
      // The last layer is the first on the way back.
      if (l + 1 < kept.size()) workspace_.kept.page_out(input_mark[l], input_mark[l + 1]);
    }
    const at::Tensor dx_TD = context_.scratch(x_TD.sizes());
    LossResult result =
        head_loss<S>(*weights_, x_TD, input.target, pass.gradient_scale, dx_TD, workspace_.scratch);
    for (std::size_t l = kept.size(); l-- > 0;) {
      if (l > 0) workspace_.kept.page_in(input_mark[l - 1], before[l]);
      const Frame scratch(workspace_.scratch);
      const LayerVisit visit(pager_, l, FactorPager::Way::backward);
      Layer<S> layer(spec_, l, context_);
      Lease of_attention;
      if (!keep) {  // phase 1: every micro-batch again, up to the feed-forward part
        kept[l].attention = layer.attention->allocate(T, workspace_.scratch);
        of_attention = weights_->attention(layer.index, layer.weights, workspace_.scratch);
        attention_micro_batches(layer, layout, kept[l]);
      }
      feed_forward_backward(layer, layout.micro_batches(), kept[l], dx_TD, keep);
      if (keep) {
        of_attention = weights_->attention(layer.index, layer.weights, workspace_.scratch);
      }
      for (std::size_t m = 0; m < layout.micro_batches().size(); ++m) {
        const TokenRange range = layout.micro_batches()[m];
        const at::Tensor dx = rows_of(dx_TD, range);
        layer.attention->backward(layout, m, rows_of(kept[l].x_TD, range), dx,
                                  kept[l].attention.rows(range), dx, l != 0);
      }
      kept[l] = {};
      workspace_.kept.release(before[l]);
    }
    return result;
  }

  /// dx_TD enters as the gradient of the layer's output and leaves as that of h.
  void feed_forward_backward(Layer<S>& layer, std::span<const TokenRange> micro_batches,
                             LayerKept<S>& kept, const at::Tensor& dx_TD, bool keep) {
    const Frame frame(workspace_.scratch);
    if (!layer.moe) {
      const Lease lease = weights_->feed_forward(layer.index, layer.weights, workspace_.scratch);
      for (const TokenRange range : micro_batches) {
        const Frame of_micro_batch(workspace_.scratch);
        const at::Tensor h = rows_of(kept.h_TD, range), dx = rows_of(dx_TD, range);
        const at::Tensor n = context_.scratch(h.sizes()), dn = context_.scratch(h.sizes());
        ops::rms_norm<S>(h, layer.weights.post_norm_D, spec_.norm_eps, n);
        mlp_backward(layer, kept, range, n, dx, dn, keep);
        ops::rms_norm_backward<S>(h, layer.weights.post_norm_D, dn, dx, spec_.norm_eps, dx);
      }
      return;
    }
    const at::Tensor n_TD = context_.scratch(kept.h_TD.sizes());
    const at::Tensor dn_TD = context_.scratch(kept.h_TD.sizes());
    // Norm and router are wanted again after the experts; the MLP's weights need not wait for that.
    const at::Tensor post_norm_D = context_.scratch({spec_.hidden});
    const at::Tensor router_ED = context_.scratch({spec_.experts, spec_.hidden});
    {
      const Frame of_weights(workspace_.scratch);
      const Lease lease = weights_->feed_forward(layer.index, layer.weights, workspace_.scratch);
      post_norm_D.copy_(layer.weights.post_norm_D);
      router_ED.copy_(layer.weights.router_ED);
      ops::rms_norm<S>(kept.h_TD, post_norm_D, spec_.norm_eps, n_TD);
      for (const TokenRange range : micro_batches) {
        const Frame of_micro_batch(workspace_.scratch);
        mlp_backward(layer, kept, range, rows_of(n_TD, range), rows_of(dx_TD, range),
                     rows_of(dn_TD, range), keep);
      }
    }
    layer.weights.post_norm_D = post_norm_D;
    layer.weights.router_ED = router_ED;
    const ExpertsKept experts =
        keep ? kept.experts
             : layer.experts->allocate(kept.routing.rows(), false, workspace_.scratch);
    std::vector<A> d_gate;
    layer.experts->backward(n_TD, kept.routing, dx_TD, experts, dn_TD, d_gate);
    for (const TokenRange range : micro_batches) {
      const at::Tensor dx = rows_of(dx_TD, range), dn = rows_of(dn_TD, range);
      layer.router->backward(rows_of(n_TD, range), range.begin, kept.routing, d_gate,
                             rows_of(kept.router_xa, range), dn);
      ops::rms_norm_backward<S>(rows_of(kept.h_TD, range), post_norm_D, dn, dx, spec_.norm_eps, dx);
    }
  }

  /// dn = gradient of n through the MLP, whose activations were kept or are computed again.
  void mlp_backward(const Layer<S>& layer, const LayerKept<S>& kept, TokenRange range,
                    const at::Tensor& n, const at::Tensor& dout, const at::Tensor& dn, bool keep) {
    const Frame of_micro_batch(workspace_.scratch);
    const MlpKept mine = keep ? kept.mlp.rows(range.begin, range.size())
                              : layer.mlp.allocate(range.size(), workspace_.scratch);
    if (!keep) layer.mlp.recompute(n, mine, token_ids(range));
    layer.mlp.backward(n, dout, mine, dn, token_ids(range));
  }

  std::unique_ptr<FrozenWeights> weights_;
  ModelSpec spec_;
  Workspace workspace_;
  PassContext<S> context_;
  CastFactors cast_{kDtype<S>};
  FactorPager* pager_ = nullptr;
};

}  // namespace

std::unique_ptr<Decoder> Decoder::create(std::unique_ptr<FrozenWeights> weights,
                                         at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return std::make_unique<DecoderOf<double>>(std::move(weights));
    case at::kFloat:
      return std::make_unique<DecoderOf<float>>(std::move(weights));
    case at::kBFloat16:
      return std::make_unique<DecoderOf<Bf16>>(std::move(weights));
    default:
      TAILOR_CHECK(false, "dtype of the blocks");
  }
}

}  // namespace tailor
