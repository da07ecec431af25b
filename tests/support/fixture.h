#pragma once

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "adapters/peft_files.h"
#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/model_spec.h"
#include "data/checkpoint/safetensors.h"
#include "trainer/models/decoder.h"

namespace tailor::testing_support {

inline fs::path golden(const std::string& name) {
  return fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name;
}

inline at::ScalarType aten_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return at::kDouble;
    case Dtype::f32:
      return at::kFloat;
    case Dtype::bf16:
      return at::kBFloat16;
    case Dtype::i64:
      return at::kLong;
    case Dtype::i32:
      return at::kInt;
    default:
      throw std::runtime_error("type of a fixture");
  }
}

/// All tensors of a safetensors file.
inline std::map<std::string, at::Tensor> load_tensors(const fs::path& path) {
  const MappedFile file(path);
  std::map<std::string, at::Tensor> out;
  for (const auto& [name, info] : parse_safetensors_header(file.bytes(), path).tensors) {
    auto* from = const_cast<std::byte*>(file.bytes().data()) + info.offset;
    out[name] = at::from_blob(from, info.shape, aten_type(info.dtype)).clone();
  }
  return out;
}

/// Owns what a TokenInput points into.
struct Tokens {
  std::vector<std::int32_t> ids, position, target, document_start, micro_batch_start;
  std::vector<std::uint64_t> token_id;
  std::vector<std::int64_t>
      kept;  ///< flat index (row * width + column) of each token in the fixture
  std::int64_t trained = 0;

  TokenInput input() const {
    return {ids, position, target, document_start, micro_batch_start, token_id};
  }
  /// A document; labels as in Hugging Face (unshifted, -100 no loss).
  void add_document(const std::vector<std::int32_t>& document,
                    const std::vector<std::int64_t>& labels) {
    if (document_start.empty()) document_start.push_back(0);
    for (std::size_t i = 0; i < document.size(); ++i) {
      ids.push_back(document[i]);
      position.push_back(static_cast<std::int32_t>(i));
      const bool trains = i + 1 < document.size() && labels[i + 1] != -100;
      target.push_back(trains ? static_cast<std::int32_t>(labels[i + 1]) : -1);
      trained += trains ? 1 : 0;
      token_id.push_back((static_cast<std::uint64_t>(document_start.size() - 1) << 32U) | i);
    }
    document_start.push_back(static_cast<std::int32_t>(ids.size()));
  }
  void end_micro_batch() {
    if (micro_batch_start.empty()) micro_batch_start.push_back(0);
    micro_batch_start.push_back(static_cast<std::int32_t>(ids.size()));
  }
};

/// Batches `which` of a fixture's batches.safetensors, one micro-batch each, padding left out.
inline Tokens fixture_tokens(const fs::path& folder, const std::vector<std::int64_t>& which) {
  auto tensors = load_tensors(folder / "batches.safetensors");
  Tokens out;
  for (const std::int64_t batch : which) {
    const at::Tensor ids = tensors.at("input_ids")[batch], labels = tensors.at("labels")[batch];
    const at::Tensor mask = tensors.at("attention_mask")[batch];
    for (std::int64_t row = 0; row < ids.size(0); ++row) {
      std::vector<std::int32_t> document;
      std::vector<std::int64_t> document_labels;
      for (std::int64_t t = 0; t < ids.size(1); ++t) {
        if (mask[row][t].item<std::int64_t>() == 0) continue;
        document.push_back(static_cast<std::int32_t>(ids[row][t].item<std::int64_t>()));
        document_labels.push_back(labels[row][t].item<std::int64_t>());
        out.kept.push_back(row * ids.size(1) + t);
      }
      out.add_document(document, document_labels);
    }
    out.end_micro_batch();
  }
  return out;
}

struct TinyModel {
  ModelSpec spec;
  std::unique_ptr<Decoder> decoder;
};

inline TinyModel load_tiny(const fs::path& model_folder, at::ScalarType dtype) {
  const ModelSpec spec = read_model_spec(model_folder);
  const Checkpoint checkpoint = Checkpoint::open(model_folder);
  return {spec,
          Decoder::create(resident_weights(spec, load_weights(checkpoint, spec, dtype)), dtype)};
}

inline double relative_norm(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor a = got.to(at::kDouble), b = want.to(at::kDouble);
  return (a - b).norm().item<double>() / std::max(1e-12, b.norm().item<double>());
}

}  // namespace tailor::testing_support
