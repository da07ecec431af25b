#include "recipes/tile_homes.h"

#include <algorithm>
#include <deque>
#include <optional>

#include "base/text.h"

namespace tailor {
namespace {

std::int64_t sum_of(const std::vector<PassTile>& tiles, const std::vector<TileHome>& homes,
                    TileHome home, bool all = true) {
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    if (homes[i] == home && (all || tiles[i].once)) bytes += tiles[i].bytes;
  }
  return bytes;
}

/// Moves tiles that a step needs once, or those that it needs twice, from disk to `home` as the
/// placement says, until none that is left fits.
void keep(const std::vector<PassTile>& tiles, TileHome home, bool once, std::int64_t& room,
          TilePlacement placement, std::vector<TileHome>& homes) {
  for (;;) {
    std::vector<std::size_t> open;
    double open_bytes = 0;
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      if (tiles[i].once != once || homes[i] != TileHome::disk || tiles[i].bytes > room) continue;
      open.push_back(i);
      open_bytes += static_cast<double>(tiles[i].bytes);
    }
    if (open.empty()) return;
    if (placement == TilePlacement::turn) std::reverse(open.begin(), open.end());
    const double share = std::min(1.0, static_cast<double>(room) / open_bytes);
    double passed = 0, kept = 0;
    for (const std::size_t i : open) {
      const auto bytes = static_cast<double>(tiles[i].bytes);
      passed += bytes;
      // The last tile of a round in which none was due is due: each round keeps at least one.
      const bool due = placement == TilePlacement::turn || share * passed - kept >= bytes / 2;
      if (!due || tiles[i].bytes > room) continue;
      homes[i] = home;
      room -= tiles[i].bytes;
      kept += bytes;
    }
  }
}

/// The smallest tile that is still on disk, where `budget` is above 0 and does not hold it.
std::optional<BudgetTooSmall> too_small(const std::vector<PassTile>& tiles,
                                        const std::vector<TileHome>& homes, TileHome home,
                                        std::int64_t budget) {
  std::optional<std::int64_t> smallest;
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    if (homes[i] == TileHome::disk)
      smallest = std::min(smallest.value_or(tiles[i].bytes), tiles[i].bytes);
  }
  if (budget == 0 || !smallest || budget >= *smallest) return std::nullopt;
  return BudgetTooSmall{home, budget, *smallest};
}

}  // namespace

Error::Parts BudgetTooSmall::parts() const {
  const std::string key = home == TileHome::device ? "base.device_memory" : "base.host_memory";
  return {key + " of " + std::to_string(budget_bytes) + " bytes holds no tile of weights, the " +
              "smallest has " + std::to_string(smallest_bytes) + " bytes",
          key,
          "Set " + key + ": " + std::to_string(smallest_bytes) +
              " or more, or 0 to keep no tiles there."};
}

std::variant<TileHomes, BudgetTooSmall> choose_homes(const std::vector<PassTile>& tiles,
                                                     std::int64_t device_budget_bytes,
                                                     std::int64_t host_budget_bytes,
                                                     TilePlacement placement) {
  TAILOR_CHECK(device_budget_bytes >= 0 && host_budget_bytes >= 0);
  TileHomes out;
  out.homes.assign(tiles.size(), TileHome::disk);
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    TAILOR_CHECK(tiles[i].bytes >= 0);
    if (tiles[i].bytes == 0) out.homes[i] = TileHome::device;
  }
  const std::pair<TileHome, std::int64_t> budgets[] = {{TileHome::device, device_budget_bytes},
                                                       {TileHome::host, host_budget_bytes}};
  for (const auto& [home, budget] : budgets) {
    if (const auto problem = too_small(tiles, out.homes, home, budget)) return *problem;
    std::int64_t room = budget;
    for (const bool once : {false, true}) keep(tiles, home, once, room, placement, out.homes);
  }
  out.device_bytes = sum_of(tiles, out.homes, TileHome::device);
  out.host_bytes = sum_of(tiles, out.homes, TileHome::host);
  out.disk_bytes = sum_of(tiles, out.homes, TileHome::disk);
  out.disk_once_bytes = sum_of(tiles, out.homes, TileHome::disk, false);
  return out;
}

double simulate_pass(const std::vector<PassTile>& tiles, const std::vector<TileHome>& homes,
                     double link_bytes_per_second, std::int64_t ring_bytes) {
  TAILOR_CHECK(tiles.size() == homes.size() && link_bytes_per_second > 0);
  struct Slot {
    std::int64_t bytes = 0;
    double free_at = 0;  ///< when computing with its tile ends
  };
  std::deque<Slot> ring;
  std::int64_t in_ring = 0;
  double link_free = 0, computed = 0;
  for (std::size_t use = 0; use < 2 * tiles.size(); ++use) {
    const bool forward = use < tiles.size();
    const std::size_t i = forward ? use : 2 * tiles.size() - 1 - use;
    const PassTile& tile = tiles[i];
    const double work = forward ? tile.forward_seconds : tile.backward_seconds;
    if (homes[i] == TileHome::device || (tile.once && !forward)) {
      computed += work;
      continue;
    }
    TAILOR_CHECK(tile.bytes <= ring_bytes, "the ring holds no tile");
    while (in_ring + tile.bytes > ring_bytes) {
      link_free = std::max(link_free, ring.front().free_at);
      in_ring -= ring.front().bytes;
      ring.pop_front();
    }
    link_free += static_cast<double>(tile.bytes) / link_bytes_per_second;
    computed = std::max(computed, link_free) + work;
    ring.push_back({tile.bytes, computed});
    in_ring += tile.bytes;
  }
  return computed;
}

}  // namespace tailor
