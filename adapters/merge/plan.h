#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "adapters/peft_reader.h"
#include "base/json.h"
#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/published.h"
#include "data/quant/format.h"

namespace tailor {

/// What a merge writes the language model's weights as.
enum class MergeDtype { as_base, bfloat16, float32 };

/// How a tensor's bytes are cut, for reading, for writing and for its digest: into slices (the
/// experts of a fused tensor; one, else), each into pieces, the last of them shorter.
struct TensorPieces {
  std::int64_t slice_bytes = 0, piece_bytes = 0;
  std::int64_t pieces_of(std::int64_t tensor_bytes) const;
};

/// A tensor of the base, or of the merged model.
struct MergeTensor {
  std::string name;  ///< as in the file
  Dtype dtype = Dtype::bf16;
  std::vector<std::int64_t> shape;
  std::int64_t bytes = 0;
  std::size_t file = 0;     ///< index of its shard
  std::int64_t offset = 0;  ///< from the start of the file
  TensorPieces pieces;
};

/// One adapter's product for a part: which site, and where the part's rows lie in it.
struct MergeTerm {
  std::size_t adapter = 0, site = 0;
  double scale = 1;  ///< the site's, times the adapter's weight
  bool operator==(const MergeTerm&) const = default;
};

/// What becomes of one tensor of the base and of the scales that belong to it.
struct MergePart {
  enum class Kind {
    copy,   ///< bytes as they are
    plain,  ///< F32, F16 or BF16: rows of numbers
    fp8,    ///< e4m3 codes with block scales, or a scale a row
    int4,   ///< compressed-tensors' words with a scale a group
  };
  Kind kind = Kind::copy;
  std::size_t in = 0, out = 0;  ///< indices into the plan's inputs and outputs
  std::optional<std::size_t> in_scales, out_scales;
  WeightFormat format;       ///< of fp8 and int4
  bool requantised = false;  ///< fp8 and int4 in, the same out; else decoded

  // In rows of the tensor, 3-D ones flattened to [slices x slice_rows, columns].
  std::int64_t slices = 1, slice_rows = 0, columns = 0;
  std::int64_t piece_rows = 0;       ///< copy: 0, it goes by bytes
  std::int64_t slices_a_expert = 1;  ///< 2: gate and up are slices of their own
  std::int64_t expert = 0;           ///< of the first slice
  std::int64_t first_output = 0;     ///< of the site, in the first slice
  bool inputs_first = false;         ///< rows are the site's inputs
  std::vector<MergeTerm> terms;      ///< empty: nothing is added
  /// fp8 that lies inputs first has a scale for every column of a slice: of it all, so that a slice
  /// that is written in fp8 again is one piece.
  bool scales_by_column() const { return kind == Kind::fp8 && inputs_first; }
  std::int64_t layer = -1;
  int order = 0;  ///< among the parts of a layer, so that parts of one site come together
};

/// A piece of a part: the unit of reading, of writing and of resuming.
struct MergeJob {
  std::size_t part = 0;
  std::int64_t slice = 0, piece = 0;
};

struct MergeShard {
  std::string name;
  fs::path source;
  std::string header;      ///< first bytes of the merged file
  std::int64_t bytes = 0;  ///< of the merged file
};

/// What a merge does, known from headers and configs before a weight is read. A function of the
/// base, the adapters and the dtype alone, so that a merge that was killed can be gone on with.
struct MergePlan {
  std::vector<MergeTensor> inputs, outputs;
  std::vector<MergeShard> shards;
  std::vector<MergePart> parts;
  std::vector<MergeJob> jobs;
  bool had_index = false;
  bool config_changes = false;  ///< the merged config.json is not the base's
  std::int64_t input_bytes = 0, output_bytes = 0;
  std::int64_t adapted_tensors = 0;

  /// Rows of a job, [first, first + count), within its slice.
  std::pair<std::int64_t, std::int64_t> rows_of(const MergeJob& job) const;
};

struct AdapterToMerge {
  const PeftReader* reader = nullptr;
  double weight = 1;
};

/// Throws Error{bad_file} for a base that is not what its config says, and for forms of weights
/// that cannot be merged into, each by name and with the way out.
MergePlan plan_merge(const Checkpoint& base, const ModelSpec& spec,
                     const std::vector<AdapterToMerge>& adapters, MergeDtype dtype);

/// The merged model's config.json, from the base's: without quantization_config and with the new
/// dtype where weights are no longer quantised, or of another type.
Json merged_config(Json config, MergeDtype dtype);
std::string merged_index(const MergePlan& plan);

}  // namespace tailor
