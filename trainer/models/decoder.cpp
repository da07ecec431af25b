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
  Layer(const ModelSpec& spec, std::size_t index, const LayerWeights& layer_weights,
        const PassContext<S>& context)
      : weights(layer_weights),
        moe(spec.layers[index].moe),
        attention(spec, static_cast<int>(index), layer_weights, context),
        mlp(moe ? Mlp<S>::Kind::shared_expert : Mlp<S>::Kind::dense, static_cast<int>(index),
            layer_weights, context) {
    if (!moe) return;
    router.emplace(spec, static_cast<int>(index), layer_weights, context);
    experts.emplace(spec, static_cast<int>(index), layer_weights, context);
  }
  const LayerWeights& weights;
  bool moe;
  Attention<S> attention;
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

template <class S>
class DecoderOf final : public Decoder {
  using A = AccumOf<S>;
  using Layout = TokenLayout<A>;

 public:
  DecoderOf(ModelSpec spec, ModelWeights weights)
      : spec_(std::move(spec)), weights_(std::move(weights)) {
    context_.workspace = &workspace_;
  }
  DecoderOf(const DecoderOf&) = delete;  // context_ holds the address of workspace_
  DecoderOf& operator=(const DecoderOf&) = delete;

  const ModelSpec& spec() const override { return spec_; }
  const ModelWeights& weights() const override { return weights_; }

  void set_adapter(const Adapter* adapter) override {
    context_.adapter = adapter;
    if (adapter == nullptr) return;
    const std::span<const float> factors = adapter->factors();
    const at::Tensor source =
        at::from_blob(const_cast<float*>(factors.data()), {adapter->parameter_count()}, at::kFloat);
    if (!factors_.defined() || factors_.numel() != source.numel()) {
      factors_ = at::empty({source.numel()}, at::TensorOptions(kDtype<S>));
    }
    factors_.copy_(source);
    context_.factors = data<S>(factors_);
  }
  at::Tensor factors() override { return factors_; }

  LossResult forward_backward(const TokenInput& input, const TrainPass& pass,
                              const at::Tensor& gradients) override {
    TAILOR_CHECK(context_.adapter != nullptr && gradients.scalar_type() == kDtype<A> &&
                 gradients.numel() == factors_.numel());
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

  LossResult evaluate(const TokenInput& input) override {
    const Frame kept(workspace_.kept), scratch(workspace_.scratch);
    const at::Tensor x_TD = run_forward(Layout(spec_, input), input.ids, nullptr);
    return head_loss<S>(weights_, spec_.norm_eps, x_TD, input.target, 0, at::Tensor(),
                        workspace_.scratch);
  }

  Trace trace(const TokenInput& input) override {
    Trace out;
    const Frame kept_frame(workspace_.kept), scratch_frame(workspace_.scratch);
    const at::Tensor x_TD = run_forward(Layout(spec_, input), input.ids, &out);
    const at::Tensor n_TD = at::empty_like(x_TD);
    ops::rms_norm<S>(x_TD, weights_.norm_D, spec_.norm_eps, n_TD);
    out.hidden_TD.push_back(n_TD);
    out.logits_TV = head_logits<S>(weights_, spec_.norm_eps, x_TD);
    return out;
  }

  std::int64_t pass_bytes_peak() const override {
    return workspace_.kept.bytes_peak() + workspace_.scratch.bytes_peak();
  }

  GenerationState start_generation(std::int64_t positions_max) override {
    GenerationState state;
    for (std::size_t l = 0; l < spec_.layers.size(); ++l) {
      state.kv.push_back(
          at::empty({positions_max, 2 * spec_.kv_width()}, at::TensorOptions(kDtype<S>)));
    }
    return state;
  }

  at::Tensor next_logits(GenerationState& state, std::span<const std::int32_t> ids) override {
    const Frame kept_frame(workspace_.kept);
    const at::Tensor x_TD = embed(ids);
    const std::int64_t T = x_TD.size(0);
    TAILOR_CHECK(T > 0 && state.position + T <= state.kv.front().size(0));
    LayerKept<S> kept;
    kept.h_TD = take_kept({T, spec_.hidden});
    for (std::size_t l = 0; l < spec_.layers.size(); ++l) {
      const Frame of_layer(workspace_.kept), scratch(workspace_.scratch);
      const Layer<S> layer(spec_, l, weights_.layers[l], context_);
      layer.attention.forward_cached(state.position, x_TD, kept.h_TD, {state.kv[l]});
      const TokenRange all{0, T};
      feed_forward(layer, std::span(&all, 1), kept, x_TD, false);
    }
    state.position += T;
    return head_logits<S>(weights_, spec_.norm_eps, x_TD.narrow(0, T - 1, 1))[0];
  }

 private:
  at::Tensor take_kept(at::IntArrayRef shape) { return workspace_.kept.take(shape, kDtype<S>); }

  /// Rows of the embedding, on the stack of what is kept.
  at::Tensor embed(std::span<const std::int32_t> ids) {
    const auto T = static_cast<std::int64_t>(ids.size());
    for (const std::int32_t id : ids) TAILOR_CHECK(id >= 0 && id < spec_.vocab);
    const at::Tensor x_TD = take_kept({T, spec_.hidden});
    at::parallel_for(0, T, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      kernels<S>().gather_rows(begin, end, spec_.hidden, data<S>(weights_.embedding_VD), ids.data(),
                               nullptr, data<S>(x_TD));
    });
    return x_TD;
  }

  const std::uint64_t* token_ids(TokenRange range) const {
    return context_.token_id == nullptr ? nullptr : context_.token_id + range.begin;
  }

  at::Tensor norm_after_attention(const Layer<S>& layer, const at::Tensor& h_TD) const {
    const at::Tensor n_TD = context_.scratch(h_TD.sizes());
    ops::rms_norm<S>(h_TD, layer.weights.post_norm_D, spec_.norm_eps, n_TD);
    return n_TD;
  }

  void attention_forward(const Layer<S>& layer, const Layout& layout,
                         const LayerKept<S>& kept) const {
    for (std::size_t m = 0; m < layout.micro_batches().size(); ++m) {
      const TokenRange range = layout.micro_batches()[m];
      layer.attention.forward(layout, m, rows_of(kept.x_TD, range), rows_of(kept.h_TD, range),
                              kept.attention.rows(range));
    }
  }

  /// out = h + feed-forward(norm(h)): dense and shared parts a micro-batch at a time, routed
  /// experts over all of them. With `keep`, kept.mlp and kept.experts are taken and filled.
  void feed_forward(const Layer<S>& layer, std::span<const TokenRange> micro_batches,
                    LayerKept<S>& kept, const at::Tensor& out_TD, bool keep) {
    const std::int64_t T = kept.h_TD.size(0);
    const Frame frame(workspace_.scratch);
    if (keep) kept.mlp = layer.mlp.allocate(T, workspace_.kept);
    const auto mlp_kept = [&](TokenRange range) {
      return keep ? kept.mlp.rows(range.begin, range.size())
                  : layer.mlp.allocate(range.size(), workspace_.scratch);
    };
    if (!layer.moe) {
      for (const TokenRange range : micro_batches) {
        const Frame of_micro_batch(workspace_.scratch);
        const at::Tensor h = rows_of(kept.h_TD, range);
        layer.mlp.forward(norm_after_attention(layer, h), h, rows_of(out_TD, range),
                          mlp_kept(range), token_ids(range));
      }
      return;
    }
    kept.routing = layer.router->start(T);
    kept.router_xa = layer.router->allocate_kept(T);
    const at::Tensor n_TD = context_.scratch(kept.h_TD.sizes());
    for (const TokenRange range : micro_batches) {
      const Frame of_micro_batch(workspace_.scratch);
      const at::Tensor h = rows_of(kept.h_TD, range), n = rows_of(n_TD, range);
      ops::rms_norm<S>(h, layer.weights.post_norm_D, spec_.norm_eps, n);
      layer.router->forward(n, range.begin, kept.routing, rows_of(kept.router_xa, range));
      layer.mlp.forward(n, h, rows_of(out_TD, range), mlp_kept(range), token_ids(range));
    }
    layer.router->finish(kept.routing);
    ExpertsKept experts = layer.experts->allocate(kept.routing.rows(), keep,
                                                  keep ? workspace_.kept : workspace_.scratch);
    layer.experts->forward(n_TD, kept.routing, out_TD, experts);
    if (keep) kept.experts = std::move(experts);
  }

  /// Forward through all layers keeping nothing but, if asked, a trace.
  at::Tensor run_forward(const Layout& layout, std::span<const std::int32_t> ids, Trace* trace) {
    LayerKept<S> kept;
    kept.x_TD = embed(ids);
    kept.h_TD = take_kept(kept.x_TD.sizes());
    for (std::size_t l = 0; l < spec_.layers.size(); ++l) {
      const Frame of_layer(workspace_.kept), scratch(workspace_.scratch);
      const Layer<S> layer(spec_, l, weights_.layers[l], context_);
      kept.attention = layer.attention.allocate(layout.tokens(), workspace_.scratch);
      if (trace != nullptr) trace->hidden_TD.push_back(kept.x_TD.clone());
      attention_forward(layer, layout, kept);
      feed_forward(layer, layout.micro_batches(), kept, kept.x_TD, false);
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
    std::vector<TensorStack::Mark> before(kept.size());  // where a layer's kept tensors begin
    at::Tensor x_TD = embed(input.ids);
    const at::Tensor h_scratch = keep ? at::Tensor() : context_.scratch(x_TD.sizes());
    for (std::size_t l = 0; l < kept.size(); ++l) {
      before[l] = workspace_.kept.mark();
      const Frame scratch(workspace_.scratch);
      const Layer<S> layer(spec_, l, weights_.layers[l], context_);
      LayerKept<S>& mine = kept[l];
      mine.x_TD = x_TD;
      mine.h_TD = keep ? take_kept(x_TD.sizes()) : h_scratch;
      mine.attention = layer.attention.allocate(T, keep ? workspace_.kept : workspace_.scratch);
      attention_forward(layer, layout, mine);
      x_TD = take_kept(x_TD.sizes());
      feed_forward(layer, layout.micro_batches(), mine, x_TD, keep);
      if (!keep) mine.attention = {};
    }
    const at::Tensor dx_TD = context_.scratch(x_TD.sizes());
    LossResult result = head_loss<S>(weights_, spec_.norm_eps, x_TD, input.target,
                                     pass.gradient_scale, dx_TD, workspace_.scratch);
    for (std::size_t l = kept.size(); l-- > 0;) {
      const Frame scratch(workspace_.scratch);
      const Layer<S> layer(spec_, l, weights_.layers[l], context_);
      LayerKept<S>& mine = kept[l];
      if (!keep) {  // phase 1: every micro-batch again, up to the feed-forward part
        mine.attention = layer.attention.allocate(T, workspace_.scratch);
        attention_forward(layer, layout, mine);
      }
      feed_forward_backward(layer, layout.micro_batches(), mine, dx_TD, keep);
      for (std::size_t m = 0; m < layout.micro_batches().size(); ++m) {
        const TokenRange range = layout.micro_batches()[m];
        const at::Tensor dx = rows_of(dx_TD, range);
        layer.attention.backward(layout, m, rows_of(mine.x_TD, range), dx,
                                 mine.attention.rows(range), dx, l != 0);
      }
      mine = {};
      workspace_.kept.release(before[l]);
    }
    return result;
  }

  /// dx_TD enters as the gradient of the layer's output and leaves as that of h.
  void feed_forward_backward(const Layer<S>& layer, std::span<const TokenRange> micro_batches,
                             LayerKept<S>& kept, const at::Tensor& dx_TD, bool keep) {
    const Frame frame(workspace_.scratch);
    const auto mlp_backward = [&](const at::Tensor& n, TokenRange range, const at::Tensor& dn) {
      const Frame of_micro_batch(workspace_.scratch);
      const MlpKept mine = keep ? kept.mlp.rows(range.begin, range.size())
                                : layer.mlp.allocate(range.size(), workspace_.scratch);
      if (!keep) layer.mlp.recompute(n, mine, token_ids(range));
      layer.mlp.backward(n, rows_of(dx_TD, range), mine, dn, token_ids(range));
    };
    if (!layer.moe) {
      for (const TokenRange range : micro_batches) {
        const Frame of_micro_batch(workspace_.scratch);
        const at::Tensor h = rows_of(kept.h_TD, range), dx = rows_of(dx_TD, range);
        const at::Tensor n = norm_after_attention(layer, h), dn = context_.scratch(n.sizes());
        mlp_backward(n, range, dn);
        ops::rms_norm_backward<S>(h, layer.weights.post_norm_D, dn, dx, spec_.norm_eps, dx);
      }
      return;
    }
    const at::Tensor n_TD = norm_after_attention(layer, kept.h_TD);
    const at::Tensor dn_TD = context_.scratch(n_TD.sizes());
    for (const TokenRange range : micro_batches) {
      mlp_backward(rows_of(n_TD, range), range, rows_of(dn_TD, range));
    }
    const ExpertsKept experts =
        keep ? kept.experts
             : layer.experts->allocate(kept.routing.rows(), false, workspace_.scratch);
    std::vector<A> d_gate;
    layer.experts->backward(n_TD, kept.routing, dx_TD, experts, dn_TD, d_gate);
    for (const TokenRange range : micro_batches) {
      const at::Tensor dx = rows_of(dx_TD, range), dn = rows_of(dn_TD, range);
      layer.router->backward(rows_of(n_TD, range), range.begin, kept.routing, d_gate,
                             rows_of(kept.router_xa, range), dn);
      ops::rms_norm_backward<S>(rows_of(kept.h_TD, range), layer.weights.post_norm_D, dn, dx,
                                spec_.norm_eps, dx);
    }
  }

  ModelSpec spec_;
  ModelWeights weights_;
  Workspace workspace_;
  PassContext<S> context_;
  at::Tensor factors_;
};

}  // namespace

std::unique_ptr<Decoder> Decoder::create(ModelSpec spec, ModelWeights weights,
                                         at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return std::make_unique<DecoderOf<double>>(std::move(spec), std::move(weights));
    case at::kFloat:
      return std::make_unique<DecoderOf<float>>(std::move(spec), std::move(weights));
    case at::kBFloat16:
      return std::make_unique<DecoderOf<Bf16>>(std::move(spec), std::move(weights));
    default:
      TAILOR_CHECK(false, "dtype of the blocks");
  }
}

}  // namespace tailor
