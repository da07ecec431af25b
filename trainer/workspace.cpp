#include "trainer/workspace.h"

#include <algorithm>
#include <cstring>

#if !defined(NDEBUG) || defined(__SANITIZE_ADDRESS__)
#define TAILOR_OVERWRITE_RELEASED 1
#else
#define TAILOR_OVERWRITE_RELEASED 0
#endif

namespace tailor {
namespace {

constexpr std::size_t kAlignment = 64;
// Untouched pages of a block cost nothing, so a block may well be larger than what it serves.
constexpr std::size_t kBlockBytes = std::size_t{256} << 20U;

std::size_t size_of(const at::Tensor& memory) { return memory.nbytes(); }

}  // namespace

at::Tensor TensorStack::take(at::IntArrayRef shape, at::ScalarType dtype) {
  std::size_t bytes = c10::elementSize(dtype);
  for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
  const std::size_t room = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const auto fits = [&](const Block& block) { return block.used + room <= size_of(block.memory); };
  while (block_ < blocks_.size() && !fits(blocks_[block_])) {
    if (blocks_[block_].used > 0) {
      ++block_;
    } else {  // too small even when empty: a larger one takes its place
      blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(block_));
    }
  }
  if (block_ == blocks_.size()) {
    const auto size = static_cast<std::int64_t>(std::max(room, kBlockBytes));
    blocks_.push_back({at::empty({size}, at::TensorOptions(at::kByte)), 0});
  }
  Block& block = blocks_[block_];
  auto* at_byte = static_cast<std::byte*>(block.memory.data_ptr()) + block.used;
  block.used += room;
  std::size_t total = 0;
  for (std::size_t b = 0; b <= block_; ++b) total += blocks_[b].used;
  bytes_peak_ = std::max(bytes_peak_, static_cast<std::int64_t>(total));
  return at::from_blob(at_byte, shape, at::TensorOptions(dtype));
}

void TensorStack::release(Mark mark) {
  for (std::size_t b = mark.block; b < blocks_.size(); ++b) {
    Block& block = blocks_[b];
    const std::size_t keep = b == mark.block ? mark.used : 0;
    if (TAILOR_OVERWRITE_RELEASED && block.used > keep) {
      std::memset(static_cast<std::byte*>(block.memory.data_ptr()) + keep, 0xFF, block.used - keep);
    }
    block.used = keep;
  }
  block_ = blocks_.empty() ? 0 : std::min(mark.block, blocks_.size() - 1);
}

}  // namespace tailor
