#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tailor {

/// A stack of tensors. Everything a pass needs is taken and given back in stack order, so memory
/// comes from a few large blocks that live as long as the stack: a step allocates nothing, cannot
/// fragment, and its peak is the sum of what was alive at once.
class TensorStack {
 public:
  /// How far the stack was filled.
  struct Mark {
    std::size_t block = 0, used = 0;
  };

  /// An uninitialised contiguous tensor, valid until the stack is released to before it. Aligned to
  /// 64 bytes.
  at::Tensor take(at::IntArrayRef shape, at::ScalarType dtype);

  Mark mark() const { return {block_, blocks_.empty() ? 0 : blocks_[block_].used}; }
  /// Gives back all that was taken since `mark`. Debug and sanitizer builds overwrite it with NaN.
  void release(Mark mark);

  /// Most bytes that were ever taken at once.
  std::int64_t bytes_peak() const { return bytes_peak_; }

 private:
  struct Block {
    at::Tensor memory;
    std::size_t used = 0;
  };
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
