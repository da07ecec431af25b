#include "data/store/source.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/units.h"
#include "data/quant/codec.h"
#include "data/store/halves.h"
#include "data/store/transpose.h"

namespace tailor {
namespace {

template <class T>
const T* as(const std::byte* bytes) {
  return reinterpret_cast<const T*>(bytes);
}
template <class T>
T* as(std::byte* bytes) {
  return reinterpret_cast<T*>(bytes);
}

/// The first of `count` numbers that is infinite or none, else `count`.
template <class T>
std::int64_t not_finite(const T* values, std::int64_t count, T mask) {
  constexpr std::int64_t kRun = 4096;  // looked through at once, without leaving the loop
  for (std::int64_t begin = 0; begin < count; begin += kRun) {
    const std::int64_t end = std::min(count, begin + kRun);
    T any = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      any = static_cast<T>(any | static_cast<T>((values[i] & mask) == mask));
    }
    if (any == 0) continue;
    for (std::int64_t i = begin; i < end; ++i) {
      if ((values[i] & mask) == mask) return i;
    }
  }
  return count;
}

/// The same for stored codes of f32, bf16 and fp8, or for float scales.
std::int64_t not_finite(WeightKind kind, const std::byte* codes, std::int64_t count) {
  switch (kind) {
    case WeightKind::f32:
      return not_finite<std::uint32_t>(as<std::uint32_t>(codes), count, 0x7F800000U);
    case WeightKind::bf16:
      return not_finite<std::uint16_t>(as<std::uint16_t>(codes), count, 0x7F80U);
    case WeightKind::fp8:
      return not_finite<std::uint8_t>(as<std::uint8_t>(codes), count, 0x7FU);
    default:
      return count;  // every code is a number
  }
}

[[noreturn]] void refuse_number(const std::string& tensor, const char* what, std::int64_t row,
                                std::int64_t column) {
  throw Error(Fault::bad_file,
              {std::string(what) + " is infinite or not a number",
               tensor + ", row " + std::to_string(row) + ", column " + std::to_string(column),
               "The checkpoint is damaged or its training diverged. Download it again, and check "
               "it with the program that wrote it."});
}

}  // namespace

SourceReader::~SourceReader() {
  for (const auto& [shard, descriptor] : descriptors_) ::close(descriptor);
}

void SourceReader::release() {
  for (Slice& held : slices_) held = Slice();
}

std::int64_t SourceReader::memory_bytes(const PublishedMatrix& matrix,
                                        const WeightFormat& published, std::int64_t rows) {
  const bool turned = matrix.fused && !matrix.outputs_first;  // an expert's whole tensor is read
  const std::int64_t elements =
      turned ? matrix.columns * matrix.width : std::min(rows, matrix.rows) * matrix.columns;
  const std::int64_t scales =
      scale_bytes(published, turned ? matrix.width : matrix.rows, matrix.columns);
  return code_bytes(published, 1, elements) + 2 * scales;
}

int SourceReader::descriptor_of(const Checkpoint::Tensor& tensor) {
  const auto found = descriptors_.find(tensor.shard);
  if (found != descriptors_.end()) return found->second;
  const fs::path& path = checkpoint_.shard_path(tensor);
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw io_error(errno, "cannot open", path.string());
  ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_SEQUENTIAL);
  return descriptors_.emplace(tensor.shard, descriptor).first->second;
}

void SourceReader::read(const Checkpoint::Tensor& tensor, std::int64_t offset, std::int64_t bytes,
                        std::byte* to) {
  const int descriptor = descriptor_of(tensor);
  const off_t begin = tensor.info.offset + offset;
  for (std::int64_t done = 0; done < bytes;) {
    const ssize_t n =
        ::pread(descriptor, to + done, static_cast<std::size_t>(bytes - done), begin + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw io_error(errno, "cannot read", checkpoint_.where(tensor));
    if (n == 0) {
      throw Error(Fault::bad_file, {"the file ends inside a tensor", checkpoint_.where(tensor),
                                    "The file was cut off while it was read: download it again."});
    }
    done += n;
  }
  // The store is read after this, not the checkpoint: its pages only crowd others out.
  ::posix_fadvise(descriptor, begin, bytes, POSIX_FADV_DONTNEED);
  bytes_read_ += bytes;
}

void SourceReader::read_ahead(const PublishedMatrix& matrix, std::int64_t begin, std::int64_t end) {
  const SourceMatrix source = find_source(checkpoint_, matrix);
  const TensorInfo& info = source.codes->info;
  const std::int64_t pieces = matrix.fused ? info.shape[0] : matrix.rows;
  const std::int64_t bytes = info.bytes / pieces;  // of an expert, or of a row
  if (matrix.fused) {
    begin = matrix.expert;
    end = begin + 1;
  }
  ::posix_fadvise(descriptor_of(*source.codes), info.offset + begin * bytes, (end - begin) * bytes,
                  POSIX_FADV_WILLNEED);
}

const std::byte* SourceReader::slice(const Checkpoint::Tensor& tensor, std::int64_t offset,
                                     std::int64_t bytes, Buffer buffer) {
  Slice& held = slices_[buffer];
  if (held.tensor == tensor.stored_name && held.offset == offset && held.bytes == bytes) {
    return held.memory.data();
  }
  held.offset = -1;
  if (held.memory.size() < bytes) {
    held.memory = AlignedMemory();  // the old one goes before the new one comes
    held.memory = AlignedMemory(bytes, true);
  }
  read(tensor, offset, bytes, held.memory.data());
  held.tensor = tensor.stored_name;
  held.offset = offset;
  held.bytes = bytes;
  return held.memory.data();
}

std::vector<float> SourceReader::scales_of(const Checkpoint::Tensor& scales, std::int64_t begin,
                                           std::int64_t count) {
  const std::int64_t size = dtype_bytes(scales.info.dtype);
  const std::byte* raw = slice(scales, begin * size, count * size, kScales);
  std::vector<float> out(static_cast<std::size_t>(count));
  widen(scales.info.dtype, raw, count, out.data());
  return out;
}

void SourceReader::read_fused_rows(const PublishedMatrix& matrix, const SourceMatrix& source,
                                   std::int64_t begin, std::int64_t end, float* out) {
  const Dtype dtype = source.codes->info.dtype;
  const std::int64_t size = dtype_bytes(dtype), width = matrix.width, columns = matrix.columns;
  const std::int64_t expert_bytes = columns * width * size;
  const std::byte* from = slice(*source.codes, matrix.expert * expert_bytes, expert_bytes, kCodes) +
                          (matrix.first + begin) * size;
  const std::int64_t count = end - begin;
  switch (dtype) {
    case Dtype::f32:
      return transpose({as<std::uint32_t>(from), columns, count, width},
                       reinterpret_cast<std::uint32_t*>(out), columns);
    case Dtype::f16:
      return transpose_half({as<std::uint16_t>(from), columns, count, width}, out, columns);
    case Dtype::bf16:
      return transpose_bf16({as<std::uint16_t>(from), columns, count, width}, out, columns);
    default:
      break;
  }
  const std::vector<float> scales = scales_of(*source.scales, matrix.expert * width, width);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(count * columns));
  transpose({as<std::uint8_t>(from), columns, count, width}, codes.data(), columns);
  decode_rows({source.format, count, columns, reinterpret_cast<const std::byte*>(codes.data()),
               reinterpret_cast<const std::byte*>(scales.data() + matrix.first + begin)},
              0, count, out);
}

/// compressed-tensors multiplies in the scale's own type, so the product is rounded to it.
void SourceReader::read_int4_rows(const PublishedMatrix& matrix, const SourceMatrix& source,
                                  std::int64_t begin, std::int64_t end, float* out) {
  const std::int64_t columns = matrix.columns, rows = end - begin;
  const std::int64_t row_codes = code_bytes(source.format, 1, columns);
  const std::int64_t groups = div_ceil(columns, source.format.group);
  const Dtype type = source.scales->info.dtype;
  const std::byte* codes = slice(*source.codes, begin * row_codes, rows * row_codes, kCodes);
  const std::int64_t scale_size = dtype_bytes(type);
  const std::byte* raw =
      slice(*source.scales, begin * groups * scale_size, rows * groups * scale_size, kScales);
  if (type == Dtype::bf16) {
    return decode_rows({source.format, rows, columns, codes, raw}, 0, rows, out);
  }
  std::vector<float> scales(static_cast<std::size_t>(rows * groups));
  widen(type, raw, rows * groups, scales.data());
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto* words = as<std::uint32_t>(codes + r * row_codes);
    for (std::int64_t c = 0; c < columns; ++c) {
      const auto code = static_cast<int>(words[c / 8] >> (4U * static_cast<unsigned>(c % 8)) & 15U);
      const float value = static_cast<float>(code - 8) *
                          scales[static_cast<std::size_t>(r * groups + c / source.format.group)];
      *out++ = type == Dtype::f16 ? rounded_to_half(value) : value;
    }
  }
}

void SourceReader::read_rows(const PublishedMatrix& matrix, std::int64_t begin, std::int64_t end,
                             float* out) {
  const SourceMatrix source = find_source(checkpoint_, matrix);
  const WeightFormat& format = source.format;
  if (matrix.fused && !matrix.outputs_first) {
    return read_fused_rows(matrix, source, begin, end, out);
  }
  if (format.kind == WeightKind::int4) return read_int4_rows(matrix, source, begin, end, out);
  const std::int64_t columns = matrix.columns;
  const Dtype dtype = source.codes->info.dtype;
  const std::int64_t row_bytes = columns * dtype_bytes(dtype);
  if (format.kind != WeightKind::fp8) {
    const std::byte* raw = slice(*source.codes, (matrix.first_row() + begin) * row_bytes,
                                 (end - begin) * row_bytes, kCodes);
    return widen(dtype, raw, (end - begin) * columns, out);
  }
  const std::vector<float> scales =
      scales_of(*source.scales, source.first_scale, source.scale_count);
  // Blocks are counted from the matrix's first row, so the rows are read from a block's border.
  const std::int64_t from = begin / format.block_rows * format.block_rows;
  const std::byte* codes = slice(*source.codes, (matrix.first_row() + from) * row_bytes,
                                 (end - from) * row_bytes, kCodes);
  const std::int64_t across =
      div_ceil(columns, format.block_columns == 0 ? columns : format.block_columns);
  decode_rows(
      {format, end - from, columns, codes,
       reinterpret_cast<const std::byte*>(scales.data() + from / format.block_rows * across)},
      begin - from, end - from, out);
}

void SourceReader::copy_scales(const SourceMatrix& source, std::int64_t begin, std::int64_t count,
                               std::byte* to) {
  const std::vector<float> scales = scales_of(*source.scales, begin, count);
  for (std::int64_t i = 0; i < count; ++i) {
    if (std::isfinite(scales[static_cast<std::size_t>(i)])) continue;
    const std::int64_t across = std::max<std::int64_t>(1, source.scales->info.shape.back());
    refuse_number(checkpoint_.where(*source.scales), "a scale", (begin + i) / across,
                  (begin + i) % across);
  }
  if (source.format.kind == WeightKind::fp8) {
    std::memcpy(to, scales.data(), scales.size() * sizeof(float));
    return;
  }
  MatrixEncoder encoder(WeightFormat::bf16(), 1, count, to, nullptr);
  encoder.add_rows(0, 1, scales.data());
  static_cast<void>(encoder.finish());
}

void SourceReader::copy_fused(const PublishedMatrix& matrix, const SourceMatrix& source,
                              std::int64_t begin, std::int64_t end, std::byte* codes,
                              std::byte* scales) {
  const std::int64_t size = dtype_bytes(source.codes->info.dtype), width = matrix.width;
  const std::int64_t columns = matrix.columns, count = end - begin;
  const std::int64_t expert_bytes = columns * width * size;
  const std::byte* from = slice(*source.codes, matrix.expert * expert_bytes, expert_bytes, kCodes) +
                          (matrix.first + begin) * size;
  if (size == 4) {
    transpose({as<std::uint32_t>(from), columns, count, width}, as<std::uint32_t>(codes), columns);
  } else if (size == 2) {
    transpose({as<std::uint16_t>(from), columns, count, width}, as<std::uint16_t>(codes), columns);
  } else {
    transpose({as<std::uint8_t>(from), columns, count, width}, as<std::uint8_t>(codes), columns);
    copy_scales(source, matrix.expert * width + matrix.first, count, scales);
  }
}

bool SourceReader::copy_encoded(const PublishedMatrix& matrix, const WeightFormat& format,
                                std::int64_t begin, std::int64_t end, std::byte* codes,
                                std::byte* scales) {
  const SourceMatrix source = find_source(checkpoint_, matrix);
  const bool whole = begin == 0 && end == matrix.rows;
  if (format != source.format || source.codes->info.dtype == Dtype::f16 ||
      (source.scales != nullptr && !whole)) {
    return false;
  }
  if (matrix.fused && !matrix.outputs_first) {
    copy_fused(matrix, source, begin, end, codes, scales);
  } else {
    const std::int64_t row_bytes = code_bytes(format, 1, matrix.columns);
    read(*source.codes, (matrix.first_row() + begin) * row_bytes, (end - begin) * row_bytes, codes);
    if (source.scales != nullptr) {
      copy_scales(source, source.first_scale, source.scale_count, scales);
    }
  }
  const std::int64_t count = (end - begin) * matrix.columns;
  const std::int64_t bad = not_finite(format.kind, codes, count);
  if (bad < count) {
    refuse_number(checkpoint_.where(*source.codes) +
                      (matrix.fused ? ", expert " + std::to_string(matrix.expert) : std::string()),
                  "a weight", begin + bad / matrix.columns, bad % matrix.columns);
  }
  return true;
}

}  // namespace tailor
