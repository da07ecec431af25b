#pragma once

#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/published.h"
#include "data/quant/format.h"

namespace tailor {

/// The tensors a published matrix is made of, and the form they are in:
///
/// F32, F16, BF16  plain, or all experts in one tensor (published.h)
/// F8_E4M3         with one scale for 128 x 128 weights (`weight_scale_inv`, DeepSeek) or for each
///                 output (`weight_scale`; `gate_up_proj_scale` of [E, 1, outputs] or [E, outputs,
///                 1] beside fused experts, Llama 4), F32 or BF16. Fused experts of DeepSeek, as
///                 transformers saves them: `gate_up_proj_scale_inv` [E, blocks of 2F, blocks of D]
///                 (transformers 5.17 finegrained_fp8.py, FP8Experts), where no block lies in both
///                 gate and up: F is a multiple of 128, or below 128 and each has a block of its
///                 own
/// INT4            compressed-tensors' pack-quantized: `weight_packed` I32 [rows, columns / 8],
///                 `weight_scale` [rows, groups] BF16, F16 or F32, `weight_shape`; symmetric
struct SourceMatrix {
  const Checkpoint::Tensor* codes;
  const Checkpoint::Tensor* scales = nullptr;  ///< null where the form has none
  WeightFormat format;                         ///< F16 counts as f32, which holds it
  /// The matrix's own scales where they lie one after the other; of inputs-first fused experts they
  /// are strided, and read by the matrix's place.
  std::int64_t first_scale = 0, scale_count = 0;
};

/// Throws Error{bad_file}, naming the tensor: missing or of another shape, scales missing or of a
/// size that does not fit, zero points or reordered columns, another element type.
SourceMatrix find_source(const Checkpoint& checkpoint, const PublishedMatrix& matrix);

/// The form a matrix is published in; throws as find_source.
WeightFormat published_format(const Checkpoint& checkpoint, const PublishedMatrix& matrix);

/// The group of INT4 scales that come `groups` a row: all columns for one, else 128 or another
/// power of two that gives so many, else what divides; 0 where nothing does.
std::int64_t int4_group_of(std::int64_t columns, std::int64_t groups);

/// Names under which the fp8 scales of a tensor may be published, likelier first.
std::vector<std::string> scale_names(const std::string& tensor);

}  // namespace tailor
