#include "data/store/source_form.h"

#include <cstring>

#include "base/error.h"
#include "base/units.h"

namespace tailor {
namespace {

constexpr std::string_view kWeight = ".weight";
constexpr std::int64_t kBlock = 128;

[[noreturn]] void refuse(const Checkpoint& checkpoint, const Checkpoint::Tensor& tensor,
                         const std::string& what, const std::string& mend) {
  throw Error(Fault::bad_file, {what, checkpoint.where(tensor), mend});
}

std::string sides_text(const PublishedMatrix& matrix) {
  return "[" + std::to_string(matrix.rows) + ", " + std::to_string(matrix.columns) + "]";
}

/// The tensor that holds a plain matrix, or all of a fused one; its shape checked.
const Checkpoint::Tensor& find_codes(const Checkpoint& checkpoint, const PublishedMatrix& matrix) {
  if (matrix.fused) {
    const Checkpoint::Tensor& tensor = checkpoint.find(matrix.name);
    const auto& shape = tensor.info.shape;
    const auto wanted = matrix.tensor_shape(0);
    if (shape.size() != 3 || matrix.expert >= shape[0] || shape[1] != wanted[1] ||
        shape[2] != wanted[2]) {
      refuse(checkpoint, tensor,
             "shape of '" + matrix.name + "' is " + tensor.info.shape_text() +
                 ", config.json asks for [experts, " + std::to_string(wanted[1]) + ", " +
                 std::to_string(wanted[2]) + "]",
             "Check that config.json belongs to these weights.");
    }
    return tensor;
  }
  if (matrix.is_vector()) {
    const std::int64_t shape[] = {matrix.columns};
    return checkpoint.find(matrix.name, shape);
  }
  const std::int64_t shape[] = {matrix.rows, matrix.columns};
  return checkpoint.find(matrix.name, shape);
}

void check_scale_type(const Checkpoint& checkpoint, const Checkpoint::Tensor& scales,
                      bool half_too) {
  const Dtype type = scales.info.dtype;
  if (type == Dtype::f32 || type == Dtype::bf16 || (half_too && type == Dtype::f16)) return;
  refuse(checkpoint, scales,
         "scales of type " + std::string(dtype_name(type)) + " are not supported",
         half_too ? "Scales of INT4 are expected as BF16, F16 or F32."
                  : "Scales of fp8 are expected as F32 or BF16.");
}

/// compressed-tensors writes the matrix's own shape beside the packed words.
void check_weight_shape(const Checkpoint& checkpoint, const PublishedMatrix& matrix,
                        const Checkpoint::Tensor& tensor) {
  const auto bytes = checkpoint.bytes(tensor);
  std::int64_t sides[2] = {-1, -1};
  if (tensor.info.elements() == 2 && tensor.info.dtype == Dtype::i64) {
    std::memcpy(sides, bytes.data(), sizeof sides);
  } else if (tensor.info.elements() == 2 && tensor.info.dtype == Dtype::i32) {
    std::int32_t narrow_sides[2];
    std::memcpy(narrow_sides, bytes.data(), sizeof narrow_sides);
    sides[0] = narrow_sides[0];
    sides[1] = narrow_sides[1];
  }
  if (sides[0] == matrix.rows && sides[1] == matrix.columns) return;
  refuse(checkpoint, tensor,
         "weight_shape says [" + std::to_string(sides[0]) + ", " + std::to_string(sides[1]) +
             "], config.json asks for " + sides_text(matrix),
         "Check that config.json belongs to these weights.");
}

SourceMatrix find_int4(const Checkpoint& checkpoint, const PublishedMatrix& matrix,
                       const std::string& module) {
  const std::int64_t codes_shape[] = {matrix.rows, div_ceil(matrix.columns, 8)};
  const Checkpoint::Tensor& packed = checkpoint.find(module + ".weight_packed");
  for (const char* name : {".weight_zero_point", ".weight_g_idx"}) {
    if (!checkpoint.has(module + name)) continue;
    refuse(checkpoint, checkpoint.find(module + name),
           "asymmetric or reordered INT4 weights are not supported",
           "Pack from a bfloat16 checkpoint, or from one quantised symmetrically and without "
           "activation order.");
  }
  if (packed.info.dtype != Dtype::i32) {
    refuse(checkpoint, packed,
           "packed weights are " + std::string(dtype_name(packed.info.dtype)) + ", not I32",
           "Only compressed-tensors' pack-quantized INT4 is read.");
  }
  static_cast<void>(checkpoint.find(module + ".weight_packed", codes_shape));
  const Checkpoint::Tensor& scales = checkpoint.find(module + ".weight_scale");
  check_scale_type(checkpoint, scales, true);
  if (checkpoint.has(module + ".weight_shape")) {
    check_weight_shape(checkpoint, matrix, checkpoint.find(module + ".weight_shape"));
  }
  const auto& shape = scales.info.shape;
  const bool fits = shape.size() == 2 && shape[0] == matrix.rows && shape[1] > 0;
  const std::int64_t group = fits ? int4_group_of(matrix.columns, shape[1]) : 0;
  if (group == 0) {
    refuse(checkpoint, scales,
           "scales of shape " + scales.info.shape_text() + " do not cover a matrix of " +
               sides_text(matrix),
           "Groups of 128, 64 or 32 columns are read. Check that the shards are of one download.");
  }
  return {&packed, &scales, WeightFormat::int4(group), 0, scales.info.elements()};
}

bool fits_fused(const TensorInfo& scales, const TensorInfo& codes) {
  const std::int64_t experts = codes.shape[0], outputs = codes.shape[2];
  const auto& shape = scales.shape;
  return shape == std::vector{experts, outputs} ||
         shape == std::vector{experts, outputs, std::int64_t{1}} ||
         shape == std::vector{experts, std::int64_t{1}, outputs};
}

/// Blocks of an expert's matrix among those of its tensor, outputs first. Gate and up are halves of
/// one tensor, so each has half of its rows of scales.
SourceMatrix find_fused_blocks(const Checkpoint& checkpoint, const PublishedMatrix& matrix,
                               const Checkpoint::Tensor& codes, const Checkpoint::Tensor& scales) {
  const std::int64_t down = div_ceil(matrix.rows, kBlock),
                     across = div_ceil(matrix.columns, kBlock);
  const std::int64_t parts = matrix.width / matrix.rows;
  TensorInfo needed = scales.info;
  needed.shape = {codes.info.shape[0], parts * down, across};
  if (parts > 1 && matrix.rows % kBlock != 0 && matrix.rows > kBlock) {
    refuse(checkpoint, codes,
           "blocks of " + std::to_string(kBlock) + " rows do not divide the " +
               std::to_string(matrix.rows) + " outputs of gate and of up, which share this tensor",
           "Fused fp8 experts are read where moe_intermediate_size is a multiple of 128 or below "
           "it. Use a checkpoint with a tensor for every expert.");
  }
  if (scales.info.shape != needed.shape) {
    refuse(checkpoint, scales,
           "fp8 scales of shape " + scales.info.shape_text() + " are not " + needed.shape_text() +
               ", one for 128 x 128 of weights of shape " + codes.info.shape_text(),
           "Check that the shards are of one download.");
  }
  const std::int64_t row = matrix.expert * parts * down + matrix.first / matrix.rows * down;
  return {&codes, &scales, WeightFormat::fp8_blocks(), row * across, down * across};
}

SourceMatrix find_fp8(const Checkpoint& checkpoint, const PublishedMatrix& matrix,
                      const Checkpoint::Tensor& codes) {
  const bool blocks_only = matrix.fused && matrix.outputs_first;
  const std::vector<std::string> names =
      blocks_only ? std::vector{matrix.name + "_scale_inv"} : scale_names(matrix.name);
  const Checkpoint::Tensor* scales = nullptr;
  for (const std::string& name : names) {
    if (scales == nullptr && checkpoint.has(name)) scales = &checkpoint.find(name);
  }
  if (scales == nullptr && checkpoint.has(matrix.name + "_weight_scale")) {
    refuse(checkpoint, checkpoint.find(matrix.name + "_weight_scale"),
           "fp8 experts as ModelOpt names them, a scale a tensor, are not read",
           "Use the checkpoint of its publisher: bfloat16, or fp8 with a scale for every output.");
  }
  if (scales == nullptr) {
    refuse(checkpoint, codes, "fp8 weights without scales",
           "The checkpoint should hold " + names.front() + ": check that every shard is there.");
  }
  check_scale_type(checkpoint, *scales, false);
  if (blocks_only) return find_fused_blocks(checkpoint, matrix, codes, *scales);
  const auto& shape = scales->info.shape;
  const std::int64_t count = scales->info.elements();
  if (matrix.fused) {
    if (fits_fused(scales->info, codes.info)) return {&codes, scales, WeightFormat::fp8_rows()};
  } else {
    if (shape.size() == 2 && shape[0] == div_ceil(matrix.rows, kBlock) &&
        shape[1] == div_ceil(matrix.columns, kBlock)) {
      return {&codes, scales, WeightFormat::fp8_blocks(), 0, count};
    }
    if (shape == std::vector{matrix.rows} || shape == std::vector{matrix.rows, std::int64_t{1}}) {
      return {&codes, scales, WeightFormat::fp8_rows(), 0, count};
    }
  }
  refuse(
      checkpoint, *scales,
      "fp8 scales of shape " + scales->info.shape_text() +
          (matrix.fused ? " are not one for every output"
                        : " fit neither blocks of 128 x 128 nor the outputs") +
          " of weights of shape " + codes.info.shape_text(),
      "One scale for 128 x 128 weights or for an output is read. Check that the shards are of one "
      "download.");
}

}  // namespace

std::vector<std::string> scale_names(const std::string& tensor) {
  if (!tensor.ends_with(kWeight)) return {tensor + "_scale", tensor + "_scale_inv"};
  return {tensor + "_scale_inv", tensor + "_scale"};
}

std::int64_t int4_group_of(std::int64_t columns, std::int64_t groups) {
  if (groups < 1 || groups > columns) return 0;
  if (groups == 1) return columns;
  for (const std::int64_t group : {128, 64, 32, 256, 512, 1024, 16, 8}) {
    if (div_ceil(columns, group) == groups) return group;
  }
  return columns % groups == 0 ? columns / groups : 0;
}

SourceMatrix find_source(const Checkpoint& checkpoint, const PublishedMatrix& matrix) {
  const std::string module = module_of(matrix.name);
  if (!matrix.fused && checkpoint.has(module + ".weight_packed")) {
    return find_int4(checkpoint, matrix, module);
  }
  const Checkpoint::Tensor& codes = find_codes(checkpoint, matrix);
  switch (codes.info.dtype) {
    case Dtype::f32:
    case Dtype::f16:
      return {&codes, nullptr, WeightFormat::f32()};
    case Dtype::bf16:
      return {&codes, nullptr, WeightFormat::bf16()};
    case Dtype::f8_e4m3:
      return find_fp8(checkpoint, matrix, codes);
    default:
      refuse(checkpoint, codes,
             "weights of type " + std::string(dtype_name(codes.info.dtype)) + " are not supported",
             "Use a checkpoint in F32, F16, BF16, fp8 (F8_E4M3 with scales) or INT4 "
             "(compressed-tensors, pack-quantized).");
  }
}

WeightFormat published_format(const Checkpoint& checkpoint, const PublishedMatrix& matrix) {
  return find_source(checkpoint, matrix).format;
}

}  // namespace tailor
