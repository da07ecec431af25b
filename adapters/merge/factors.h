#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "adapters/peft_reader.h"

namespace tailor {

/// Factors of a run of experts of one site, in memory while somebody uses them.
struct FactorGroup {
  std::int64_t first = 0, count = 0;  ///< experts
  std::int64_t rank = 0, in = 0, out = 0;
  std::vector<float> a_ri, b_ro;  ///< [count, rank, in], [count, rank, out]
  std::vector<char> zero;         ///< [count]: the product is zero, whatever the input

  const float* a_of(std::int64_t expert) const {
    return a_ri.data() + (expert - first) * rank * in;
  }
  const float* b_of(std::int64_t expert) const {
    return b_ro.data() + (expert - first) * rank * out;
  }
  bool is_zero(std::int64_t expert) const {
    return zero[static_cast<std::size_t>(expert - first)] != 0;
  }
};

/// Hands the factors of several adapters to threads, group by group, so that an adapter may be
/// larger than memory. A group is read once for all who ask while somebody holds it, and the last
/// two of each adapter are kept.
class FactorGroups {
 public:
  /// Of a group; one expert's factors where they are larger.
  static constexpr std::int64_t kGroupBytes = std::int64_t{24} << 20;
  explicit FactorGroups(std::vector<const PeftReader*> adapters);

  std::shared_ptr<const FactorGroup> get(std::size_t adapter, std::size_t site,
                                         std::int64_t expert);
  /// The largest group of an adapter, in bytes.
  static std::int64_t group_bytes_max(const PeftReader& adapter);

 private:
  using Key = std::tuple<std::size_t, std::size_t, std::int64_t>;
  struct Entry {
    std::mutex reading;
    std::weak_ptr<const FactorGroup> group;
  };
  std::vector<const PeftReader*> adapters_;
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<Entry>> entries_;
  struct Recent {
    std::shared_ptr<const FactorGroup> last, before;
  };
  std::vector<Recent> recent_;
};

}  // namespace tailor
