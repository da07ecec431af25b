#include "trainer/models/weights.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <string>

#include "base/error.h"
#include "data/checkpoint/published.h"
#include "data/store/source.h"

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
      throw Error(
          Fault::bad_file,
          {"weights of type " + std::string(dtype_name(dtype)) + " are not supported", where,
           "Use a checkpoint in F32, F16, BF16, fp8 (F8_E4M3 with scales) or INT4 "
           "(compressed-tensors, pack-quantized)."});
  }
}

constexpr std::int64_t kRowsAtOnce = 512;  // whole blocks of fp8

/// Reads tensors by name in two passes over the same code: the first checks that all are there with
/// the right shapes, the second copies.
class Loader {
 public:
  Loader(const Checkpoint& checkpoint, SourceReader& quantised, at::ScalarType dtype,
         bool check_only)
      : checkpoint_(checkpoint), quantised_(quantised), dtype_(dtype), check_only_(check_only) {}

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
  /// A matrix in whatever form it is published, into `to` [rows, columns] or, of a vector,
  /// [columns], of any strides.
  void load_matrix(const PublishedMatrix& matrix, const at::Tensor& to) const {
    if (is_quantised(matrix)) return decode(matrix, to);
    TAILOR_CHECK(!matrix.fused);
    if (matrix.is_vector()) return load_into(matrix.name, {matrix.columns}, to);
    load_into(matrix.name, {matrix.rows, matrix.columns}, to);
  }
  /// fp8 or INT4: codes and scales.
  bool is_quantised(const PublishedMatrix& matrix) const {
    if (checkpoint_.has(module_of(matrix.name) + ".weight_packed")) return true;
    return checkpoint_.has(matrix.name) &&
           checkpoint_.find(matrix.name).info.dtype == Dtype::f8_e4m3;
  }
  at::Tensor rows(const at::Tensor& whole, std::int64_t begin, std::int64_t count) const {
    return check_only_ ? at::Tensor() : whole.narrow(0, begin, count);
  }
  bool check_only() const { return check_only_; }
  Loader as(at::ScalarType dtype) const { return {checkpoint_, quantised_, dtype, check_only_}; }
  bool has(const std::string& name) const { return checkpoint_.has(name); }

 private:
  void decode(const PublishedMatrix& matrix, const at::Tensor& to) const {
    const SourceMatrix source = find_source(checkpoint_, matrix);
    if (check_only_) return;
    for (std::int64_t begin = 0; begin < matrix.rows; begin += kRowsAtOnce) {
      const std::int64_t rows = std::min(kRowsAtOnce, matrix.rows - begin);
      const at::Tensor values = at::empty({rows, matrix.columns}, at::kFloat);
      quantised_.read_rows(matrix, begin, begin + rows, values.data_ptr<float>());
      const float* first = values.data_ptr<float>();
      const float* bad = std::find_if_not(first, first + values.numel(),
                                          [](float value) { return std::isfinite(value); });
      if (const std::int64_t at = bad - first; at < values.numel()) {
        throw Error(Fault::bad_file,
                    {"a weight is infinite or not a number",
                     checkpoint_.where(*source.codes) +
                         (matrix.fused ? ", expert " + std::to_string(matrix.expert) + ", " +
                                             role_name(matrix.role)
                                       : std::string()) +
                         ", row " + std::to_string(begin + at / matrix.columns) + ", column " +
                         std::to_string(at % matrix.columns),
                     "The checkpoint is damaged or its training diverged. Download it again, and "
                     "check it with the program that wrote it."});
      }
      to.narrow(0, begin, rows).copy_(values);
    }
  }

  const Checkpoint& checkpoint_;
  SourceReader& quantised_;
  at::ScalarType dtype_;
  bool check_only_;
};

/// Matrices of one input, stacked: rows of `whole` one after the other.
at::Tensor load_stacked(const Loader& loader, std::span<const PublishedMatrix> matrices) {
  std::int64_t rows = 0;
  for (const PublishedMatrix& matrix : matrices) rows += matrix.rows;
  const at::Tensor whole = loader.allocate({rows, matrices[0].columns});
  std::int64_t at = 0;
  for (const PublishedMatrix& matrix : matrices) {
    loader.load_matrix(matrix, loader.rows(whole, at, matrix.rows));
    at += matrix.rows;
  }
  return whole;
}

at::Tensor load_one(const Loader& loader, const PublishedMatrix& matrix) {
  if (matrix.is_vector()) return loader.load(matrix.name, {matrix.columns});
  const at::Tensor out = loader.allocate({matrix.rows, matrix.columns});
  loader.load_matrix(matrix, out);
  return out;
}

void load_experts(const Loader& loader, const ModelSpec& spec, std::int64_t layer,
                  LayerWeights& out) {
  const std::int64_t E = spec.experts, D = spec.hidden, F = spec.expert_width;
  const PublishedMatrix first = expert_matrices(spec, layer, 0, false)[0];
  const bool all_in_one =
      !loader.has(first.name) && !loader.has(module_of(first.name) + ".weight_packed");
  const auto of_first = expert_matrices(spec, layer, 0, all_in_one);
  if (all_in_one && !loader.is_quantised(of_first[0])) {
    const auto turned = [&](const PublishedMatrix& matrix) {
      const at::Tensor whole = loader.load(matrix.name, matrix.tensor_shape(E));
      return matrix.outputs_first && whole.defined() ? whole.transpose(1, 2) : whole;
    };
    out.experts_gate_up_EDO = turned(of_first[0]);
    out.experts_down_EFD = turned(of_first[2]);
    return;
  }
  out.experts_gate_up_EDO = loader.allocate({E, D, 2 * F});
  out.experts_down_EFD = loader.allocate({E, F, D});
  for (std::int64_t e = 0; e < E; ++e) {
    const auto one = expert_matrices(spec, layer, e, all_in_one);
    at::Tensor gate, up, down;
    if (!loader.check_only()) {
      const at::Tensor gate_up_OD = out.experts_gate_up_EDO[e].t();
      gate = gate_up_OD.narrow(0, 0, F);
      up = gate_up_OD.narrow(0, F, F);
      down = out.experts_down_EFD[e].t();
    }
    loader.load_matrix(one[0], gate);
    loader.load_matrix(one[1], up);
    loader.load_matrix(one[2], down);
  }
}

ModelWeights load_all(const Loader& loader, const ModelSpec& spec) {
  ModelWeights out;
  out.embedding_VD = load_one(loader, embedding_matrix(spec));
  // A tied model may or may not carry a copy of the head; an untied one must.
  out.head_VD = spec.tied_head ? out.embedding_VD : load_one(loader, head_matrix(spec));
  out.norm_D = load_one(loader, final_norm_matrix(spec));
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    LayerWeights layer;
    const auto place = [&](const auto& matrices, const auto& place_part) {
      place_part(
          matrices.size(), [&](std::size_t i) { return matrices[i].role; },
          [&](std::size_t i, std::size_t n) {
            return load_stacked(loader, std::span(matrices).subspan(i, n));
          },
          [&](std::size_t i, bool wide) {
            return load_one(wide ? loader.as(at::kFloat) : loader, matrices[i]);
          },
          layer);
    };
    place(attention_matrices(spec, l), [](auto&&... parts) { place_attention(parts...); });
    place(feed_forward_matrices(spec, l), [](auto&&... parts) { place_feed_forward(parts...); });
    if (spec.layers[static_cast<std::size_t>(l)].moe) load_experts(loader, spec, l, layer);
    out.layers.push_back(std::move(layer));
  }
  return out;
}

}  // namespace

ModelWeights load_weights(const Checkpoint& checkpoint, const ModelSpec& spec,
                          at::ScalarType dtype) {
  SourceReader quantised(checkpoint);
  load_all(Loader(checkpoint, quantised, dtype, true), spec);
  return load_all(Loader(checkpoint, quantised, dtype, false), spec);
}

std::int64_t ModelWeights::bytes() const {
  std::int64_t total = static_cast<std::int64_t>(embedding_VD.nbytes() + norm_D.nbytes());
  if (!head_VD.is_same(embedding_VD)) total += static_cast<std::int64_t>(head_VD.nbytes());
  for (const LayerWeights& layer : layers) {
    for (const at::Tensor* tensor :
         std::array{&layer.input_norm_D, &layer.post_norm_D, &layer.qkv_OD, &layer.o_DO,
                    &layer.q_a_norm, &layer.q_b_OR, &layer.kv_a_norm, &layer.kv_b_OR,
                    &layer.qkv_bias_O, &layer.router_bias_E, &layer.gate_up_OD, &layer.down_DF,
                    &layer.router_ED, &layer.experts_gate_up_EDO, &layer.experts_down_EFD}) {
      if (tensor->defined()) total += static_cast<std::int64_t>(tensor->nbytes());
    }
  }
  return total;
}

}  // namespace tailor
