#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "base/aligned_memory.h"
#include "data/store/layout.h"
#include "data/store/writer.h"

namespace tailor {

/// Makes one unit of a synthetic store after another, each in a buffer of 1 MiB: drawn, hashed and
/// written piece by piece in its order. One object a thread.
class SyntheticUnitMaker {
 public:
  static constexpr std::int64_t kPieceBytes = std::int64_t{1} << 20;

  /// `mark` is that of the store; `ended` makes make() return early. Both stay the caller's.
  SyntheticUnitMaker(std::uint64_t seed, const std::array<std::byte, 16>& mark,
                     const std::atomic<bool>& ended)
      : seed_(seed), mark_(mark), ended_(ended), memory_(kPieceBytes) {}

  /// Writes `unit` to its place in `file`, adding to `bytes_written` as it goes on, and gives its
  /// hash. False when `ended` became true before it was whole. Throws Error{io}.
  bool make(const StoredUnit& unit, const StoreFile& file, std::atomic<std::int64_t>& bytes_written,
            UnitHash& hash);

 private:
  /// Draws bytes [begin, begin + out.size()) of an array.
  using Draw = std::function<void(std::int64_t begin, std::span<std::byte> out)>;
  void add(std::int64_t offset, std::int64_t bytes, const Draw& draw);
  void pad(std::int64_t offset);
  std::span<std::byte> room(std::int64_t bytes) const;
  void flush();

  std::uint64_t seed_;
  const std::array<std::byte, 16>& mark_;
  const std::atomic<bool>& ended_;
  AlignedMemory memory_;
  UnitHasher hasher_;
  const StoredUnit* unit_ = nullptr;
  const StoreFile* file_ = nullptr;
  std::atomic<std::int64_t>* bytes_written_ = nullptr;
  std::int64_t at_ = 0, held_ = 0;  ///< bytes of the unit that are written; that are in memory_
};

}  // namespace tailor
