#include "tools/compute/resident_copy.h"

#include <utility>
#include <vector>

namespace tailor {

std::unique_ptr<FrozenWeights> resident_copy(StoreWeights& from, at::ScalarType dtype) {
  const ModelSpec& spec = from.spec();
  const at::TensorOptions options(dtype);
  constexpr std::int64_t kManyRows = std::int64_t{1} << 30;  // never multiplied as stored
  TensorStack scratch;
  ModelWeights out;
  from.begin(FrozenWeights::Pass::forward, false);
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    LayerWeights layer;
    const auto keep = [&](std::initializer_list<at::Tensor LayerWeights::*> parts) {
      for (at::Tensor LayerWeights::*part : parts) {
        if ((layer.*part).defined()) layer.*part = (layer.*part).clone();
      }
    };
    {
      const Frame frame(scratch);
      const auto lease = from.attention(l, layer, scratch);
      keep({&LayerWeights::input_norm_D, &LayerWeights::qkv_OD, &LayerWeights::qkv_bias_O,
            &LayerWeights::o_DO, &LayerWeights::q_a_norm, &LayerWeights::q_b_OR,
            &LayerWeights::kv_a_norm, &LayerWeights::kv_b_OR});
    }
    {
      const Frame frame(scratch);
      const auto lease = from.feed_forward(l, layer, scratch);
      keep({&LayerWeights::post_norm_D, &LayerWeights::router_ED, &LayerWeights::router_bias_E,
            &LayerWeights::gate_up_OD, &LayerWeights::down_DF});
    }
    if (spec.layers[static_cast<std::size_t>(l)].moe) {
      const std::int64_t E = spec.experts, D = spec.hidden, F = spec.expert_width;
      layer.experts_gate_up_EDO = at::empty({E, D, 2 * F}, options);
      layer.experts_down_EFD = at::empty({E, F, D}, options);
      for (std::int64_t t = 0; t < from.expert_tiles(); ++t) {
        const FrozenWeights::ExpertTile tile = from.experts(l, t);
        for (std::int64_t e = tile.first; e < tile.first + tile.count; ++e) {
          const Frame frame(scratch);
          const ExpertWeights expert = from.expert(tile, e, kManyRows, scratch);
          layer.experts_gate_up_EDO[e].copy_(expert.gate_up_DO.w_KN);
          layer.experts_down_EFD[e].copy_(expert.down_FD.w_KN);
        }
      }
    }
    out.layers.push_back(std::move(layer));
  }
  out.head_VD = at::empty({spec.vocab, spec.hidden}, options);
  for (std::int64_t r = 0; r < from.head_runs(); ++r) {
    const Frame frame(scratch);
    const FrozenWeights::HeadRun run = from.head(r, scratch);
    out.head_VD.narrow(0, run.first, run.w_VD.size(0)).copy_(run.w_VD);
  }
  out.norm_D = from.final_norm_D().clone();
  out.embedding_VD = out.head_VD;
  if (!spec.tied_head) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(spec.vocab));
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i);
    out.embedding_VD = at::empty({spec.vocab, spec.hidden}, options);
    from.embed(ids, out.embedding_VD);
  }
  return resident_weights(spec, std::move(out));
}

}  // namespace tailor
