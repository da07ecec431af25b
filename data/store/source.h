#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/published.h"
#include "data/quant/format.h"

namespace tailor {

/// A checkpoint's matrices as rows of numbers, whatever they are published as: F32, F16, BF16; fp8
/// with DeepSeek's 128 x 128 block scales (`weight_scale_inv`) or with one scale an output
/// (`weight_scale`, `gate_up_proj_scale`); INT4 as compressed-tensors packs it (`weight_packed`,
/// `weight_scale`); plain or with all experts fused in one tensor.
///
/// Reads with plain reads into memory of its own, a slice at a time, and lets go of the file's
/// pages: what it holds is one expert's slice of one tensor, or a few rows. One object a thread.
class SourceReader {
 public:
  explicit SourceReader(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}
  SourceReader(const SourceReader&) = delete;
  SourceReader& operator=(const SourceReader&) = delete;
  ~SourceReader();

  /// The form a matrix is published in; F16 counts as f32, which holds it. Throws Error{bad_file}:
  /// missing or of another shape, scales missing or of the wrong size, an unknown element type.
  static WeightFormat published_format(const Checkpoint& checkpoint, const PublishedMatrix& matrix);
  /// Files of the checkpoint that hold a matrix and its scales.
  static std::vector<std::size_t> shards_of(const Checkpoint& checkpoint,
                                            const PublishedMatrix& matrix);

  /// Rows [begin, end) as floats, [end - begin, columns].
  void read_rows(const PublishedMatrix& matrix, std::int64_t begin, std::int64_t end, float* out);
  /// Rows [begin, end) of codes and scales as they are published, for a store that keeps the form.
  /// Only where `format` is published_format(), the matrix plain, and begin = 0 and end = rows
  /// unless the format has no scales. False where it cannot: read and encode the rows then.
  bool copy_encoded(const PublishedMatrix& matrix, const WeightFormat& format, std::int64_t begin,
                    std::int64_t end, std::byte* codes, std::byte* scales);

  std::int64_t bytes_read() const { return bytes_read_; }

 private:
  const std::byte* slice(const Checkpoint::Tensor& tensor, std::int64_t offset, std::int64_t bytes,
                         int buffer);
  void read(const Checkpoint::Tensor& tensor, std::int64_t offset, std::int64_t bytes,
            std::byte* to);
  void read_fused_rows(const PublishedMatrix& matrix, const Checkpoint::Tensor& tensor,
                       std::int64_t begin, std::int64_t end, float* out);

  struct Slice {
    std::string tensor;
    std::int64_t offset = -1, bytes = 0;
    std::vector<std::byte> memory;
  };
  const Checkpoint& checkpoint_;
  std::map<std::size_t, int> descriptors_;  ///< by shard
  Slice slices_[2];                         ///< codes, scales: the last ones read
  std::int64_t bytes_read_ = 0;
};

}  // namespace tailor
