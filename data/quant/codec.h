#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "data/quant/format.h"

namespace tailor {

struct EncodeKernels;

// The plain truth about the formats of data/quant/format.h: one number after another, with the
// operations and roundings of each format's owner. trainer/kernels has the fast decoders, which
// give the same bits. docs/formats/weights.md says the same in words.

/// Decodes rows [row_begin, row_end) into out[row_end - row_begin, columns].
///
/// f32   as stored.
/// bf16  widened.
/// fp8   e4m3 value * block scale, one float32 product (DeepSeek's weight_dequant).
/// int4  bf16(code * scale): compressed-tensors multiplies in the scale's type, so the value is a
///       bfloat16 in both functions.
/// nf4   block scale = map[byte] * second + offset with each operation rounded to float32, never
///       fused; value = kNf4[code] * block scale in float32 (bitsandbytes' dequantize_4bit).
///
/// Where a product is no number, its sign is the fp8 code's and its payload 0x7FC00000 (for bf16
/// 0x7FC0), so that results can be compared as bytes; f32 and bf16 sources keep theirs when the
/// type stays or widens.
void decode_rows(const EncodedMatrix& matrix, std::int64_t row_begin, std::int64_t row_end,
                 float* out);

/// The same as bfloat16: decode_rows rounded once, to nearest, ties to even.
void decode_rows_bf16(const EncodedMatrix& matrix, std::int64_t row_begin, std::int64_t row_end,
                      std::uint16_t* out);

/// For every element of a row the largest |decoded - original| an encoder that takes the nearest
/// code can cause: `values` is the original row [columns], `bounds` [columns] receives the bounds.
/// They hold for decode_rows and depend on the stored codes and scales, so that a store can be
/// checked against its checkpoint without encoding again.
///
/// f32   0.
/// bf16  half a unit in the last of its 8 bits.
/// fp8   half of e4m3's distance at the value, or what lies above 448 scales.
/// int4  half a scale; for values below -8 or above 7 scales what lies beyond, as scales are
///       chosen to clip a few. And half a unit of bfloat16, which the decoded value is.
/// nf4   half of NF4's wider gap at the code, times the block's largest value, which the stored
///       scale tells up to half of the dynamic map's gap at the byte.
/// With scales there are 2^-20 scales more, for what float32 rounds on the way.
void error_bounds(const EncodedMatrix& matrix, std::int64_t row, const float* values,
                  double* bounds);

/// How an encoder did, over all elements.
struct EncodeStatistics {
  double squared_error = 0;  ///< sum of (decoded - original)^2; decode_rows' values
  double squares = 0;        ///< sum of original^2
  /// int4: the squared error of compressed-tensors' symmetric min-max scale at the same group:
  /// bf16(absmax / 7.5), codes rounded to nearest even and clamped to [-8, 7]. Others: 0.
  double absmax_squared_error = 0;
};

/// Which scales int4 may have. Signed ones let the value farthest from zero take code -8 whatever
/// its sign, as in GGUF's Q4_0, but compressed-tensors' own compressor never writes a negative one.
enum class Int4Scales { positive, any_sign };
/// fp8's scales are floats; checkpoints may hold them as bfloat16, so that codes are to be encoded
/// under a scale that is one.
enum class Fp8Scales { f32, bf16 };

struct EncodeOptions {
  Int4Scales int4_scales = Int4Scales::positive;
  Fp8Scales fp8_scales = Fp8Scales::f32;
};

/// Encodes a matrix row by row into arrays of code_bytes() and scale_bytes() that the caller owns
/// and that stay where they are. Results depend neither on how rows are cut into calls nor on the
/// machine. Memory: one row (int4); 128 rows of float where a call ends within a row of fp8 blocks;
/// 12 bytes a block (nf4).
///
/// int4: scales are bfloat16, at least 2^-126, found by a search for the least squared error of the
/// decoded values (docs/formats/weights.md); codes are rint(value / scale) clamped to [-8, 7].
/// nf4:  codes and scales as bitsandbytes.quantize_4bit(blocksize=64, compress_statistics=True)
///       defines them, but for the offset: the mean of the absmax, correctly rounded.
/// fp8:  fp8_scale(absmax); code = e4m3(value / scale), to nearest even, saturated at 448.
/// f32, bf16: as they are, or rounded to nearest even.
class MatrixEncoder {
 public:
  MatrixEncoder(const WeightFormat& format, std::int64_t rows, std::int64_t columns,
                std::byte* codes, std::byte* scales, const EncodeOptions& options = {});
  /// At one instruction-set level of data/quant/cpu/encode.h, for tests and benchmarks.
  MatrixEncoder(const WeightFormat& format, std::int64_t rows, std::int64_t columns,
                std::byte* codes, std::byte* scales, const EncodeOptions& options,
                const EncodeKernels& kernels);
  MatrixEncoder(const MatrixEncoder&) = delete;
  MatrixEncoder& operator=(const MatrixEncoder&) = delete;
  ~MatrixEncoder();

  /// Rows [begin, end) of values[end - begin, columns]; `begin` is where the last call ended.
  /// Throws Error{bad_file} naming row and column of a value that is infinite or no number.
  void add_rows(std::int64_t begin, std::int64_t end, const float* values);

  /// After the last row: writes what needs all rows. Then the codes and scales are whole.
  /// `nf4_offset`: to use in place of the mean, such as torch's, which sums in float32 and is now
  /// and then another.
  EncodeStatistics finish(std::optional<float> nf4_offset = std::nullopt);

 private:
  class Work;
  std::unique_ptr<Work> work_;
};

}  // namespace tailor
