#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <utility>
#include <vector>

#include "adapters/peft_reader.h"

namespace tailor {

/// A site, or the gate's or up's share of one: rows [first, first + width) of its outputs.
struct SitePart {
  const LoraSite* site = nullptr;  ///< null: factors of zero, of `in` and `width`
  std::int64_t first = 0, width = 0, in = 0, experts = 1;
};

/// The factors of an adapter brought to one rank and one scale. Rows of A and B whose product is
/// zero (either side is) are dropped, what is left moves to the front, and zeros fill up: the
/// products stay what they were, but for rounding where a scale is folded into B.
class UniformFactors {
 public:
  /// Reads all factors once, to find the smallest rank that holds every part. `reader` and the
  /// sites must outlive it.
  UniformFactors(const PeftReader& reader, const std::vector<SitePart>& parts);

  std::int64_t rank() const noexcept { return rank_; }
  double scale() const noexcept { return scale_; }          ///< what is left to alpha / rank
  std::int64_t folded() const noexcept { return folded_; }  ///< sites whose scale went into B
  std::int64_t padded() const noexcept { return padded_; }  ///< sites of another rank before

  /// A [experts, rank, in] and B [experts, rank, width] of one part. The last few are kept.
  std::shared_ptr<const LoadedFactors> of(const SitePart& part);

 private:
  std::shared_ptr<const LoadedFactors> load(const LoraSite& site);
  std::vector<std::int64_t> live_rows(const LoadedFactors& factors, const SitePart& part,
                                      std::int64_t expert) const;

  const PeftReader& reader_;
  std::int64_t rank_ = 1, folded_ = 0, padded_ = 0;
  double scale_ = 1;
  std::pair<const LoraSite*, std::shared_ptr<const LoadedFactors>> loaded_;
  struct Kept {
    const LoraSite* site;
    std::int64_t first, in, width, experts;
    std::shared_ptr<const LoadedFactors> factors;
  };
  std::list<Kept> kept_;
};

}  // namespace tailor
