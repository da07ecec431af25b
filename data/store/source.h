#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/aligned_memory.h"
#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/published.h"
#include "data/store/source_form.h"

namespace tailor {

/// A checkpoint's matrices as rows of numbers, in every form source_form.h knows.
///
/// Reads with plain reads into memory of its own, a slice at a time, and lets go of the file's
/// pages: what it holds is one expert's slice of one tensor, or a few rows. One object a thread.
class SourceReader {
 public:
  explicit SourceReader(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}
  SourceReader(const SourceReader&) = delete;
  SourceReader& operator=(const SourceReader&) = delete;
  ~SourceReader();

  /// Rows [begin, end) as floats, [end - begin, columns], exactly as the form's owner decodes them.
  /// Of fp8 blocks `begin` should be a multiple of 128: else rows before it are read as well.
  void read_rows(const PublishedMatrix& matrix, std::int64_t begin, std::int64_t end, float* out);

  /// Rows [begin, end) of codes and scales as they are published, for a store that keeps the form:
  /// codes and scales bit for bit, but that int4's scales in F16 or F32 are rounded to bfloat16.
  /// Only where `format` is published_format() of other than F16, and begin = 0 and end = rows
  /// unless the format has no scales. False where it cannot: read and encode the rows then. Throws
  /// Error{bad_file}, naming tensor, row and column: a number that is infinite or none.
  bool copy_encoded(const PublishedMatrix& matrix, const WeightFormat& format, std::int64_t begin,
                    std::int64_t end, std::byte* codes, std::byte* scales);

  /// Asks the system to begin reading rows [begin, end) of a matrix; does not wait.
  void read_ahead(const PublishedMatrix& matrix, std::int64_t begin, std::int64_t end);

  /// Bytes this object holds while it reads a matrix in pieces of `rows` rows.
  static std::int64_t memory_bytes(const PublishedMatrix& matrix, const WeightFormat& published,
                                   std::int64_t rows);
  /// Gives its memory back.
  void release();

  std::int64_t bytes_read() const { return bytes_read_; }

 private:
  enum Buffer { kCodes, kScales };
  int descriptor_of(const Checkpoint::Tensor& tensor);
  const std::byte* slice(const Checkpoint::Tensor& tensor, std::int64_t offset, std::int64_t bytes,
                         Buffer buffer);
  void read(const Checkpoint::Tensor& tensor, std::int64_t offset, std::int64_t bytes,
            std::byte* to);
  void read_fused_rows(const PublishedMatrix& matrix, const SourceMatrix& source,
                       std::int64_t begin, std::int64_t end, float* out);
  void read_int4_rows(const PublishedMatrix& matrix, const SourceMatrix& source, std::int64_t begin,
                      std::int64_t end, float* out);
  std::vector<float> scales_of(const Checkpoint::Tensor& scales, std::int64_t begin,
                               std::int64_t count);
  void copy_fused(const PublishedMatrix& matrix, const SourceMatrix& source, std::int64_t begin,
                  std::int64_t end, std::byte* codes, std::byte* scales);
  void copy_scales(const SourceMatrix& source, std::int64_t begin, std::int64_t count,
                   std::byte* to);

  struct Slice {
    std::string tensor;
    std::int64_t offset = -1, bytes = 0;
    AlignedMemory memory;
  };
  const Checkpoint& checkpoint_;
  std::map<std::size_t, int> descriptors_;  ///< by shard
  Slice slices_[2];                         ///< codes, scales: the last ones read
  std::int64_t bytes_read_ = 0;
};

}  // namespace tailor
