#pragma once

#include <algorithm>
#include <cstdint>

namespace tailor {

// Sizes of the weight stream that plan and trainer share.

/// Neighbouring experts are read together up to this many bytes: large enough for a disk, small
/// enough that a ring holds some of them.
constexpr std::int64_t kTileBytes = std::int64_t{16} << 20;
/// Slots of experts hold at least about this much, so that reading goes on while attention
/// computes; at least three slots. share_budget() says where they hold more.
constexpr std::int64_t kRingBytes = std::int64_t{320} << 20;
/// Slots of vocabulary runs, which follow each other quickly.
constexpr std::int64_t kHeadRingBytes = std::int64_t{96} << 20;
/// Slots of attention, and of MLPs with their router: the one in use and the next.
constexpr std::int64_t kLayerSlots = 2;

/// Slots of experts on a device behind RAM, as many as the plan counts on: they even out what a
/// layer computes without its experts. And of vocabulary runs.
constexpr std::int64_t kDeviceExpertSlots = 16, kDeviceHeadSlots = 3;

/// Whole tiles of experts, or of the vocabulary, that ranks gather ahead: the one in use, the next,
/// and one under way.
constexpr std::int64_t kGatherSlots = 3;

constexpr std::int64_t experts_per_tile(std::int64_t expert_bytes, std::int64_t experts) {
  return std::clamp<std::int64_t>(kTileBytes / std::max<std::int64_t>(1, expert_bytes), 1, experts);
}
/// Three let one read finish while the next begins and one is used.
constexpr std::int64_t ring_slots(std::int64_t tile_bytes, std::int64_t ring_bytes = kRingBytes) {
  return tile_bytes == 0 ? 0 : std::clamp<std::int64_t>(ring_bytes / tile_bytes, 3, 256);
}

/// A budget of tiles in RAM where it does not hold all of them.
struct BudgetShare {
  std::int64_t ring_bytes = kRingBytes;  ///< of the slots of experts
  std::int64_t resident_bytes = 0;       ///< left of the budget for tiles that stay
};
/// Reading stops when the slots are full, and most of what a layer computes it computes without
/// experts: until they hold what can be read meanwhile, slots save more than resident tiles do
/// (docs/benchmarks.md, "Weights from disk"). They get at most a quarter of the budget, and at most
/// what streams of one layer's experts; the first kRingBytes are not taken from the budget.
constexpr BudgetShare share_budget(std::int64_t budget_bytes, std::int64_t all_bytes,
                                   std::int64_t layer_expert_bytes) {
  if (budget_bytes >= all_bytes) return {kRingBytes, budget_bytes};
  const double streamed = 1 - static_cast<double>(budget_bytes) /
                                  static_cast<double>(std::max<std::int64_t>(1, all_bytes));
  const auto of_layer =
      static_cast<std::int64_t>(static_cast<double>(layer_expert_bytes) * streamed);
  const std::int64_t ring = std::max(kRingBytes, std::min(budget_bytes / 4, of_layer));
  return {ring, budget_bytes - (ring - kRingBytes)};
}

}  // namespace tailor
