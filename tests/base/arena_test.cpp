// Arenas: values survive what is said about their use, memory falls, a full disk is an error.

#include "base/arena.h"

#include <gtest/gtest.h>
#include <linux/magic.h>
#include <signal.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <numeric>

#include "base/error.h"
#include "tests/support/process_memory.h"

namespace tailor {
namespace {

using testing_support::resident_bytes_at;

constexpr std::int64_t kMiB = std::int64_t{1} << 20;

class ArenaTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) / ("arena_" + std::to_string(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path folder_;
};

std::uint32_t value_at(std::size_t i) { return static_cast<std::uint32_t>(i * 2654435761U + 17); }

void fill(const Arena& arena) {
  const auto values = arena.as<std::uint32_t>();
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = value_at(i);
}

void expect_filled(const Arena& arena, std::int64_t zero_from = 0, std::int64_t zero_to = 0) {
  const auto bytes = arena.as<std::byte>();
  const auto values = arena.as<std::uint32_t>();
  for (std::size_t i = 0; i < bytes.size() / 4 * 4; ++i) {
    const auto at = static_cast<std::int64_t>(i);
    const bool zero = at >= zero_from && at < zero_to;
    const auto want =
        zero ? std::byte{0} : static_cast<std::byte>(value_at(i / 4) >> (8 * (i % 4)) & 0xFFU);
    ASSERT_EQ(bytes[i], want) << i << " of " << values.size() * 4;
  }
}

TEST_F(ArenaTest, begins_with_zeros_and_has_the_size_asked_for) {
  for (const std::int64_t size : {std::int64_t{1}, std::int64_t{4096}, 3 * kMiB + 5}) {
    for (const Arena& arena : {Arena::in_memory(size), Arena::in_file(size, folder_)}) {
      EXPECT_EQ(arena.size(), size);
      EXPECT_EQ(std::accumulate(arena.as<std::uint8_t>().begin(), arena.as<std::uint8_t>().end(),
                                std::uint64_t{0}),
                0U);
    }
  }
  EXPECT_EQ(Arena::in_file(0, folder_).size(), 0);
  EXPECT_FALSE(Arena::in_memory(8).on_disk());
  EXPECT_TRUE(Arena::in_file(8, folder_).on_disk());
}

TEST_F(ArenaTest, values_survive_release_and_prefetch_of_any_range) {
  for (const Arena& arena :
       {Arena::in_memory(5 * kMiB + 12), Arena::in_file(5 * kMiB + 12, folder_)}) {
    fill(arena);
    for (const auto& [offset, bytes] : {std::pair<std::int64_t, std::int64_t>{0, arena.size()},
                                        {kMiB + 3, kMiB},
                                        {4095, 2},
                                        {arena.size() - 1, 1},
                                        {7, 0}}) {
      arena.release(offset, bytes);
      arena.prefetch(offset, bytes);
      expect_filled(arena);
      arena.release(offset, bytes);
    }
    // What changes after a release is kept too.
    arena.as<std::uint32_t>()[300'000] = 1;
    arena.release(0, arena.size());
    EXPECT_EQ(arena.as<std::uint32_t>()[300'000], 1U);
  }
}

TEST_F(ArenaTest, zero_reaches_every_byte_of_its_range_and_no_other) {
  for (const auto& [offset, bytes] : {std::pair<std::int64_t, std::int64_t>{0, 3 * kMiB},
                                      {4097, 2 * kMiB},
                                      {5000, 100},
                                      {4096, 4096},
                                      {9, 0}}) {
    for (const Arena& arena : {Arena::in_memory(3 * kMiB), Arena::in_file(3 * kMiB, folder_)}) {
      fill(arena);
      if (offset != 0) arena.release(0, arena.size());
      arena.zero(offset, bytes);
      expect_filled(arena, offset, offset + bytes);
      arena.release(0, arena.size());
      expect_filled(arena, offset, offset + bytes);
    }
  }
}

TEST_F(ArenaTest, discard_leaves_what_is_around_it_alone) {
  const Arena arena = Arena::in_file(kMiB, folder_);
  fill(arena);
  arena.discard(5000, 100'000);
  const auto bytes = arena.as<std::uint8_t>();
  const Arena whole = Arena::in_memory(kMiB);
  fill(whole);
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    if (i < 5000 || i >= 105'000) {
      ASSERT_EQ(bytes[i], whole.as<std::uint8_t>()[i]) << i;
    }
  }
  fill(arena);
  arena.release(0, arena.size());
  expect_filled(arena);
}

TEST_F(ArenaTest, released_pages_leave_memory) {
  const Arena arena = Arena::in_file(64 * kMiB, folder_);
  fill(arena);
  EXPECT_GE(resident_bytes_at(arena.data()), 60 * kMiB);
  arena.release(16 * kMiB, 32 * kMiB);
  const std::int64_t half = resident_bytes_at(arena.data());
  EXPECT_LE(half, 33 * kMiB);
  EXPECT_GE(half, 28 * kMiB);
  arena.release(0, arena.size());
  EXPECT_LE(resident_bytes_at(arena.data()), kMiB);
  expect_filled(arena);

  const Arena kept = Arena::in_memory(8 * kMiB);
  fill(kept);
  kept.release(0, kept.size());
  EXPECT_GE(resident_bytes_at(kept.data()), 8 * kMiB);
}

TEST_F(ArenaTest, leaves_no_file_behind_even_when_killed) {
  const pid_t child = ::fork();
  if (child == 0) {
    const Arena arena = Arena::in_file(kMiB, folder_);
    fill(arena);
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  EXPECT_TRUE(fs::is_empty(folder_));
  const Arena alive = Arena::in_file(kMiB, folder_);
  EXPECT_TRUE(fs::is_empty(folder_));
}

TEST_F(ArenaTest, a_disk_without_room_is_an_error_at_the_start) {
  struct statfs info {};
  const fs::path tmpfs = "/dev/shm";
  if (::statfs(tmpfs.c_str(), &info) != 0 || info.f_type != TMPFS_MAGIC || info.f_blocks == 0) {
    GTEST_SKIP() << "no tmpfs of limited size at " << tmpfs;
  }
  const std::int64_t size = static_cast<std::int64_t>(info.f_blocks) * info.f_bsize;
  for (const std::int64_t bytes : {size + kMiB, std::int64_t{1} << 60U}) {
    try {
      Arena::in_file(bytes, tmpfs);
      FAIL() << bytes;
    } catch (const Error& error) {
      EXPECT_EQ(error.exit_code(), 74);
      EXPECT_NE(error.parts().what.find(std::to_string(bytes)), std::string::npos);
      EXPECT_EQ(error.parts().where, tmpfs.string());
      EXPECT_FALSE(error.parts().mend.empty());
    }
  }
  // Nothing of the attempt is left: what fits still does.
  fill(Arena::in_file(kMiB, tmpfs));
}

TEST_F(ArenaTest, a_folder_that_is_missing_or_none_is_an_error) {
  std::ofstream(folder_ / "file") << "x";
  for (const char* name : {"missing", "file"}) {
    try {
      Arena::in_file(kMiB, folder_ / name);
      FAIL() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::io);
      EXPECT_EQ(error.parts().where, (folder_ / name).string());
    }
  }
}

TEST_F(ArenaTest, a_copy_is_in_memory_and_apart_and_a_move_keeps_the_address) {
  Arena arena = Arena::in_file(kMiB, folder_);
  fill(arena);
  Arena copy = arena;
  EXPECT_FALSE(copy.on_disk());
  expect_filled(copy);
  arena.as<std::uint32_t>()[0] = 0;
  expect_filled(copy);
  arena = copy;
  expect_filled(arena);

  Arena file = Arena::in_file(kMiB, folder_);
  fill(file);
  const std::byte* place = file.data();
  Arena moved = std::move(file);
  EXPECT_EQ(moved.data(), place);
  moved = Arena();
  EXPECT_EQ(moved.size(), 0);
  moved = std::move(copy);
  expect_filled(moved);
}

}  // namespace
}  // namespace tailor
