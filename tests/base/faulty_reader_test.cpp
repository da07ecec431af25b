#include "tests/support/faulty_reader.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include "base/aligned_memory.h"
#include "base/clock.h"

namespace tailor {
namespace {

using testing_support::Faults;
using testing_support::FaultyReader;

constexpr int kExtents = 24;
constexpr std::int64_t kExtentBytes = 128 << 10;

class FaultyReaderTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) / ("tailor_faulty_reader_" + std::to_string(::getpid()));
    make_folders(folder_);
    for (std::int64_t i = 0; i < kExtents * kExtentBytes; ++i) {
      text_ += static_cast<char>(random_bits(1, RandomStream::sample, std::uint64_t(i)));
    }
    write_atomically(folder_ / "a", text_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  /// Reads the file in extents tagged 100, 101, ... in this order, and returns them as told.
  std::vector<BlockDone> read(const Faults& faults) {
    BlockReader::Options options;
    options.depth = 4;
    FaultyReader reader(BlockReader::create(options), faults);
    const int file = reader.add_file(folder_ / "a");
    memory_.poison();
    for (int i = 0; i < kExtents; ++i) {
      reader.submit({file, i * kExtentBytes, kExtentBytes, kExtentBytes,
                     memory_.data() + i * kExtentBytes, std::uint64_t(100 + i)});
    }
    std::vector<BlockDone> out;
    while (reader.in_flight() > 0) out.push_back(reader.wait());
    EXPECT_EQ(reader.bytes_read(), kExtents * kExtentBytes);
    return out;
  }
  /// How many bytes of extent `i` differ from the file's.
  std::int64_t wrong_bytes(int i) const {
    std::int64_t wrong = 0;
    for (std::int64_t at = i * kExtentBytes; at < (i + 1) * kExtentBytes; ++at) {
      wrong += memory_.data()[at] != static_cast<std::byte>(text_[std::size_t(at)]) ? 1 : 0;
    }
    return wrong;
  }
  static const BlockDone& told(const std::vector<BlockDone>& all, std::uint64_t tag) {
    return *std::find_if(all.begin(), all.end(), [&](const auto& done) { return done.tag == tag; });
  }

  fs::path folder_;
  std::string text_;
  AlignedMemory memory_{kExtents * kExtentBytes};
};

TEST_F(FaultyReaderTest, with_no_fault_it_is_the_reader_within) {
  const auto all = read({});
  ASSERT_EQ(all.size(), std::size_t(kExtents));
  for (int i = 0; i < kExtents; ++i) {
    EXPECT_TRUE(told(all, std::uint64_t(100 + i)).good());
    EXPECT_EQ(wrong_bytes(i), 0);
  }
}

TEST_F(FaultyReaderTest, tells_in_another_order_and_late_and_loses_nothing) {
  Faults faults;
  faults.held_back = 8;
  faults.delay_us_max = 2000;
  const double start = seconds_now();
  const auto all = read(faults);
  EXPECT_GT(seconds_now() - start, 0.004);  // 24 delays of 1 ms in the mean
  ASSERT_EQ(all.size(), std::size_t(kExtents));
  const auto earlier = [](const BlockDone& a, const BlockDone& b) { return a.tag < b.tag; };
  EXPECT_FALSE(std::is_sorted(all.begin(), all.end(), earlier));
  for (int i = 0; i < kExtents; ++i) {
    EXPECT_TRUE(told(all, std::uint64_t(100 + i)).good());
    EXPECT_EQ(wrong_bytes(i), 0);
  }
}

TEST_F(FaultyReaderTest, one_fails_one_is_cut_off_one_is_damaged) {
  Faults faults;
  faults.fail = 3;
  faults.fail_error = ENXIO;
  faults.cut_off = 7;
  faults.damage = 11;
  const auto all = read(faults);
  for (int i = 0; i < kExtents; ++i) {
    const BlockDone& done = told(all, std::uint64_t(100 + i));
    EXPECT_EQ(done.error_number, i == 3 ? ENXIO : 0);
    EXPECT_EQ(done.cut_off, i == 7);
    if (i == 3 || i == 7) {
      EXPECT_EQ(done.failed_offset, i * kExtentBytes + done.bytes_read);
      EXPECT_LT(done.bytes_read, kExtentBytes);
      EXPECT_TRUE(memory_.poisoned(done.failed_offset, kExtentBytes - done.bytes_read));
    } else {
      EXPECT_EQ(wrong_bytes(i), i == 11 ? 1 : 0);
    }
  }
}

TEST_F(FaultyReaderTest, the_seed_says_where) {
  Faults faults;
  faults.cut_off = 5;
  const std::int64_t first = told(read(faults), 105).failed_offset;
  EXPECT_EQ(told(read(faults), 105).failed_offset, first);
  faults.seed = 1;
  EXPECT_NE(told(read(faults), 105).failed_offset, first);
}

}  // namespace
}  // namespace tailor
