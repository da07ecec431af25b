#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/units.h"
#include "data/quant/codec.h"
#include "data/quant/cpu/encode.h"
#include "data/quant/tables.h"

namespace tailor {
namespace {

constexpr std::int64_t kNf4Block = 64, kNf4SecondBlock = 256;

/// The mean of non-negative floats, correctly rounded: their 24-bit mantissas are added as
/// integers, one sum an exponent, and the 256 sums in 113 bits.
float exact_mean(const std::vector<Nf4Block>& blocks) {
  std::vector<std::uint64_t> sums(256);
  for (const Nf4Block& block : blocks) {
    const auto bits = std::bit_cast<std::uint32_t>(block.absmax);
    const std::uint32_t exponent = bits >> 23U;
    sums[exponent] += (bits & 0x7FFFFFU) | (exponent == 0 ? 0U : 0x800000U);
  }
  __extension__ using Wide = __float128;
  Wide total = 0;
  for (int exponent = 0; exponent < 256; ++exponent) {
    const std::uint64_t sum = sums[static_cast<std::size_t>(exponent)];
    total +=
        static_cast<Wide>(sum) * static_cast<Wide>(std::ldexp(1.0, std::max(exponent, 1) - 150));
  }
  return static_cast<float>(total / static_cast<Wide>(blocks.size()));
}

/// The entry of the dynamic map nearest to x, the lower one half-way between two.
std::uint8_t nearest_in_map(float x) {
  static const std::vector<float> middles = [] {
    std::vector<float> out;
    for (std::size_t i = 1; i < 256; ++i) out.push_back((kDynamicMap[i - 1] + kDynamicMap[i]) / 2);
    return out;
  }();
  return static_cast<std::uint8_t>(std::lower_bound(middles.begin(), middles.end(), x) -
                                   middles.begin());
}

}  // namespace

EncodeLevels runnable_encode_levels() {
  EncodeLevels list{};
  if (__builtin_cpu_supports("x86-64-v4")) list.levels[list.count++] = {"x86-64-v4", &kEncodeV4};
  if (__builtin_cpu_supports("x86-64-v3")) list.levels[list.count++] = {"x86-64-v3", &kEncodeV3};
  list.levels[list.count++] = {"x86-64", &kEncodeBase};
  return list;
}

class MatrixEncoder::Work {
 public:
  Work(const WeightFormat& format, std::int64_t rows, std::int64_t columns, std::byte* codes,
       std::byte* scales, const EncodeOptions& options, const EncodeKernels& kernels)
      : format_(format),
        rows_(rows),
        columns_(columns),
        codes_(codes),
        scales_(scales),
        any_sign_(options.int4_scales == Int4Scales::any_sign),
        bf16_scales_(options.fp8_scales == Fp8Scales::bf16),
        kernels_(kernels) {
    TAILOR_CHECK(rows >= 0 && columns >= 0);
    if (format.kind == WeightKind::int4) {
      TAILOR_CHECK(format.group > 0);
      scratch_.resize(static_cast<std::size_t>(int4_scratch_bytes(columns)));
    }
    if (format.kind == WeightKind::fp8) {
      TAILOR_CHECK(format.block_rows > 0 && format.block_columns >= 0);
      block_columns_ =
          format.block_columns == 0 ? std::max<std::int64_t>(columns, 1) : format.block_columns;
    }
    if (format.kind == WeightKind::nf4) {
      blocks_.reserve(
          static_cast<std::size_t>(div_ceil(checked_multiply(rows, columns), kNf4Block)));
    }
  }

  void add_rows(std::int64_t begin, std::int64_t end, const float* values) {
    TAILOR_CHECK(begin == next_ && begin <= end && end <= rows_, "rows come in order");
    for (std::int64_t row = begin; row < end; ++row) {
      const float* from = values + (row - begin) * columns_;
      const std::int64_t finite = kernels_.scan(from, columns_, &statistics_.squares);
      if (finite < columns_) refuse(row, finite, from[finite]);
    }
    switch (format_.kind) {
      case WeightKind::f32:
        std::memcpy(codes_ + begin * columns_ * 4, values,
                    static_cast<std::size_t>((end - begin) * columns_) * sizeof(float));
        break;
      case WeightKind::bf16:
        statistics_.squared_error +=
            each_row(begin, end, values, [&](std::int64_t row, const float* from) {
              return kernels_.bf16(from, columns_, at<std::uint16_t>(codes_, row * columns_));
            });
        break;
      case WeightKind::fp8:
        add_fp8(begin, end, values);
        break;
      case WeightKind::int4:
        add_int4(begin, end, values);
        break;
      case WeightKind::nf4:
        add_nf4(values, (end - begin) * columns_);
        break;
    }
    next_ = end;
  }

  EncodeStatistics finish(std::optional<float> nf4_offset) {
    TAILOR_CHECK(next_ == rows_, "all rows are there");
    if (format_.kind == WeightKind::nf4) finish_nf4(nf4_offset);
    return statistics_;
  }

 private:
  template <class T>
  static T* at(std::byte* base, std::int64_t index) {
    return reinterpret_cast<T*>(base) + index;
  }

  template <class Body>
  double each_row(std::int64_t begin, std::int64_t end, const float* values, const Body& body) {
    double total = 0;
    for (std::int64_t row = begin; row < end; ++row) {
      total += body(row, values + (row - begin) * columns_);
    }
    return total;
  }

  [[noreturn]] void refuse(std::int64_t row, std::int64_t column, float value) const {
    throw Error(Fault::bad_file,
                {"a weight is " + std::string(std::isnan(value) ? "not a number" : "infinite") +
                     "; " + format_text(format_) + " holds finite numbers only",
                 "row " + std::to_string(row) + ", column " + std::to_string(column),
                 "The checkpoint is damaged or its training diverged. Download it again, and check "
                 "it with the program that wrote it."});
  }

  void add_int4(std::int64_t begin, std::int64_t end, const float* values) {
    const std::int64_t row_bytes = div_ceil(columns_, 8) * 4;
    const std::int64_t row_scales = div_ceil(columns_, format_.group);
    for (std::int64_t row = begin; row < end; ++row) {
      const Int4Sums sums = kernels_.int4_row(
          values + (row - begin) * columns_, columns_, format_.group, any_sign_, scratch_.data(),
          at<std::uint8_t>(codes_, row * row_bytes), at<std::uint16_t>(scales_, row * row_scales));
      statistics_.squared_error += sums.squared_error;
      statistics_.absmax_squared_error += sums.absmax_squared_error;
    }
  }

  /// A row of blocks is encoded once its last row is there; rows of an unfinished one wait in
  /// held_.
  void add_fp8(std::int64_t begin, std::int64_t end, const float* values) {
    for (std::int64_t row = begin; row < end;) {
      const std::int64_t first = row / format_.block_rows * format_.block_rows;
      const std::int64_t after = std::min(first + format_.block_rows, rows_);
      const std::int64_t stop = std::min(after, end);
      const float* from = values + (row - begin) * columns_;
      if (row == first && stop == after) {
        fp8_blocks(first, after, from);
      } else {
        held_.insert(held_.end(), from, from + (stop - row) * columns_);
        if (stop == after) {
          fp8_blocks(first, after, held_.data());
          held_.clear();
        }
      }
      row = stop;
    }
  }
  void fp8_blocks(std::int64_t first, std::int64_t after, const float* values) {
    float* scale =
        at<float>(scales_, first / format_.block_rows * div_ceil(columns_, block_columns_));
    for (std::int64_t c = 0; c < columns_; c += block_columns_) {
      statistics_.squared_error += kernels_.fp8_block(
          values + c, after - first, std::min(block_columns_, columns_ - c), columns_, bf16_scales_,
          at<std::uint8_t>(codes_, first * columns_ + c), scale++);
    }
  }

  /// Blocks run on from row to row; the start of one whose end is not there yet waits in held_.
  void add_nf4(const float* values, std::int64_t count) {
    const std::int64_t elements = rows_ * columns_;
    while (count > 0) {
      const std::int64_t done = static_cast<std::int64_t>(blocks_.size()) * kNf4Block;
      const std::int64_t size = std::min(kNf4Block, elements - done);
      const float* block = values;
      std::int64_t taken = size;
      if (!held_.empty() || count < size) {
        taken = std::min(size - static_cast<std::int64_t>(held_.size()), count);
        held_.insert(held_.end(), values, values + taken);
        block = held_.data();
      }
      if (held_.empty() || static_cast<std::int64_t>(held_.size()) == size) {
        blocks_.push_back(
            kernels_.nf4_block(block, size, size < kNf4Block, at<std::uint8_t>(codes_, done / 2)));
        held_.clear();
      }
      values += taken;
      count -= taken;
    }
  }

  /// bitsandbytes' second quantisation: what absmax lies above their mean, in blocks of 256, as the
  /// nearest entry of the dynamic map. It multiplies by an inverse, and divides in the last block
  /// if that is not whole.
  void finish_nf4(std::optional<float> given_offset) {
    if (blocks_.empty()) {
      const float zero = 0;
      std::memcpy(scales_, &zero, sizeof zero);
      return;
    }
    constexpr float kFloor = 1e-38F;
    const float offset = given_offset ? *given_offset : exact_mean(blocks_);
    const auto count = static_cast<std::int64_t>(blocks_.size());
    const std::int64_t seconds = div_ceil(count, kNf4SecondBlock);
    std::memcpy(scales_, &offset, sizeof offset);
    float* second = at<float>(scales_, 1);
    std::uint8_t* bytes = at<std::uint8_t>(scales_, 4 + 4 * seconds);
    for (std::int64_t begin = 0; begin < count; begin += kNf4SecondBlock, ++second) {
      const std::int64_t end = std::min(begin + kNf4SecondBlock, count);
      const bool whole = end - begin == kNf4SecondBlock;
      float largest = 0;
      for (std::int64_t i = begin; i < end; ++i) {
        largest = std::max(largest, std::fabs(block(i).absmax - offset));
      }
      const float divisor = std::max(largest, kFloor);
      *second = whole ? largest : divisor;
      const float inverse = 1 / divisor;
      for (std::int64_t i = begin; i < end; ++i) {
        const float above = block(i).absmax - offset;
        bytes[i] = nearest_in_map(whole ? above * inverse : above / divisor);
        const float product = kDynamicMap[bytes[i]] * *second;
        add_nf4_error(block(i), product + offset);
      }
    }
  }
  const Nf4Block& block(std::int64_t i) const { return blocks_[static_cast<std::size_t>(i)]; }
  void add_nf4_error(const Nf4Block& block, float scale) {
    const auto absmax = static_cast<double>(block.absmax);
    if (absmax == 0) return;  // zeros, whose code is zero under any scale
    const double apart = static_cast<double>(scale) / absmax - 1;
    statistics_.squared_error +=
        absmax * absmax *
        (static_cast<double>(block.error) - 2 * apart * static_cast<double>(block.cross) +
         apart * apart * static_cast<double>(block.codes));
  }

  WeightFormat format_;
  std::int64_t rows_, columns_;
  std::byte *codes_, *scales_;
  bool any_sign_, bf16_scales_;
  const EncodeKernels& kernels_;
  std::int64_t block_columns_ = 0;
  std::int64_t next_ = 0;
  EncodeStatistics statistics_;
  std::vector<std::byte> scratch_;
  std::vector<float> held_;
  std::vector<Nf4Block> blocks_;
};

MatrixEncoder::MatrixEncoder(const WeightFormat& format, std::int64_t rows, std::int64_t columns,
                             std::byte* codes, std::byte* scales, const EncodeOptions& options)
    : MatrixEncoder(format, rows, columns, codes, scales, options,
                    *runnable_encode_levels().levels[0].kernels) {}
MatrixEncoder::MatrixEncoder(const WeightFormat& format, std::int64_t rows, std::int64_t columns,
                             std::byte* codes, std::byte* scales, const EncodeOptions& options,
                             const EncodeKernels& kernels)
    : work_(std::make_unique<Work>(format, rows, columns, codes, scales, options, kernels)) {}
MatrixEncoder::~MatrixEncoder() = default;

void MatrixEncoder::add_rows(std::int64_t begin, std::int64_t end, const float* values) {
  work_->add_rows(begin, end, values);
}
EncodeStatistics MatrixEncoder::finish(std::optional<float> nf4_offset) {
  return work_->finish(nf4_offset);
}

}  // namespace tailor
