#include "data/store/source.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/text.h"
#include "base/units.h"
#include "data/quant/codec.h"

namespace tailor {
namespace {

constexpr std::string_view kWeight = ".weight";

/// "…gate_proj.weight" -> "…gate_proj"
std::string module_of(const std::string& name) {
  return name.ends_with(kWeight) ? name.substr(0, name.size() - kWeight.size()) : name;
}

/// Names under which a matrix's fp8 scales are published; the first that is there counts.
std::vector<std::string> scale_names(const std::string& name) {
  if (!name.ends_with(kWeight)) return {name + "_scale", name + "_scale_inv"};
  return {name + "_scale_inv", name + "_scale"};
}

std::int64_t count_of(const TensorInfo& info) { return info.elements(); }

float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16U, exponent = (bits >> 10U) & 31U;
  std::uint32_t fraction = bits & 0x3FFU, out = 0;
  if (exponent == 31) {
    out = sign | 0x7F800000U | (fraction << 13U);
  } else if (exponent != 0) {
    out = sign | ((exponent + 112U) << 23U) | (fraction << 13U);
  } else if (fraction != 0) {
    std::uint32_t shift = 0;
    while ((fraction & 0x400U) == 0) {
      fraction <<= 1U;
      ++shift;
    }
    out = sign | ((113U - shift) << 23U) | ((fraction & 0x3FFU) << 13U);
  } else {
    out = sign;
  }
  float value;
  std::memcpy(&value, &out, sizeof value);
  return value;
}

float bf16_to_float(std::uint16_t bits) {
  const std::uint32_t wide = std::uint32_t{bits} << 16U;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

float element(Dtype dtype, const std::byte* at) {
  if (dtype == Dtype::f32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return dtype == Dtype::f16 ? half_to_float(bits) : bf16_to_float(bits);
}

void to_floats(Dtype dtype, const std::byte* from, std::int64_t count, float* out) {
  switch (dtype) {
    case Dtype::f32:
      std::memcpy(out, from, static_cast<std::size_t>(count) * 4);
      return;
    case Dtype::f16:
    case Dtype::bf16:
      for (std::int64_t i = 0; i < count; ++i) out[i] = element(dtype, from + i * 2);
      return;
    default:
      TAILOR_CHECK(false, "a plain element type");
  }
}

/// Scales of another type, rounded to the bfloat16 that INT4 is decoded with.
std::vector<std::byte> bf16_scales(Dtype dtype, const std::byte* from, std::int64_t count) {
  std::vector<float> values(static_cast<std::size_t>(count));
  to_floats(dtype, from, count, values.data());
  std::vector<std::byte> out(values.size() * 2);
  const WeightFormat format = WeightFormat::bf16();
  MatrixEncoder encoder(format, 1, count, out.data(), nullptr);
  encoder.add_rows(0, 1, values.data());
  static_cast<void>(encoder.finish());
  return out;
}

[[noreturn]] void refuse(const Checkpoint& checkpoint, const Checkpoint::Tensor& tensor,
                         const std::string& what, const std::string& mend) {
  throw Error(Fault::bad_file, {what, checkpoint.where(tensor), mend});
}

/// The tensor that holds a plain matrix, or all of a fused one; its shape checked.
const Checkpoint::Tensor& find_codes(const Checkpoint& checkpoint, const PublishedMatrix& matrix) {
  if (matrix.fused) {
    const Checkpoint::Tensor& tensor = checkpoint.find(matrix.name);
    const auto& shape = tensor.info.shape;
    if (shape.size() != 3 || matrix.expert >= shape[0] || shape[1] != matrix.columns ||
        shape[2] != matrix.width) {
      refuse(checkpoint, tensor,
             "shape of '" + matrix.name + "' is " + tensor.info.shape_text() +
                 ", config.json asks for [experts, " + std::to_string(matrix.columns) + ", " +
                 std::to_string(matrix.width) + "]",
             "Check that config.json belongs to these weights.");
    }
    return tensor;
  }
  if (matrix.rows == 1 && checkpoint.has(matrix.name)) {
    const std::int64_t shape[] = {matrix.columns};
    return checkpoint.find(matrix.name, shape);
  }
  const std::int64_t shape[] = {matrix.rows, matrix.columns};
  return checkpoint.find(matrix.name, shape);
}

const Checkpoint::Tensor* find_scales(const Checkpoint& checkpoint, const PublishedMatrix& matrix) {
  for (const std::string& name : scale_names(matrix.name)) {
    if (checkpoint.has(name)) return &checkpoint.find(name);
  }
  return nullptr;
}

struct PackedInt4 {
  const Checkpoint::Tensor* packed;
  const Checkpoint::Tensor* scales;
};
/// Null `packed` where the checkpoint has no such tensor.
PackedInt4 find_int4(const Checkpoint& checkpoint, const PublishedMatrix& matrix) {
  const std::string module = module_of(matrix.name);
  if (matrix.fused || !checkpoint.has(module + ".weight_packed")) return {nullptr, nullptr};
  const std::int64_t codes_shape[] = {matrix.rows, div_ceil(matrix.columns, 8)};
  const auto& packed = checkpoint.find(module + ".weight_packed", codes_shape);
  const auto& scales = checkpoint.find(module + ".weight_scale");
  if (packed.info.dtype != Dtype::i32) {
    refuse(checkpoint, packed,
           "packed weights are " + std::string(dtype_name(packed.info.dtype)) + ", not I32",
           "Only compressed-tensors' pack-quantized INT4 is read.");
  }
  if (checkpoint.has(module + ".weight_zero_point") || checkpoint.has(module + ".weight_g_idx")) {
    refuse(checkpoint, packed, "asymmetric or reordered INT4 weights are not supported",
           "Pack from a bfloat16 checkpoint, or from one quantised symmetrically without "
           "activation order.");
  }
  return {&packed, &scales};
}

std::int64_t int4_group(const Checkpoint& checkpoint, const PublishedMatrix& matrix,
                        const Checkpoint::Tensor& scales) {
  const auto& shape = scales.info.shape;
  const bool fits = shape.size() == 2 && shape[0] == matrix.rows && shape[1] > 0;
  const std::int64_t group = fits ? div_ceil(matrix.columns, shape[1]) : 0;
  if (!fits || div_ceil(matrix.columns, group) != shape[1]) {
    refuse(checkpoint, scales,
           "scales of shape " + scales.info.shape_text() + " do not cover a matrix of [" +
               std::to_string(matrix.rows) + ", " + std::to_string(matrix.columns) + "]",
           "Check that the shards are of one download.");
  }
  return group;
}

}  // namespace

SourceReader::~SourceReader() {
  for (const auto& [shard, descriptor] : descriptors_) ::close(descriptor);
}

WeightFormat SourceReader::published_format(const Checkpoint& checkpoint,
                                            const PublishedMatrix& matrix) {
  if (const PackedInt4 int4 = find_int4(checkpoint, matrix); int4.packed != nullptr) {
    return WeightFormat::int4(int4_group(checkpoint, matrix, *int4.scales));
  }
  const Checkpoint::Tensor& tensor = find_codes(checkpoint, matrix);
  switch (tensor.info.dtype) {
    case Dtype::f32:
    case Dtype::f16:
      return WeightFormat::f32();
    case Dtype::bf16:
      return WeightFormat::bf16();
    case Dtype::f8_e4m3:
      break;
    default:
      refuse(checkpoint, tensor,
             "weights of type " + std::string(dtype_name(tensor.info.dtype)) + " are not supported",
             "Use a checkpoint in F32, F16, BF16, fp8 (F8_E4M3 with scales) or INT4 "
             "(compressed-tensors, pack-quantized).");
  }
  const Checkpoint::Tensor* scales = find_scales(checkpoint, matrix);
  if (scales == nullptr) {
    refuse(checkpoint, tensor, "fp8 weights without scales",
           "The checkpoint should hold " + scale_names(matrix.name).front() +
               ": check that every shard is there.");
  }
  if (scales->info.dtype != Dtype::f32 && scales->info.dtype != Dtype::bf16) {
    refuse(
        checkpoint, *scales,
        "fp8 scales of type " + std::string(dtype_name(scales->info.dtype)) + " are not supported",
        "Scales are expected as F32 or BF16.");
  }
  const std::int64_t count = count_of(scales->info);
  if (matrix.fused) {
    if (count != tensor.info.shape[0] * matrix.width) {
      refuse(checkpoint, *scales,
             "fp8 scales of shape " + scales->info.shape_text() + " are not one for every output",
             "Check that the shards are of one download.");
    }
    return WeightFormat::fp8_rows();
  }
  const auto& shape = scales->info.shape;
  if (shape.size() == 2 && shape[0] == div_ceil(matrix.rows, 128) &&
      shape[1] == div_ceil(matrix.columns, 128)) {
    return WeightFormat::fp8_blocks();
  }
  if (count == matrix.rows) return WeightFormat::fp8_rows();
  refuse(checkpoint, *scales,
         "fp8 scales of shape " + scales->info.shape_text() +
             " fit neither blocks of 128 x 128 "
             "nor the outputs of a matrix of " +
             tensor.info.shape_text(),
         "Check that the shards are of one download.");
}

std::vector<std::size_t> SourceReader::shards_of(const Checkpoint& checkpoint,
                                                 const PublishedMatrix& matrix) {
  if (const PackedInt4 int4 = find_int4(checkpoint, matrix); int4.packed != nullptr) {
    return {int4.packed->shard, int4.scales->shard};
  }
  const Checkpoint::Tensor& tensor = find_codes(checkpoint, matrix);
  std::vector<std::size_t> out = {tensor.shard};
  if (tensor.info.dtype == Dtype::f8_e4m3) {
    if (const auto* scales = find_scales(checkpoint, matrix)) out.push_back(scales->shard);
  }
  return out;
}

void SourceReader::read(const Checkpoint::Tensor& tensor, std::int64_t offset, std::int64_t bytes,
                        std::byte* to) {
  auto found = descriptors_.find(tensor.shard);
  const fs::path& path = checkpoint_.shard_path(tensor);
  if (found == descriptors_.end()) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) throw io_error(errno, "cannot open", path.string());
    ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_SEQUENTIAL);
    found = descriptors_.emplace(tensor.shard, descriptor).first;
  }
  const off_t begin = tensor.info.offset + offset;
  for (std::int64_t done = 0; done < bytes;) {
    const ssize_t n =
        ::pread(found->second, to + done, static_cast<std::size_t>(bytes - done), begin + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw io_error(errno, "cannot read", checkpoint_.where(tensor));
    if (n == 0) {
      throw Error(Fault::bad_file, {"the file ends inside a tensor", checkpoint_.where(tensor),
                                    "The file was cut off while it was read: download it again."});
    }
    done += n;
  }
  // The store is read after this, not the checkpoint: its pages only crowd others out.
  ::posix_fadvise(found->second, begin, bytes, POSIX_FADV_DONTNEED);
  bytes_read_ += bytes;
}

const std::byte* SourceReader::slice(const Checkpoint::Tensor& tensor, std::int64_t offset,
                                     std::int64_t bytes, int buffer) {
  Slice& held = slices_[buffer];
  if (held.tensor != tensor.stored_name || held.offset != offset || held.bytes != bytes) {
    held.offset = -1;
    if (held.memory.size() < static_cast<std::size_t>(bytes)) {
      held.memory = std::vector<std::byte>();  // the old one goes before the new one comes
      held.memory.resize(static_cast<std::size_t>(bytes));
    }
    read(tensor, offset, bytes, held.memory.data());
    held.tensor = tensor.stored_name;
    held.offset = offset;
    held.bytes = bytes;
  }
  return held.memory.data();
}

void SourceReader::read_fused_rows(const PublishedMatrix& matrix, const Checkpoint::Tensor& tensor,
                                   std::int64_t begin, std::int64_t end, float* out) {
  const std::int64_t size = dtype_bytes(tensor.info.dtype), width = matrix.width;
  const std::int64_t expert_bytes = matrix.columns * width * size;
  const std::byte* from = slice(tensor, matrix.expert * expert_bytes, expert_bytes, 0);
  const std::int64_t first = matrix.first + begin, count = end - begin;
  if (tensor.info.dtype == Dtype::f8_e4m3) {
    const Checkpoint::Tensor& scales = *find_scales(checkpoint_, matrix);
    const std::int64_t scale_size = dtype_bytes(scales.info.dtype);
    const std::byte* scale =
        slice(scales, matrix.expert * width * scale_size, width * scale_size, 1);
    std::vector<float> of_output(static_cast<std::size_t>(count)),
        row(static_cast<std::size_t>(count));
    to_floats(scales.info.dtype, scale + first * scale_size, count, of_output.data());
    const float one = 1;
    for (std::int64_t c = 0; c < matrix.columns; ++c) {
      const EncodedMatrix codes{WeightFormat::fp8_rows(), 1, count, from + c * width + first,
                                reinterpret_cast<const std::byte*>(&one)};
      decode_rows(codes, 0, 1, row.data());
      for (std::int64_t r = 0; r < count; ++r) {
        const auto at = static_cast<std::size_t>(r);
        out[r * matrix.columns + c] = row[at] * of_output[at];
      }
    }
    return;
  }
  // Blocks that fit in the first-level cache: the matrix is turned on its side.
  constexpr std::int64_t kBlock = 32;
  for (std::int64_t c0 = 0; c0 < matrix.columns; c0 += kBlock) {
    const std::int64_t c1 = std::min(matrix.columns, c0 + kBlock);
    for (std::int64_t r0 = 0; r0 < count; r0 += kBlock) {
      const std::int64_t r1 = std::min(count, r0 + kBlock);
      for (std::int64_t c = c0; c < c1; ++c) {
        const std::byte* row = from + (c * width + first) * size;
        for (std::int64_t r = r0; r < r1; ++r) {
          out[r * matrix.columns + c] = element(tensor.info.dtype, row + r * size);
        }
      }
    }
  }
}

void SourceReader::read_rows(const PublishedMatrix& matrix, std::int64_t begin, std::int64_t end,
                             float* out) {
  const std::int64_t columns = matrix.columns;
  const WeightFormat format = published_format(checkpoint_, matrix);
  if (const PackedInt4 int4 = find_int4(checkpoint_, matrix); int4.packed != nullptr) {
    const std::int64_t row_codes = code_bytes(format, 1, columns);
    const std::int64_t groups = div_ceil(columns, format.group);
    const std::byte* codes = slice(*int4.packed, begin * row_codes, (end - begin) * row_codes, 0);
    const std::int64_t scale_size = dtype_bytes(int4.scales->info.dtype);
    const std::byte* scales =
        slice(*int4.scales, begin * groups * scale_size, (end - begin) * groups * scale_size, 1);
    std::vector<std::byte> rounded;
    if (int4.scales->info.dtype != Dtype::bf16) {
      rounded = bf16_scales(int4.scales->info.dtype, scales, (end - begin) * groups);
      scales = rounded.data();
    }
    decode_rows({format, end - begin, columns, codes, scales}, 0, end - begin, out);
    return;
  }
  const Checkpoint::Tensor& tensor = find_codes(checkpoint_, matrix);
  if (matrix.fused) {
    read_fused_rows(matrix, tensor, begin, end, out);
    return;
  }
  const std::int64_t row_bytes = columns * dtype_bytes(tensor.info.dtype);
  if (format.kind != WeightKind::fp8) {
    to_floats(tensor.info.dtype, slice(tensor, begin * row_bytes, (end - begin) * row_bytes, 0),
              (end - begin) * columns, out);
    return;
  }
  const Checkpoint::Tensor& scales = *find_scales(checkpoint_, matrix);
  const std::int64_t scale_count = count_of(scales.info);
  const std::byte* raw = slice(scales, 0, scale_count * dtype_bytes(scales.info.dtype), 1);
  std::vector<float> all(static_cast<std::size_t>(scale_count));
  to_floats(scales.info.dtype, raw, scale_count, all.data());
  // Blocks are counted from the matrix's first row, so the rows are read from a block's border.
  const std::int64_t from = begin / format.block_rows * format.block_rows;
  const std::byte* codes = slice(tensor, from * row_bytes, (end - from) * row_bytes, 0);
  const std::int64_t across =
      div_ceil(columns, format.block_columns == 0 ? columns : format.block_columns);
  decode_rows({format, end - from, columns, codes,
               reinterpret_cast<const std::byte*>(all.data() + from / format.block_rows * across)},
              begin - from, end - from, out);
}

bool SourceReader::copy_encoded(const PublishedMatrix& matrix, const WeightFormat& format,
                                std::int64_t begin, std::int64_t end, std::byte* codes,
                                std::byte* scales) {
  if (matrix.fused || format != published_format(checkpoint_, matrix)) return false;
  const bool whole = begin == 0 && end == matrix.rows;
  if (const PackedInt4 int4 = find_int4(checkpoint_, matrix); int4.packed != nullptr) {
    if (!whole || int4.scales->info.dtype != Dtype::bf16) return false;
    read(*int4.packed, 0, int4.packed->info.bytes, codes);
    read(*int4.scales, 0, int4.scales->info.bytes, scales);
    return true;
  }
  const Checkpoint::Tensor& tensor = find_codes(checkpoint_, matrix);
  if (tensor.info.dtype == Dtype::f16) return false;
  const std::int64_t row_bytes = matrix.columns * dtype_bytes(tensor.info.dtype);
  if (format.kind != WeightKind::fp8) {
    read(tensor, begin * row_bytes, (end - begin) * row_bytes, codes);
    return true;
  }
  const Checkpoint::Tensor& published = *find_scales(checkpoint_, matrix);
  if (!whole) return false;
  read(tensor, 0, tensor.info.bytes, codes);
  const std::int64_t count = count_of(published.info);
  const std::byte* raw = slice(published, 0, published.info.bytes, 1);
  std::vector<float> all(static_cast<std::size_t>(count));
  to_floats(published.info.dtype, raw, count, all.data());
  std::memcpy(scales, all.data(), all.size() * sizeof(float));
  return true;
}

}  // namespace tailor
