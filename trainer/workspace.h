#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/arena.h"

namespace tailor {

/// A stack of tensors. Everything a pass needs is taken and given back in stack order, so memory
/// comes from a few large blocks that live as long as the stack: a step allocates nothing, cannot
/// fragment, and its peak is the sum of what was alive at once. Its blocks may be files (see
/// Arena); what was taken between two marks is then paged out while others work, and in again.
class TensorStack {
 public:
  /// How far the stack was filled.
  struct Mark {
    std::size_t block = 0, used = 0;
  };

  /// An uninitialised contiguous tensor, valid until the stack is released to before it. Aligned to
  /// 64 bytes.
  at::Tensor take(at::IntArrayRef shape, at::ScalarType dtype);

  /// Where blocks come from from now on. Nothing may be taken.
  void move_to(ArenaHome home);

  Mark mark() const { return {block_, blocks_.empty() ? 0 : blocks_[block_].used}; }
  /// Gives back all that was taken since `mark`. Debug and sanitizer builds overwrite it with NaN.
  void release(Mark mark);
  /// What was taken from one mark to another is not needed soon, or is; see Arena.
  void page_out(Mark from, Mark to) const;
  void page_in(Mark from, Mark to) const;

  /// Most bytes that were ever taken at once.
  std::int64_t bytes_peak() const { return bytes_peak_; }

 private:
  struct Block {
    Arena memory;
    std::size_t used = 0;
  };
  /// use(arena, offset, bytes) of each block's part.
  template <class Use>
  void each_part(Mark from, Mark to, const Use& use) const;

  ArenaHome home_;
  std::vector<Block> blocks_;
  std::size_t block_ = 0;  ///< the one being filled; those after it are empty
  std::int64_t bytes_peak_ = 0;
};

/// Releases a stack to where it was, at the end of a scope.
class Frame {
 public:
  explicit Frame(TensorStack& stack) : stack_(stack), mark_(stack.mark()) {}
  ~Frame() { stack_.release(mark_); }
  Frame(const Frame&) = delete;
  Frame& operator=(const Frame&) = delete;

 private:
  TensorStack& stack_;
  TensorStack::Mark mark_;
};

/// The memory of a decoder's passes. Two stacks, since what a layer keeps for its backward pass is
/// taken in between scratch that is gone when the layer is done.
struct Workspace {
  TensorStack kept;
  TensorStack scratch;
};

}  // namespace tailor
