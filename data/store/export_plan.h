#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/json.h"
#include "data/checkpoint/dtype.h"
#include "data/checkpoint/published.h"
#include "data/store/export_config.h"
#include "data/store/export_towers.h"
#include "data/store/store.h"

namespace tailor {

/// A tensor of the checkpoint that a store becomes.
struct ExportTensor {
  std::string name;
  Dtype dtype;
  std::vector<std::int64_t> shape;
  std::int64_t bytes = 0;
  std::size_t shard = 0;
  std::int64_t offset = 0;  ///< from the start of the shard's file
};

struct ExportShard {
  std::string name;        ///< "model-00001-of-00041.safetensors"
  std::string header;      ///< its first bytes: length and JSON, padded to a multiple of 8
  std::int64_t bytes = 0;  ///< of the file
};

enum class ExportForm {
  plain,     ///< f32 or bf16 as stored: `weight`
  bfloat16,  ///< decoded: `weight`
  packed,    ///< int4 as stored: `weight_packed`, `weight_scale`, `weight_shape`
  fp8,       ///< fp8 as stored: `weight`, and `weight_scale_inv` or `weight_scale`
};

/// Where one matrix of a unit goes.
struct ExportMatrix {
  ExportForm form;
  PublishedMatrix published;   ///< `fused`: turned on its side, inputs first
  std::size_t tensor = 0;      ///< index into tensors(); the set's others are the next ones
  std::int64_t first_row = 0;  ///< of the tensor: of a vocabulary run, else 0
};

/// What a store becomes as a Hugging Face checkpoint, known from its manifest alone: tensors,
/// shards and config.json.
///
/// Matrices keep their codes and scales, in the layouts of compressed-tensors (int4, fp8) or of
/// DeepSeek (where all that is quantised is fp8 in blocks of 128 x 128). Written as bfloat16 all
/// the same are
/// - quantised embeddings and heads, which few servers read;
/// - q, k and v of Llama 4: vLLM reorders the rows of q and k for its rotary embedding as it loads
///   them, but most releases do so for `weight` only (vLLM #34243, #34471, #34997), and it wants q,
///   k and v alike. int4 decodes to a bfloat16, so there the values stay the same.
/// Routed experts are a tensor set each where anything is quantised in compressed-tensors' layouts,
/// as vLLM and transformers read them then; Llama 4's published [experts, in, out] where nothing
/// is.
class ExportPlan {
 public:
  /// `bfloat16`: every matrix decoded. `towers`: tensors that are added as they are. Throws
  /// Error{usage} with the way out when a matrix has no layout that a server reads: nf4, int4
  /// groups that do not divide the inputs, other fp8 blocks; and for towers of a model that has
  /// none.
  ExportPlan(const Store& store, bool bfloat16, std::int64_t shard_bytes_max,
             const std::vector<TowerTensor>& towers = {});

  const std::vector<ExportTensor>& tensors() const { return tensors_; }
  const std::vector<ExportShard>& shards() const { return shards_; }
  std::int64_t bytes() const;  ///< of all tensors
  /// The matrices of a unit, in the order of its places.
  std::vector<ExportMatrix> matrices(const StoredUnit& unit) const;
  /// The index of a tower's tensor.
  std::size_t tensor(const std::string& name) const { return by_name_.at(name); }
  /// quantization_format() of its linears.
  std::string format() const { return quantization_format(linears_); }
  std::string index_text() const;  ///< model.safetensors.index.json
  /// The store's `config` with the quantization_config that belongs to these tensors, and no other.
  Json config(Json config) const;
  /// What to know before it is served, as sentences.
  const std::vector<std::string>& notes() const { return notes_; }

 private:
  ExportForm form_of(const StoredUnit& unit, const MatrixPlace& place) const;
  void refuse_unreadable() const;
  bool can_fuse_experts() const;
  void list_linears();
  void make_tensors();
  void add(const std::string& name, Dtype dtype, std::vector<std::int64_t> shape);
  void make_shards(std::int64_t shard_bytes_max);
  void make_notes(bool with_towers);

  const Store& store_;
  bool bfloat16_, wrapper_ = false, experts_fused_ = false;
  std::string prefix_;
  std::vector<ExportedLinear> linears_;
  std::vector<ExportTensor> tensors_;
  std::vector<std::size_t> sets_;  ///< where each matrix's tensors begin: they share a shard
  std::map<std::string, std::size_t> by_name_;
  std::vector<ExportShard> shards_;
  std::vector<std::string> notes_;
};

}  // namespace tailor
