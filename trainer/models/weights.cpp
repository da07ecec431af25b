#include "trainer/models/weights.h"

#include <array>
#include <string>

#include "base/error.h"

namespace tailor {
namespace {

at::ScalarType to_aten(Dtype dtype, const std::string& where) {
  switch (dtype) {
    case Dtype::f64:
      return at::kDouble;
    case Dtype::f32:
      return at::kFloat;
    case Dtype::f16:
      return at::kHalf;
    case Dtype::bf16:
      return at::kBFloat16;
    default:
      throw Error(Fault::bad_file,
                  {"weights of type " + std::string(dtype_name(dtype)) + " are not supported yet",
                   where, "Use a checkpoint in F32, F16 or BF16."});
  }
}

/// Reads tensors by name in two passes over the same code: the first checks that all are there with
/// the right shapes, the second copies.
class Loader {
 public:
  Loader(const Checkpoint& checkpoint, at::ScalarType dtype, bool check_only)
      : checkpoint_(checkpoint), dtype_(dtype), check_only_(check_only) {}

  at::Tensor allocate(at::IntArrayRef shape) const {
    return check_only_ ? at::Tensor() : at::empty(shape, at::TensorOptions(dtype_));
  }
  at::Tensor load(const std::string& name, at::IntArrayRef shape) const {
    at::Tensor out = allocate(shape);
    load_into(name, shape, out);
    return out;
  }
  /// Checks `name` against `shape` and copies it into `to` (of that shape, any strides).
  void load_into(const std::string& name, at::IntArrayRef shape, const at::Tensor& to) const {
    const auto& found = checkpoint_.find(name, std::span(shape.data(), shape.size()));
    const at::ScalarType stored = to_aten(found.info.dtype, checkpoint_.where(found));
    if (check_only_) return;
    const std::span<const std::byte> bytes = checkpoint_.bytes(found);
    const at::Tensor view = at::from_blob(const_cast<std::byte*>(bytes.data()), shape, stored);
    to.copy_(view);
    checkpoint_.drop(found);
  }
  at::Tensor rows(const at::Tensor& whole, std::int64_t begin, std::int64_t count) const {
    return check_only_ ? at::Tensor() : whole.narrow(0, begin, count);
  }
  bool check_only() const { return check_only_; }
  bool has(const std::string& name) const { return checkpoint_.has(name); }

 private:
  const Checkpoint& checkpoint_;
  at::ScalarType dtype_;
  bool check_only_;
};

void load_gate_up(const Loader& loader, const std::string& base, std::int64_t F, std::int64_t D,
                  LayerWeights& out) {
  out.gate_up_OD = loader.allocate({2 * F, D});
  loader.load_into(base + "gate_proj.weight", {F, D}, loader.rows(out.gate_up_OD, 0, F));
  loader.load_into(base + "up_proj.weight", {F, D}, loader.rows(out.gate_up_OD, F, F));
  out.down_DF = loader.load(base + "down_proj.weight", {D, F});
}

void load_experts(const Loader& loader, const std::string& base, const ModelSpec& spec,
                  LayerWeights& out) {
  const std::int64_t E = spec.experts, D = spec.hidden, F = spec.expert_width;
  if (!loader.has(base + "experts.0.gate_proj.weight")) {
    out.experts_gate_up_EDO = loader.load(base + "experts.gate_up_proj", {E, D, 2 * F});
    out.experts_down_EFD = loader.load(base + "experts.down_proj", {E, F, D});
    return;
  }
  out.experts_gate_up_EDO = loader.allocate({E, D, 2 * F});
  out.experts_down_EFD = loader.allocate({E, F, D});
  for (std::int64_t e = 0; e < E; ++e) {
    const std::string one = base + "experts." + std::to_string(e) + ".";
    at::Tensor gate, up, down;
    if (!loader.check_only()) {
      const at::Tensor gate_up_OD = out.experts_gate_up_EDO[e].t();
      gate = gate_up_OD.narrow(0, 0, F);
      up = gate_up_OD.narrow(0, F, F);
      down = out.experts_down_EFD[e].t();
    }
    loader.load_into(one + "gate_proj.weight", {F, D}, gate);
    loader.load_into(one + "up_proj.weight", {F, D}, up);
    loader.load_into(one + "down_proj.weight", {D, F}, down);
  }
}

ModelWeights load_all(const Loader& loader, const ModelSpec& spec) {
  const std::int64_t D = spec.hidden, Q = spec.query_width(), KV = spec.kv_width();
  ModelWeights out;
  out.embedding_VD = loader.load("model.embed_tokens.weight", {spec.vocab, D});
  // A tied model may or may not carry a copy of the head; an untied one must.
  out.head_VD = spec.tied_head ? out.embedding_VD : loader.load("lm_head.weight", {spec.vocab, D});
  out.norm_D = loader.load("model.norm.weight", {D});
  for (std::size_t l = 0; l < spec.layers.size(); ++l) {
    LayerWeights layer;
    const std::string base = "model.layers." + std::to_string(l) + ".";
    layer.input_norm_D = loader.load(base + "input_layernorm.weight", {D});
    layer.post_norm_D = loader.load(base + "post_attention_layernorm.weight", {D});
    layer.qkv_OD = loader.allocate({Q + 2 * KV, D});
    loader.load_into(base + "self_attn.q_proj.weight", {Q, D}, loader.rows(layer.qkv_OD, 0, Q));
    loader.load_into(base + "self_attn.k_proj.weight", {KV, D}, loader.rows(layer.qkv_OD, Q, KV));
    loader.load_into(base + "self_attn.v_proj.weight", {KV, D},
                     loader.rows(layer.qkv_OD, Q + KV, KV));
    layer.o_DO = loader.load(base + "self_attn.o_proj.weight", {D, Q});
    const std::string mlp = base + (spec.family == Family::llama4 ? "feed_forward." : "mlp.");
    if (spec.layers[l].moe) {
      layer.router_ED = loader.load(mlp + "router.weight", {spec.experts, D});
      load_gate_up(loader, mlp + "shared_expert.", spec.expert_width, D, layer);
      load_experts(loader, mlp, spec, layer);
    } else {
      load_gate_up(loader, mlp, spec.dense_width, D, layer);
    }
    out.layers.push_back(std::move(layer));
  }
  return out;
}

}  // namespace

ModelWeights load_weights(const Checkpoint& checkpoint, const ModelSpec& spec,
                          at::ScalarType dtype) {
  load_all(Loader(checkpoint, dtype, true), spec);
  return load_all(Loader(checkpoint, dtype, false), spec);
}

std::int64_t ModelWeights::bytes() const {
  std::int64_t total = static_cast<std::int64_t>(embedding_VD.nbytes() + norm_D.nbytes());
  if (!head_VD.is_same(embedding_VD)) total += static_cast<std::int64_t>(head_VD.nbytes());
  for (const LayerWeights& layer : layers) {
    for (const at::Tensor* tensor :
         std::array{&layer.input_norm_D, &layer.post_norm_D, &layer.qkv_OD, &layer.o_DO,
                    &layer.gate_up_OD, &layer.down_DF, &layer.router_ED, &layer.experts_gate_up_EDO,
                    &layer.experts_down_EFD}) {
      if (tensor->defined()) total += static_cast<std::int64_t>(tensor->nbytes());
    }
  }
  return total;
}

}  // namespace tailor
