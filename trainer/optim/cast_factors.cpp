#include "trainer/optim/cast_factors.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace tailor {
namespace {

at::Tensor factors_of(const Adapter& adapter, FactorRange range) {
  // Only read from: at::from_blob knows no const.
  auto* from = const_cast<float*>(adapter.factors().data()) + range.begin;
  return at::from_blob(from, {range.size()}, at::kFloat);
}

}  // namespace

void CastFactors::move_to(ArenaHome home) {
  home_ = std::move(home);
  adapter_ = nullptr;
  tensor_ = at::Tensor();
  arena_ = Arena();
}

void CastFactors::prepare(const Adapter& adapter) {
  const std::int64_t n = adapter.parameter_count();
  if (!tensor_.defined() || tensor_.numel() != n) {
    arena_ = home_.make(n * static_cast<std::int64_t>(c10::elementSize(dtype_)));
    tensor_ = at::from_blob(arena_.data(), {n}, at::TensorOptions(dtype_));
  }
  adapter_ = &adapter;
}

void CastFactors::cast_all(const Adapter& adapter) {
  prepare(adapter);
  const std::int64_t n = adapter.parameter_count();
  constexpr std::int64_t kWindow = std::int64_t{1} << 22;
  constexpr auto kFloatBytes = static_cast<std::int64_t>(sizeof(float));
  const std::int64_t step = home_.on_disk() ? kWindow : n;
  for (std::int64_t at = 0; at < n; at += step) {
    const FactorRange range{at, std::min(n, at + step)};
    adapter.arena().prefetch(range.end * kFloatBytes, step * kFloatBytes);
    tensor_.narrow(0, range.begin, range.size()).copy_(factors_of(adapter, range));
    adapter.arena().release(range.begin * kFloatBytes, range.size() * kFloatBytes);
    release(range);
  }
}

// In pieces that copy_ does not share among threads: a second team of them would stand in the way
// of the one that computes.
void CastFactors::cast(FactorRange range) const {
  TAILOR_CHECK(adapter_ != nullptr);
  constexpr std::int64_t kPiece = 1 << 14;
  for (std::int64_t at = range.begin; at < range.end; at += kPiece) {
    const FactorRange piece{at, std::min(range.end, at + kPiece)};
    tensor_.narrow(0, piece.begin, piece.size()).copy_(factors_of(*adapter_, piece));
  }
}

void CastFactors::release(FactorRange range) const {
  const auto bytes = static_cast<std::int64_t>(c10::elementSize(dtype_));
  arena_.release(range.begin * bytes, range.size() * bytes);
}

void CastFactors::prefetch(FactorRange range) const {
  const auto bytes = static_cast<std::int64_t>(c10::elementSize(dtype_));
  arena_.prefetch(range.begin * bytes, range.size() * bytes);
}

void CastFactors::discard(FactorRange range) const {
  const auto bytes = static_cast<std::int64_t>(c10::elementSize(dtype_));
  arena_.discard(range.begin * bytes, range.size() * bytes);
}

std::span<std::byte> CastFactors::bytes(FactorRange range) const {
  const auto bytes = static_cast<std::int64_t>(c10::elementSize(dtype_));
  return {arena_.data() + range.begin * bytes, static_cast<std::size_t>(range.size() * bytes)};
}

void CastFactors::drop_others(const FactorShards& shards, FactorRange range) const {
  shards.drop_others(arena_, range, static_cast<std::int64_t>(c10::elementSize(dtype_)));
}

}  // namespace tailor
