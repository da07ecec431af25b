#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "adapters/merge/cpu/low_rank.h"
#include "adapters/merge/factors.h"
#include "adapters/merge/plan.h"
#include "adapters/merge/slice_io.h"
#include "base/aligned_memory.h"
#include "data/quant/cpu/encode.h"

namespace tailor {

/// XXH3-128 of bytes, as canonical (big-endian) bytes.
using PieceDigest = std::array<std::byte, 16>;
PieceDigest piece_digest(std::span<const std::byte> bytes);

inline std::span<const std::byte> span_of(const std::byte* bytes, std::int64_t count) {
  return {bytes, static_cast<std::size_t>(count)};
}

/// What each of the 256 fp8 codes stands for, scales aside.
const float* e4m3_table();

/// Rows of a part with a scale a column that are decoded at a time.
std::int64_t column_strip_rows(const MergePart& part);

/// What is kept of a job that was done.
struct MergedPiece {
  PieceDigest in{}, out{};                ///< of the tensor itself
  PieceDigest in_scales{}, out_scales{};  ///< zero where there are none
  MergeSums sums;                         ///< zero where nothing was added
};

/// The files of a merge, shared by its threads.
struct MergeFiles {
  std::vector<std::unique_ptr<SliceSource>> sources;  ///< by shard
  std::vector<std::unique_ptr<SliceTarget>> targets;
};

/// Does a merge's jobs one after the other. One object a thread; what it holds is memory_bytes().
class MergeWorker {
 public:
  MergeWorker(const MergePlan& plan, const MergeFiles& files, FactorGroups& factors);

  /// Reads the job's piece, adds what the adapters change, writes it. Throws Error: io; bad_file,
  /// naming tensor and row, for a base that holds a NaN or a sum that its type cannot hold.
  MergedPiece run(const MergeJob& job);

  /// What the largest job of a plan takes.
  static std::int64_t memory_bytes(const MergePlan& plan);

 private:
  struct Terms {
    std::vector<std::shared_ptr<const FactorGroup>> groups;
    std::vector<const float*> vectors;
    std::vector<float> coefficients;
    std::int64_t count = 0;
  };
  /// The factors of a job; none where they change nothing.
  void take_terms(const MergePart& part, const MergeJob& job);
  void fill_coefficients(const MergePart& part, const MergeJob& job, std::int64_t first_row,
                         std::int64_t rows);
  MergedPiece copy(const MergeTensor& in, const MergeTensor& out, const MergeJob& job);
  MergedPiece plain(const MergePart& part, const MergeJob& job);
  MergedPiece quantised(const MergePart& part, const MergeJob& job);
  /// fp8 with a scale a column, written in fp8 again: a whole slice.
  MergedPiece columns(const MergePart& part, const MergeJob& job);
  void add_to_strip(const MergePart& part, const MergeJob& job, std::int64_t first,
                    std::int64_t rows, MergeSums* sums);
  MergedPiece copy_encoded(const MergePart& part, const MergeJob& job);
  void write_scales(const MergePart& part, const MergeJob& job, const std::vector<float>& scales,
                    MergedPiece* done);
  struct EncodedRows {
    std::int64_t count;
    const std::byte* codes;
    Dtype scale_type;
    const float* scales = nullptr;  ///< null: INT4's, in bfloat16
    const std::byte* raw_scales = nullptr;
  };
  void decode(const MergePart& part, const EncodedRows& rows, float* out) const;
  void write(const MergeTensor& tensor, std::int64_t offset,
             std::span<const std::byte> bytes) const;
  void check_sums(const MergePart& part, const MergeJob& job, std::int64_t first_row,
                  const MergeSums& sums, const float* values, std::int64_t rows) const;

  const MergePlan& plan_;
  const MergeFiles& files_;
  FactorGroups& factors_;
  const LowRankKernels& kernels_;
  const EncodeKernels& encode_;
  Terms terms_;
  AlignedMemory in_, in_scales_, out_, out_scales_;
  std::vector<float> base_, target_, stored_;
};

}  // namespace tailor
