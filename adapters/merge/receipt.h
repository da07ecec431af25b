#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "adapters/merge/merge.h"
#include "adapters/merge/worker.h"
#include "base/json.h"

namespace tailor {

/// The file in a merged folder that says what it was made from and what became of every tensor:
/// docs/merging.md has its fields.
constexpr const char* kReceiptName = "merge_receipt.json";

/// Of the pieces of a tensor, in order: XXH3-128 over their XXH3-128.
PieceDigest tensor_digest(const std::vector<PieceDigest>& pieces);

/// What became of the tensors: of each output in the plan's order.
struct MergedTensor {
  PieceDigest out{};              ///< its digest
  std::optional<std::size_t> in;  ///< the input it came from
  PieceDigest in_digest{};
  bool adapted = false;
  MergeSums sums;
};
std::vector<MergedTensor> merged_tensors(const MergePlan& plan,
                                         const std::map<std::size_t, MergedPiece>& done);

struct ReceiptFacts {
  std::string mark, fingerprint, onto;
  Json base, adapters;                       ///< where they are, and their files' digests
  std::map<std::string, std::string> files;  ///< SHA-256 of what is no weight
  Json run;                                  ///< peak RSS, seconds, bytes per second, ...
};
void write_receipt(const fs::path& folder, const MergePlan& plan,
                   const std::vector<MergedTensor>& tensors, const ReceiptFacts& facts,
                   const MergeReport& report, MergeDtype dtype);

/// The mark of the receipt in `folder`; empty where there is none that can be read.
std::string receipt_mark(const fs::path& folder);

struct MergeVerification {
  std::int64_t tensors = 0, bytes = 0, files = 0;
  double seconds = 0;
  std::vector<std::string> problems;
};
struct VerifyMergeOptions {
  fs::path base;  ///< to be compared with what the receipt says of the base; empty: not looked at
  std::vector<fs::path> adapters;  ///< likewise
  int threads = 1;
  std::function<void(std::int64_t done, std::int64_t bytes, double seconds)> progress;
  std::function<bool()> stop;
};
/// Compares a merged folder with its receipt: every tensor's and file's digest. Throws Error:
/// bad_file where there is no receipt or it cannot be read; io; stopped.
MergeVerification verify_merge(const fs::path& folder, const VerifyMergeOptions& options);

}  // namespace tailor
