#pragma once

#include <algorithm>
#include <cstdint>

namespace tailor {

// Sizes of the weight stream that plan and trainer share.

/// Neighbouring experts are read together up to this many bytes: large enough for a disk, small
/// enough that a ring holds some of them.
constexpr std::int64_t kTileBytes = std::int64_t{16} << 20;
/// Slots of experts hold about this much, so that reading goes on while attention computes; at
/// least three slots.
constexpr std::int64_t kRingBytes = std::int64_t{320} << 20;
/// Slots of vocabulary runs, which follow each other quickly.
constexpr std::int64_t kHeadRingBytes = std::int64_t{96} << 20;
/// Slots of attention, and of MLPs with their router: the one in use and the next.
constexpr std::int64_t kLayerSlots = 2;

/// Whole tiles of experts, or of the vocabulary, that ranks gather ahead: the one in use, the next,
/// and one under way.
constexpr std::int64_t kGatherSlots = 3;

constexpr std::int64_t experts_per_tile(std::int64_t expert_bytes, std::int64_t experts) {
  return std::clamp<std::int64_t>(kTileBytes / std::max<std::int64_t>(1, expert_bytes), 1, experts);
}
/// Three let one read finish while the next begins and one is used.
constexpr std::int64_t ring_slots(std::int64_t tile_bytes, std::int64_t ring_bytes = kRingBytes) {
  return tile_bytes == 0 ? 0 : std::clamp<std::int64_t>(ring_bytes / tile_bytes, 3, 64);
}

}  // namespace tailor
