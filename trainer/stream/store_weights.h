#pragma once

#include <memory>
#include <optional>

#include "base/block_reader.h"
#include "data/store/store.h"
#include "trainer/ranks/ranks.h"
#include "trainer/stream/device_ring.h"
#include "trainer/stream/frozen_weights.h"

namespace tailor {

struct StreamOptions {
  /// Budgets of resident tiles, bytes; what they do not hold comes from disk whenever it is used.
  /// On the CPU both are RAM. Unset: everything is resident. Where tiles stream, the slots they are
  /// read into come on top, and beyond the first 320 MiB of experts' slots from the budget for RAM:
  /// see share_budget().
  std::optional<std::int64_t> device_bytes, host_bytes;
  /// Of the slots experts are read into, and on top of the budgets; 0: as share_budget() says.
  std::int64_t ring_bytes = 0;
  /// Neighbouring experts read together; 0: about 16 MiB. Results do not depend on it.
  std::int64_t experts_per_tile = 0;
  BlockReader::Options reader;
  /// Tiles are computed with in this device's memory, which the process must be able to read (RAM
  /// as the device). Null: where they are read to.
  Device* device = nullptr;
  /// Ranks that share the tiles: each holds or reads its part of every tile and gathers the others'
  /// just ahead of use (see GatheredTiles); budgets are a rank's own. Opening is collective then.
  /// Null: no sharing. Not together with `device`.
  Ranks* ranks = nullptr;
  bool poison_released = false;  ///< for tests: leases that ended leave NaN behind, on a device
  /// For tests: wraps the reader of the ring.
  std::function<std::unique_ptr<BlockReader>(std::unique_ptr<BlockReader>)> wrap_reader;
};

/// Bytes of tiles. The backward pass does without the head's.
struct PassBytes {
  std::int64_t forward = 0, head = 0;  ///< of a forward pass; of these the head's
  std::int64_t step() const { return 2 * forward - head; }
  void add(std::int64_t bytes, bool of_head) {
    forward += bytes;
    head += of_head ? bytes : 0;
  }
};

/// What a stream does, for people.
struct StreamFacts {
  std::int64_t tiles = 0, tiles_resident = 0;
  int ranks = 1;                     ///< that share them; the bytes below are this one's
  PassBytes tile_bytes;              ///< of all tiles, whosoever holds them
  std::int64_t resident_bytes = 0;   ///< of tiles that stay in memory
  PassBytes streamed;                ///< read from disk
  PassBytes gathered;                ///< received from other ranks
  std::int64_t ring_bytes = 0;       ///< of all slots
  std::int64_t embedding_bytes = 0;  ///< of its file
  std::int64_t kept_row_bytes =
      0;  ///< of it, at most, that a rank of several keeps of what it read
  std::int64_t smallest_budget = 0;  ///< bytes of the smallest tile
  BlockReader::Facts reader;
};

/// The frozen base as a store holds it, decoded part by part as it is used, exactly as the format's
/// owner does. Tiles live in memory as far as the budgets go; the others are read ahead of their
/// use by a thread of their own. A tile's hash is checked when it is first read, its header always.
///
/// Throws Error: does_not_fit (a budget above zero that holds not even one tile; the smallest that
/// works is named), io, bad_file.
class StoreWeights : public FrozenWeights {
 public:
  static std::unique_ptr<StoreWeights> open(std::shared_ptr<const Store> store,
                                            at::ScalarType dtype, const StreamOptions& options);
  virtual StreamFacts facts() const = 0;
  /// Acquires every tile of a pass and lets it go unused: what reading alone takes.
  virtual void read_through(Pass pass) = 0;
};

}  // namespace tailor
