#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "adapters/merge/cpu/low_rank.h"
#include "adapters/merge/plan.h"
#include "base/file.h"

namespace tailor {

struct MergeProgress {
  std::int64_t bytes_done = 0, bytes = 0;  ///< of the base
  std::int64_t bytes_before = 0;           ///< found done, from an earlier attempt
  double seconds = 0;                      ///< since this process began
  int in_flight = 0;                       ///< threads at work
};

struct MergeOptions {
  struct AdapterFolder {
    fs::path folder;
    double weight = 1;
  };
  std::vector<AdapterFolder> adapters;
  MergeDtype dtype = MergeDtype::as_base;
  std::string base_name;  ///< as the user gave it, for the receipt
  /// Which base the adapters' changes are meant for, where they were trained on other numbers than
  /// the published ones (base_record.h): `original` those all the same, `trained` the dequantised
  /// ones, which the base then has to be. Unset, such an adapter is refused.
  enum class Onto { unset, original, trained };
  Onto onto = Onto::unset;
  /// Of the published model, where `base` was decoded from a store of it; else empty.
  std::string base_fingerprint;
  int threads = 0;  ///< 0: twice the cores, so that some read and write while others compute
  std::int64_t memory_bytes_max = std::int64_t{1} << 30;
  std::function<void(const MergeProgress&)> progress;  ///< about twice a second
  std::function<bool()> stop;  ///< asked often, by all threads: true ends it, resumable
};

/// How the adapters changed some tensors, and what of it is in the merged ones.
struct MergeShares {
  double relative_change = 0;  ///< |change| / |base|
  double error = 0;            ///< |merged - (base + change)| / |base|: rounding, or quantisation
  double kept = 1;             ///< <merged - base, change> / |change|^2
};
MergeShares shares_of(const MergeSums& sums);

struct MergeReport {
  bool was_complete = false;  ///< the folder held this very merge already; what follows is its own
  std::int64_t base_bytes = 0, bytes = 0;
  std::int64_t tensors = 0, adapted = 0;
  std::int64_t jobs = 0, jobs_before = 0;
  MergeShares shares;             ///< over all adapted tensors
  std::string least_kept_tensor;  ///< that kept least of its change
  double least_kept = 1;
  std::int64_t below_limit = 0;  ///< tensors that kept less than kKeptLimit
  bool quantised = false;        ///< some adapted tensor was quantised again
  std::int64_t peak_rss_bytes = 0;
  double seconds = 0;
  std::vector<std::string> notes;
};
constexpr double kKeptLimit = 0.8;

/// Adds the adapters' products to the base's weights and writes the result into the new folder
/// `out`, with the base's tokenizer, configs and everything else that is no weight. Goes shard by
/// shard and piece by piece, several in flight, past the page cache; holds a few pieces and a few
/// experts' factors, whatever the tensors' sizes. Sums are in float32, rounded once.
///
/// The folder appears whole or not at all: it is filled as .NAME.tailor-merge beside `out`, which a
/// later call goes on with, to the same bytes. A receipt (receipt.h) lies in it.
/// Throws Error: usage (`out` holds something else, or is the base), bad_file (base or adapter),
/// does_not_fit (memory_bytes_max, or the disk, before anything is written), io (resumable),
/// stopped (resumable).
MergeReport merge_adapters(const fs::path& base, const fs::path& out, const MergeOptions& options);

}  // namespace tailor
