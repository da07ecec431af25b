#include "trainer/workspace.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/error.h"

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
// In a file they do: its space is taken at once.
constexpr std::size_t kFileBlockBytes = std::size_t{32} << 20U;

std::size_t size_of(const Arena& memory) { return static_cast<std::size_t>(memory.size()); }

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
    const std::size_t least = home_.on_disk() ? kFileBlockBytes : kBlockBytes;
    blocks_.push_back({home_.make(static_cast<std::int64_t>(std::max(room, least))), 0});
  }
  Block& block = blocks_[block_];
  std::byte* const at_byte = block.memory.data() + block.used;
  block.used += room;
  std::size_t total = 0;
  for (std::size_t b = 0; b <= block_; ++b) total += blocks_[b].used;
  bytes_peak_ = std::max(bytes_peak_, static_cast<std::int64_t>(total));
  return at::from_blob(at_byte, shape, at::TensorOptions(dtype));
}

void TensorStack::move_to(ArenaHome home) {
  for (const Block& block : blocks_) TAILOR_CHECK(block.used == 0);
  blocks_.clear();
  block_ = 0;
  home_ = std::move(home);
}

template <class Use>
void TensorStack::each_part(Mark from, Mark to, const Use& use) const {
  for (std::size_t b = from.block; b < blocks_.size() && b <= to.block; ++b) {
    const std::size_t begin = b == from.block ? from.used : 0;
    const std::size_t end = b == to.block ? to.used : blocks_[b].used;
    if (end > begin) {
      use(blocks_[b].memory, static_cast<std::int64_t>(begin),
          static_cast<std::int64_t>(end - begin));
    }
  }
}

void TensorStack::page_out(Mark from, Mark to) const {
  each_part(from, to, [](const Arena& memory, std::int64_t offset, std::int64_t bytes) {
    memory.release(offset, bytes);
  });
}

void TensorStack::page_in(Mark from, Mark to) const {
  each_part(from, to, [](const Arena& memory, std::int64_t offset, std::int64_t bytes) {
    memory.prefetch(offset, bytes);
  });
}

void TensorStack::release(Mark mark) {
  for (std::size_t b = mark.block; b < blocks_.size(); ++b) {
    Block& block = blocks_[b];
    const std::size_t keep = b == mark.block ? mark.used : 0;
    if (TAILOR_OVERWRITE_RELEASED && block.used > keep) {
      std::memset(block.memory.data() + keep, 0xFF, block.used - keep);
    }
    block.memory.discard(static_cast<std::int64_t>(keep),
                         static_cast<std::int64_t>(block.used - keep));
    block.used = keep;
  }
  block_ = blocks_.empty() ? 0 : std::min(mark.block, blocks_.size() - 1);
}

}  // namespace tailor
