#include "trainer/workspace.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <vector>

#include "tests/support/process_memory.h"

namespace tailor {
namespace {

std::intptr_t place(const at::Tensor& tensor) {
  return reinterpret_cast<std::intptr_t>(tensor.data_ptr());
}

TEST(TensorStack, GivesShapesOfTheirTypeAlignedAndApart) {
  TensorStack stack;
  const at::Tensor a = stack.take({3, 5}, at::kBFloat16);
  const at::Tensor b = stack.take({7}, at::kFloat);
  EXPECT_EQ(a.sizes(), at::IntArrayRef({3, 5}));
  EXPECT_EQ(a.scalar_type(), at::kBFloat16);
  EXPECT_EQ(b.scalar_type(), at::kFloat);
  EXPECT_EQ(place(a) % 64, 0);
  EXPECT_EQ(place(b) % 64, 0);
  EXPECT_GE(place(b) - place(a), 30);
  EXPECT_EQ(stack.bytes_peak(), 128);
}

TEST(TensorStack, WhatIsReleasedIsTakenAgain) {
  TensorStack stack;
  const at::Tensor below = stack.take({16}, at::kFloat).fill_(3);
  const TensorStack::Mark mark = stack.mark();
  const std::intptr_t first = place(stack.take({1000}, at::kFloat));
  stack.release(mark);
  EXPECT_EQ(place(stack.take({10}, at::kDouble)), first);
  EXPECT_TRUE(below.eq(3).all().item<bool>());
  EXPECT_EQ(stack.bytes_peak(), 64 + 4032);
}

TEST(TensorStack, FramesNest) {
  TensorStack stack;
  std::intptr_t inner = 0, outer = 0;
  {
    const Frame of_layer(stack);
    outer = place(stack.take({4}, at::kFloat));
    {
      const Frame of_micro_batch(stack);
      inner = place(stack.take({4}, at::kFloat));
    }
    EXPECT_EQ(place(stack.take({4}, at::kFloat)), inner);
  }
  EXPECT_EQ(place(stack.take({4}, at::kFloat)), outer);
}

// Blocks are of 256 MiB: untouched memory, so the test costs none.
TEST(TensorStack, GoesOnInAnotherBlockAndComesBack) {
  TensorStack stack;
  const std::int64_t large = std::int64_t{200} << 20U, huge = std::int64_t{300} << 20U;
  const std::intptr_t first = place(stack.take({large}, at::kByte));
  const TensorStack::Mark mark = stack.mark();
  const std::intptr_t second = place(stack.take({large}, at::kByte));
  stack.release(mark);
  EXPECT_EQ(place(stack.take({large}, at::kByte)), second);
  stack.release(mark);
  // The second block is empty and too small for this one.
  const std::intptr_t third = place(stack.take({huge}, at::kByte));
  stack.release(mark);
  EXPECT_EQ(place(stack.take({large}, at::kByte)), third);
  stack.release({});
  EXPECT_EQ(place(stack.take({large}, at::kByte)), first);
  EXPECT_EQ(stack.bytes_peak(), large + huge);
}

TEST(TensorStack, ValuesInFilesSurvivePagingAcrossBlocks) {
  TensorStack stack;
  stack.move_to({std::filesystem::path(testing::TempDir())});
  // Blocks of files are of 32 MiB: three tensors of 20 MiB take three.
  constexpr std::int64_t kElements = std::int64_t{5} << 20;
  const TensorStack::Mark bottom = stack.mark();
  std::vector<at::Tensor> tensors;
  std::vector<TensorStack::Mark> marks;
  for (int i = 0; i < 3; ++i) {
    tensors.push_back(stack.take({kElements}, at::kFloat).fill_(i + 1));
    marks.push_back(stack.mark());
  }
  stack.page_out(bottom, marks[1]);
  EXPECT_LE(testing_support::resident_bytes_at(tensors[0].data_ptr()), 1 << 20);
  EXPECT_LE(testing_support::resident_bytes_at(tensors[1].data_ptr()), 1 << 20);
  EXPECT_GE(testing_support::resident_bytes_at(tensors[2].data_ptr()), 19 << 20);
  stack.page_in(marks[0], marks[1]);
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(tensors[static_cast<std::size_t>(i)].eq(i + 1).all().item<bool>()) << i;
  }
  stack.release(marks[0]);
  EXPECT_TRUE(tensors[0].eq(1).all().item<bool>());
  EXPECT_EQ(place(stack.take({kElements}, at::kFloat)), place(tensors[1]));
}

TEST(TensorStack, NothingIsATensorToo) {
  TensorStack stack;
  EXPECT_EQ(stack.take({0, 8}, at::kFloat).numel(), 0);
}

}  // namespace
}  // namespace tailor
