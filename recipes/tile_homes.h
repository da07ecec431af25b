#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "base/error.h"

namespace tailor {

/// Where a tile of frozen weights waits: on the device, in RAM behind it, or on disk.
enum class TileHome : std::uint8_t { device, host, disk };

/// One tile in the order in which the forward pass uses it; the backward pass goes the other way.
/// A stretch of computing without weights of its own is a tile of 0 bytes: it never streams.
struct PassTile {
  std::int64_t bytes = 0;
  double forward_seconds = 0, backward_seconds = 0;  ///< of computing with it
  bool once = false;  ///< the backward pass does without it, as with the head
};

struct TileHomes {
  std::vector<TileHome> homes;       ///< as long as the tiles
  std::int64_t device_bytes = 0;     ///< kept there, never above the budget
  std::int64_t host_bytes = 0;       ///< likewise
  std::int64_t disk_bytes = 0;       ///< the rest
  std::int64_t disk_once_bytes = 0;  ///< of them, of tiles that a step needs once
  std::int64_t streamed_bytes() const { return host_bytes + disk_bytes; }  ///< a forward pass
};

/// A budget above 0 that does not hold one tile.
struct BudgetTooSmall {
  TileHome home = TileHome::device;
  std::int64_t budget_bytes = 0, smallest_bytes = 0;  ///< what was given; what holds a tile
  /// For Error{does_not_fit}: names base.device_memory or base.host_memory.
  Error::Parts parts() const;
};

/// even: the kept tiles are spread so that what streams is as even as possible over the pass's
/// bytes. turn: the last tiles are kept, which the backward pass begins with.
enum class TilePlacement { even, turn };

/// Homes for the tiles of a pass. Budgets are in bytes, >= 0; 0 keeps nothing there. Of the tiles
/// that are not on the device, as many as the host's budget holds wait in RAM, spread likewise.
/// Tiles that a step needs once are kept last: a byte of them saves half as much. What stays unused
/// of a budget is smaller than every tile it left over. Linear in the tiles where they are alike.
///
/// Even is error diffusion: along the pass a tile is kept once the bytes that should be kept by its
/// end (the budget's share of all bytes so far) are ahead of those that are by half of it. Where
/// sizes differ, what then still fits is spread over the rest in the same way.
std::variant<TileHomes, BudgetTooSmall> choose_homes(const std::vector<PassTile>& tiles,
                                                     std::int64_t device_budget_bytes,
                                                     std::int64_t host_budget_bytes,
                                                     TilePlacement placement = TilePlacement::even);

/// Seconds of a forward and a backward pass. Every tile that is not on the device crosses one link,
/// in order of use, once in each pass that needs it, into a ring of `ring_bytes`; it takes its
/// place from the start of its copy to the end of its computing. Computing goes tile by tile and
/// waits for the tile it needs; the link waits for room. The ring must hold the largest streamed
/// tile.
double simulate_pass(const std::vector<PassTile>& tiles, const std::vector<TileHome>& homes,
                     double link_bytes_per_second, std::int64_t ring_bytes);

}  // namespace tailor
