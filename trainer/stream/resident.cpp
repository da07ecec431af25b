#include "base/error.h"
#include "data/store/layout.h"
#include "trainer/ops.h"
#include "trainer/stream/frozen_weights.h"

namespace tailor {
namespace {

class ResidentWeights final : public FrozenWeights {
 public:
  ResidentWeights(const ModelSpec& spec, ModelWeights weights)
      : spec_(spec), weights_(std::move(weights)), run_rows_(vocabulary_run_rows(spec)) {}

  const ModelSpec& spec() const override { return spec_; }
  void begin(Pass, bool) override {}

  Lease attention(std::int64_t layer, LayerWeights& out, TensorStack&) override {
    const LayerWeights& from = of(layer);
    out.input_norm_D = from.input_norm_D;
    out.qkv_OD = from.qkv_OD;
    out.qkv_bias_O = from.qkv_bias_O;
    out.q_a_norm = from.q_a_norm;
    out.q_b_OR = from.q_b_OR;
    out.kv_a_norm = from.kv_a_norm;
    out.kv_b_OR = from.kv_b_OR;
    out.o_DO = from.o_DO;
    return {};
  }
  Lease feed_forward(std::int64_t layer, LayerWeights& out, TensorStack&) override {
    const LayerWeights& from = of(layer);
    out.post_norm_D = from.post_norm_D;
    out.router_ED = from.router_ED;
    out.router_bias_E = from.router_bias_E;
    out.gate_up_OD = from.gate_up_OD;
    out.down_DF = from.down_DF;
    return {};
  }
  std::int64_t expert_tiles() const override { return 1; }
  ExpertTile experts(std::int64_t layer, std::int64_t) override {
    return {{}, layer, 0, spec_.experts};
  }
  ExpertWeights expert(const ExpertTile& tile, std::int64_t expert, std::int64_t,
                       TensorStack&) override {
    const LayerWeights& from = of(tile.layer);
    return {{from.experts_gate_up_EDO[expert]}, {from.experts_down_EFD[expert]}};
  }
  at::Tensor final_norm_D() override { return weights_.norm_D; }
  std::int64_t head_runs() const override { return (spec_.vocab + run_rows_ - 1) / run_rows_; }
  HeadRun head(std::int64_t run, TensorStack&) override {
    const std::int64_t first = run * run_rows_, rows = std::min(run_rows_, spec_.vocab - first);
    return {{}, weights_.head_VD.narrow(0, first, rows), first};
  }
  void embed(std::span<const std::int32_t> ids, const at::Tensor& out_TD) override {
    const std::size_t row =
        static_cast<std::size_t>(spec_.hidden) * weights_.embedding_VD.itemsize();
    const auto* from = static_cast<const std::byte*>(weights_.embedding_VD.data_ptr());
    auto* to = static_cast<std::byte*>(out_TD.data_ptr());
    at::parallel_for(
        0, static_cast<std::int64_t>(ids.size()), kRowsPerTask,
        [&](std::int64_t begin, std::int64_t end) {
          for (auto t = static_cast<std::size_t>(begin); t < static_cast<std::size_t>(end); ++t) {
            std::memcpy(to + t * row, from + static_cast<std::size_t>(ids[t]) * row, row);
          }
        });
  }
  std::int64_t memory_bytes() const override { return weights_.bytes(); }

 private:
  const LayerWeights& of(std::int64_t layer) const {
    return weights_.layers[static_cast<std::size_t>(layer)];
  }
  ModelSpec spec_;
  ModelWeights weights_;
  std::int64_t run_rows_;
};

}  // namespace

std::unique_ptr<FrozenWeights> resident_weights(const ModelSpec& spec, ModelWeights weights) {
  return std::make_unique<ResidentWeights>(spec, std::move(weights));
}

}  // namespace tailor
