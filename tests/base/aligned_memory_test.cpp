#include "base/aligned_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace tailor {
namespace {

std::uintptr_t address(const AlignedMemory& memory) {
  return reinterpret_cast<std::uintptr_t>(memory.data());
}

TEST(AlignedMemory, begins_on_a_page_holds_whole_pages_and_is_zero) {
  const auto page = static_cast<std::int64_t>(::sysconf(_SC_PAGESIZE));
  for (const std::int64_t bytes : {std::int64_t{1}, page, page + 1, std::int64_t{5'000'001}}) {
    for (const bool huge : {false, true}) {
      const AlignedMemory memory(bytes, huge);
      EXPECT_EQ(address(memory) % static_cast<std::uintptr_t>(huge ? 2 << 20 : page), 0U);
      EXPECT_GE(memory.size(), bytes);
      EXPECT_LT(memory.size(), bytes + page);
      EXPECT_EQ(memory.size() % page, 0);
      EXPECT_EQ(memory.bytes().size(), static_cast<std::size_t>(memory.size()));
      for (const std::byte value : memory.bytes()) ASSERT_EQ(value, std::byte{0});
    }
  }
}

TEST(AlignedMemory, moves_and_gives_its_pages_back) {
  AlignedMemory empty, memory(1 << 20, true);
  EXPECT_EQ(empty.size(), 0);
  std::byte* const data = memory.data();
  AlignedMemory moved(std::move(memory));
  EXPECT_EQ(moved.data(), data);
  empty = std::move(moved);
  EXPECT_EQ(empty.data(), data);
  EXPECT_EQ(empty.size(), 1 << 20);
  unsigned char present[256];
  EXPECT_EQ(::mincore(data, 1 << 20, present), 0);
  { const AlignedMemory last(std::move(empty)); }
  EXPECT_NE(::mincore(data, 1 << 20, present), 0);  // no longer mapped, and nothing beside it was
  EXPECT_EQ(AlignedMemory(0).data(), nullptr);
}

TEST(AlignedMemory, poison_is_seen_and_is_not_a_number) {
  const AlignedMemory memory(8192);
  memory.poison(4096, 100);
  EXPECT_TRUE(memory.poisoned(4096, 100));
  EXPECT_FALSE(memory.poisoned(4095, 2));
  EXPECT_FALSE(memory.poisoned(4196, 1));
  float value = 0;
  std::memcpy(&value, memory.data() + 4096, sizeof value);
  EXPECT_TRUE(std::isnan(value));
  memory.poison();
  EXPECT_TRUE(memory.poisoned(0, 8192));
  EXPECT_THROW(memory.poison(8000, 193), Error);
  EXPECT_THROW(static_cast<void>(memory.poisoned(-1, 1)), Error);
}

TEST(AlignedMemory, more_than_there_is_does_not_fit) {
  for (const std::int64_t bytes : {INT64_MAX, std::int64_t{1} << 60}) {
    for (const bool huge : {false, true}) {
      try {
        const AlignedMemory memory(bytes, huge);
        ADD_FAILURE();
      } catch (const Error& error) {
        EXPECT_EQ(error.fault(), Fault::does_not_fit);
      }
    }
  }
}

}  // namespace
}  // namespace tailor
