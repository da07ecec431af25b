#include "base/block_reader.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/capability.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <map>
#include <thread>
#include <vector>

#include "base/aligned_memory.h"
#include "base/error.h"
#include "base/random.h"
#include "base/units.h"

namespace tailor {
namespace {

using Engine = BlockReader::Engine;
using testing::HasSubstr;

std::uint64_t random_below(std::uint64_t limit, std::uint64_t a, std::uint64_t b = 0) {
  return random_bits(7, RandomStream::sample, a, b) % limit;
}

/// Bytes that differ from file to file and from place to place.
std::string file_text(std::int64_t bytes, std::uint64_t file) {
  std::string text(static_cast<std::size_t>(align_up(bytes, 8)), '\0');
  for (std::size_t at = 0; at < text.size(); at += 8) {
    const std::uint64_t word =
        (at / 8 + 1) * 0x9E3779B97F4A7C15ULL ^ (file * 0xBF58476D1CE4E5B9ULL);
    std::memcpy(text.data() + at, &word, 8);
  }
  text.resize(static_cast<std::size_t>(bytes));
  return text;
}

/// Where a reader and its files are: engine, whether O_DIRECT is asked for, and the file system.
struct Place {
  Engine engine;
  bool direct;
  bool disk;  ///< false: /dev/shm
};

std::string name_of_place(const testing::TestParamInfo<Place>& info) {
  return std::string(name_of(info.param.engine)) + (info.param.direct ? "_direct" : "_buffered") +
         (info.param.disk ? "_disk" : "_shm");
}

class FolderTest : public testing::Test {
 protected:
  void make_folder(const fs::path& below) {
    folder_ = below / ("tailor_block_reader_" + std::to_string(::getpid()));
    make_folders(folder_);
  }
  void SetUp() override { make_folder(testing::TempDir()); }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path write(const std::string& name, std::string_view text) const {
    write_atomically(folder_ / name, text);
    return folder_ / name;
  }
  /// The descriptor this process has open for `path`.
  static int descriptor_of(const fs::path& path) {
    for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
      std::error_code error;
      if (fs::read_symlink(entry.path(), error) == fs::canonical(path)) {
        return std::stoi(entry.path().filename());
      }
    }
    return -1;
  }

  fs::path folder_;
};

class BlockReaderTest : public FolderTest, public testing::WithParamInterface<Place> {
 protected:
  void SetUp() override {
    if (!GetParam().disk && !fs::is_directory("/dev/shm")) GTEST_SKIP() << "there is no /dev/shm";
    make_folder(GetParam().disk ? fs::path(testing::TempDir()) : fs::path("/dev/shm"));
    if (GetParam().engine == Engine::io_uring) {
      const std::string why = BlockReader::create({})->facts().why;
      if (!why.empty()) GTEST_SKIP() << why;
    }
  }
  static BlockReader::Options options() {
    BlockReader::Options options;
    options.engine = GetParam().engine;
    options.direct = GetParam().direct;
    options.piece_bytes = 64 << 10;
    return options;
  }
};

/// What only the disk, and what only direct reads of it, can show.
class DiskReaderTest : public BlockReaderTest {};
class DirectReaderTest : public BlockReaderTest {};

std::map<std::uint64_t, BlockDone> wait_for_all(BlockReader& reader) {
  std::map<std::uint64_t, BlockDone> out;
  while (reader.in_flight() > 0) {
    const BlockDone done = reader.wait();
    EXPECT_TRUE(out.emplace(done.tag, done).second) << "told twice: " << done.tag;
  }
  return out;
}

/// A whole file as one extent.
BlockRead whole(int file, std::int64_t bytes, const AlignedMemory& to, std::uint64_t tag = 0) {
  return {file, 0, align_up(bytes, kBlockBytes), bytes, to.data(), tag};
}

bool same(const std::byte* got, std::string_view want) {
  return std::memcmp(got, want.data(), want.size()) == 0;
}

TEST_P(BlockReaderTest, random_extents_hold_what_plain_reads_hold) {
  const auto reader = BlockReader::create(options());
  std::vector<std::string> texts;
  std::vector<int> files;
  std::int64_t bytes_arrived = 0;
  for (std::uint64_t i = 0; i < 3; ++i) {
    const fs::path path = write(std::to_string(i), file_text(3'000'001 + 7'777 * int(i), i));
    texts.push_back(read_text(path));
    files.push_back(reader->add_file(path));
  }
  // Slots with a guard block behind each, so that a read that goes too far is seen.
  constexpr std::int64_t kSlotBytes = 600 << 10;
  constexpr int kSlots = 24, kExtents = 1000;
  const AlignedMemory memory(kSlots * (kSlotBytes + kBlockBytes));
  std::vector<int> free_slots(kSlots);
  for (int i = 0; i < kSlots; ++i) free_slots[std::size_t(i)] = i;
  std::map<std::uint64_t, std::pair<int, BlockRead>> expected;
  std::uint64_t submitted = 0;
  while (submitted < kExtents || reader->in_flight() > 0) {
    while (submitted < kExtents && !free_slots.empty()) {
      const std::size_t which = random_below(3, submitted, 1);
      const auto file_bytes = static_cast<std::int64_t>(texts[which].size());
      BlockRead read;
      read.file = files[which];
      read.offset =
          kBlockBytes * std::int64_t(random_below(std::uint64_t(div_ceil(file_bytes, kBlockBytes)),
                                                  submitted, 2));
      read.bytes_needed = std::min(file_bytes - read.offset,
                                   1 + std::int64_t(random_below(kSlotBytes, submitted, 3)));
      read.bytes = align_up(read.bytes_needed, kBlockBytes);
      const int slot = free_slots.back();
      free_slots.pop_back();
      read.to = memory.data() + slot * (kSlotBytes + kBlockBytes);
      memory.poison(read.to - memory.data(), kSlotBytes + kBlockBytes);
      read.tag = submitted++ * 3;
      expected[read.tag] = {slot, read};
      reader->submit(read);
    }
    const BlockDone done = reader->wait();
    ASSERT_EQ(expected.count(done.tag), 1U);
    const auto [slot, read] = expected.at(done.tag);
    expected.erase(done.tag);
    ASSERT_TRUE(done.good()) << done.error_number;
    EXPECT_EQ(done.failed_offset, -1);
    EXPECT_GE(done.bytes_read, read.bytes_needed);
    bytes_arrived += done.bytes_read;
    const std::size_t which = std::size_t(read.file - files[0]);
    ASSERT_TRUE(
        same(read.to, std::string_view(texts[which])
                          .substr(std::size_t(read.offset), std::size_t(read.bytes_needed))));
    ASSERT_TRUE(memory.poisoned(read.to - memory.data() + read.bytes,
                                kSlotBytes + kBlockBytes - read.bytes));
    free_slots.push_back(slot);
  }
  EXPECT_EQ(reader->bytes_read(), bytes_arrived);
  const BlockReader::Facts facts = reader->facts();
  EXPECT_EQ(facts.engine, GetParam().engine);
  EXPECT_EQ(facts.direct, GetParam().direct && GetParam().disk) << facts.why;
  if (GetParam().disk) {
    EXPECT_EQ(facts.why, "");
  }
}

TEST_P(BlockReaderTest, a_ragged_tail_is_read_whole) {
  const auto reader = BlockReader::create(options());
  std::uint64_t number = 0;
  for (const std::int64_t bytes :
       {1, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537, 200'001}) {
    const std::string text = file_text(bytes, ++number);
    const int file = reader->add_file(write(std::to_string(bytes), text));
    const AlignedMemory memory(align_up(bytes, kBlockBytes) + 8 * kBlockBytes);
    memory.poison();
    BlockRead read = whole(file, bytes, memory, number);
    reader->submit(read);
    BlockDone done = reader->wait();
    EXPECT_TRUE(done.good()) << bytes << ": " << done.error_number;
    EXPECT_EQ(done.bytes_read, bytes);
    EXPECT_TRUE(same(memory.data(), text)) << bytes;
    read.bytes += 8 * kBlockBytes;  // room behind the end does no harm either
    reader->submit(read);
    done = reader->wait();
    EXPECT_TRUE(done.good()) << bytes << ": " << done.error_number;
    EXPECT_EQ(done.bytes_read, bytes);
  }
  EXPECT_EQ(reader->facts().direct, GetParam().direct && GetParam().disk) << reader->facts().why;
}

TEST_P(BlockReaderTest, a_file_that_ends_early_cuts_off_that_extent_only) {
  const auto reader = BlockReader::create(options());
  for (const std::int64_t bytes : {0, 100, 4096, 65536, 100'000}) {
    const std::string text = file_text(bytes, 1);
    const int file = reader->add_file(write("short_" + std::to_string(bytes), text));
    const AlignedMemory good(100'000), cut(1 << 20), behind(1 << 20);
    const std::string good_text = file_text(99'999, 2);
    const int other = reader->add_file(write("good_" + std::to_string(bytes), good_text));
    const std::vector<BlockRead> reads = {
        {file, 0, 1 << 20, bytes + 1, cut.data(), 1},
        whole(other, 99'999, good, 2),
        {file, 4 << 20, 1 << 20, 1 << 20, behind.data(), 3},
    };
    reader->submit(reads);
    const auto done = wait_for_all(*reader);
    EXPECT_TRUE(done.at(1).cut_off);
    EXPECT_EQ(done.at(1).error_number, 0);
    EXPECT_EQ(done.at(1).failed_offset, bytes);
    EXPECT_EQ(done.at(1).bytes_read, bytes);
    EXPECT_TRUE(same(cut.data(), text));
    EXPECT_TRUE(done.at(2).good());
    EXPECT_TRUE(same(good.data(), good_text));
    EXPECT_TRUE(done.at(3).cut_off);
    EXPECT_EQ(done.at(3).failed_offset, 4 << 20);
    EXPECT_EQ(done.at(3).bytes_read, 0);
  }
  EXPECT_EQ(reader->facts().direct, GetParam().direct && GetParam().disk) << reader->facts().why;
}

TEST_P(BlockReaderTest, a_file_truncated_after_submit_is_cut_off_where_it_ends_then) {
  BlockReader::Options one_at_a_time = options();
  one_at_a_time.depth = 1;  // so that all but the first piece is read after the truncation
  const auto reader = BlockReader::create(one_at_a_time);
  const std::string text = file_text(1 << 20, 1);
  const fs::path path = write("a", text);
  const int file = reader->add_file(path);
  const AlignedMemory memory(1 << 20);
  const std::vector<BlockRead> reads = {
      {file, 0, 128 << 10, 128 << 10, memory.data(), 1},
      {file, 128 << 10, 640 << 10, 640 << 10, memory.data() + (128 << 10), 2},
      {file, 768 << 10, 256 << 10, 256 << 10, memory.data() + (768 << 10), 3}};
  reader->submit(reads);
  constexpr std::int64_t kNewBytes = (400 << 10) + 77;
  ASSERT_EQ(::truncate(path.c_str(), kNewBytes), 0);
  const auto done = wait_for_all(*reader);
  EXPECT_TRUE(done.at(1).good());
  EXPECT_TRUE(done.at(2).cut_off);
  EXPECT_EQ(done.at(2).failed_offset, kNewBytes);
  EXPECT_TRUE(same(memory.data(), text.substr(0, kNewBytes)));
  EXPECT_TRUE(done.at(3).cut_off);
  EXPECT_EQ(done.at(3).failed_offset, 768 << 10);
}

TEST_P(BlockReaderTest, a_read_error_ends_its_extent_with_errno_and_offset) {
  const auto reader = BlockReader::create(options());
  const std::string text = file_text(300'000, 1);
  const fs::path bad_path = write("bad", text);
  const int bad = reader->add_file(bad_path), good = reader->add_file(write("good", text));
  // The reader's descriptor becomes that of a folder, which answers EISDIR to every read.
  const int folder = ::open(folder_.c_str(), O_RDONLY | O_DIRECTORY);
  ASSERT_GE(::dup2(folder, descriptor_of(bad_path)), 0);
  ::close(folder);
  const int unmapped = reader->add_file("/proc/self/mem");  // EIO: nothing is mapped at 64 KiB
  const AlignedMemory first(300'000), second(300'000), third(1 << 20);
  std::vector<BlockRead> reads = {whole(good, 300'000, first, 1),
                                  {bad, 65536, 131072, 131072, second.data(), 2},
                                  {unmapped, 0, 1 << 20, 1 << 20, third.data(), 3}};
  reader->submit(reads);
  const auto done = wait_for_all(*reader);
  EXPECT_TRUE(done.at(1).good());
  EXPECT_TRUE(same(first.data(), text));
  EXPECT_EQ(done.at(2).error_number, EISDIR);
  EXPECT_EQ(done.at(2).failed_offset, 65536);
  EXPECT_EQ(done.at(2).bytes_read, 0);
  EXPECT_EQ(done.at(3).error_number, EIO);
  EXPECT_EQ(done.at(3).failed_offset, 0);
  EXPECT_FALSE(done.at(3).cut_off);
  reader->submit(whole(good, 300'000, second, 4));
  EXPECT_TRUE(reader->wait().good());
  if (GetParam().direct) {  // /proc refuses O_DIRECT at open: a refusal that is no pretence
    EXPECT_THAT(reader->facts().why,
                HasSubstr("open with O_DIRECT: Invalid argument (/proc/self/mem)"));
    EXPECT_FALSE(reader->facts().direct);
  }
}

TEST_P(BlockReaderTest, short_reads_and_interruptions_are_gone_on_from) {
  BlockReader::Options unruly = options();
  std::uint64_t answers = 0;
  unruly.alter_answer = [&](const BlockReader::Answer& answer) -> std::int64_t {
    ++answers;
    if (answers % 5 == 1) return -EINTR;
    if (answers % 5 == 2) return -EAGAIN;
    // Half of what came, in whole blocks, as a signal would leave it.
    if (answers % 5 == 3 && answer.result > 2 * kBlockBytes) {
      return answer.result / 2 / kBlockBytes * kBlockBytes;
    }
    return answer.result;
  };
  const auto reader = BlockReader::create(unruly);
  const std::string text = file_text(1'000'003, 1);
  const int file = reader->add_file(write("a", text));
  const AlignedMemory memory(1'000'003);
  memory.poison();
  reader->submit(whole(file, 1'000'003, memory));
  const BlockDone done = reader->wait();
  EXPECT_TRUE(done.good());
  EXPECT_TRUE(same(memory.data(), text));
  EXPECT_EQ(done.bytes_read, 1'000'003);
  EXPECT_EQ(reader->bytes_read(), 1'000'003);
  EXPECT_GT(answers, 16U);
  EXPECT_EQ(reader->facts().direct, GetParam().direct && GetParam().disk);
}

TEST_P(BlockReaderTest, an_interruption_without_end_is_an_error) {
  BlockReader::Options unruly = options();
  unruly.alter_answer = [](const BlockReader::Answer& answer) -> std::int64_t {
    return answer.offset == 65536 ? -EAGAIN : answer.result;
  };
  const auto reader = BlockReader::create(unruly);
  const int file = reader->add_file(write("a", file_text(1 << 20, 1)));
  const AlignedMemory memory(1 << 20);
  reader->submit(whole(file, 1 << 20, memory));
  const BlockDone done = reader->wait();
  EXPECT_EQ(done.error_number, EAGAIN);
  EXPECT_EQ(done.failed_offset, 65536);
}

TEST_P(BlockReaderTest, of_several_failures_the_first_in_the_file_is_told) {
  // The pieces behind 512 KiB find the file's end, then that at 192 KiB has an error.
  BlockReader::Options bad = options();
  bool end_seen = false;
  bad.alter_answer = [&](const BlockReader::Answer& answer) -> std::int64_t {
    if (answer.offset >= 512 << 10) {
      end_seen = true;
      return 0;
    }
    if (answer.offset != 192 << 10) return answer.result;
    return end_seen ? -EIO : -EAGAIN;
  };
  const auto reader = BlockReader::create(bad);
  const std::string text = file_text(2 << 20, 1);
  const int file = reader->add_file(write("a", text));
  const AlignedMemory memory(2 << 20), after(128 << 10);
  reader->submit(whole(file, 2 << 20, memory, 1));
  reader->submit({file, 0, 128 << 10, 128 << 10, after.data(), 2});
  const auto done = wait_for_all(*reader);
  EXPECT_TRUE(end_seen);
  EXPECT_EQ(done.at(1).error_number, EIO);
  EXPECT_FALSE(done.at(1).cut_off);
  EXPECT_EQ(done.at(1).failed_offset, 192 << 10);
  EXPECT_TRUE(same(memory.data(), text.substr(0, 192 << 10)));
  EXPECT_TRUE(done.at(2).good());
  EXPECT_TRUE(same(after.data(), text.substr(0, 128 << 10)));
}

TEST_P(DirectReaderTest, direct_reads_refused_at_the_first_read_go_through_the_page_cache) {
  BlockReader::Options refusing = options();
  refusing.alter_answer = [](const BlockReader::Answer& answer) -> std::int64_t {
    return answer.direct && answer.file == 0 ? -EINVAL : answer.result;
  };
  const auto reader = BlockReader::create(refusing);
  const std::string text = file_text(1'000'003, 1);
  const AlignedMemory first(1'000'003), second(1'000'003);
  const fs::path path = write("a", text);
  reader->submit(whole(reader->add_file(path), 1'000'003, first, 1));
  reader->submit(whole(reader->add_file(write("b", text)), 1'000'003, second, 2));
  const auto done = wait_for_all(*reader);
  EXPECT_TRUE(done.at(1).good());
  EXPECT_TRUE(done.at(2).good());
  EXPECT_TRUE(same(first.data(), text));
  EXPECT_TRUE(same(second.data(), text));
  EXPECT_FALSE(reader->facts().direct);
  EXPECT_EQ(reader->facts().why, "read with O_DIRECT: Invalid argument (" + path.string() + ")");
  EXPECT_EQ(::fcntl(descriptor_of(path), F_GETFL) & O_DIRECT, 0);
  EXPECT_NE(::fcntl(descriptor_of(folder_ / "b"), F_GETFL) & O_DIRECT, 0);
}

TEST_P(DirectReaderTest, a_direct_read_that_stops_inside_a_block_goes_on_through_the_page_cache) {
  BlockReader::Options stopping = options();
  bool stopped = false;
  stopping.alter_answer = [&](const BlockReader::Answer& answer) -> std::int64_t {
    if (answer.offset != 65536 || std::exchange(stopped, true)) return answer.result;
    return 512 * 5;
  };
  const auto reader = BlockReader::create(stopping);
  const std::string text = file_text(500'000, 1);
  const AlignedMemory memory(500'000);
  reader->submit(whole(reader->add_file(write("a", text)), 500'000, memory));
  EXPECT_TRUE(reader->wait().good());
  EXPECT_TRUE(same(memory.data(), text));
  EXPECT_THAT(reader->facts().why, HasSubstr("stopped inside a block"));
}

TEST_P(BlockReaderTest, depth_bounds_what_is_with_the_kernel_and_changes_no_byte) {
  const std::string text = file_text(6 << 20, 1);
  const fs::path path = write("a", text);
  for (const int depth : {1, 3, 64}) {
    BlockReader::Options options_of_depth = options();
    options_of_depth.depth = depth;
    options_of_depth.piece_bytes = 16 << 10;
    const auto reader = BlockReader::create(options_of_depth);
    const int file = reader->add_file(path);
    const AlignedMemory memory(6 << 20);
    std::vector<BlockRead> reads;
    for (std::int64_t at = 0; at < 6 << 20; at += 1 << 20) {
      reads.push_back({file, at, 1 << 20, 1 << 20, memory.data() + at, std::uint64_t(at)});
    }
    reader->submit(reads);
    EXPECT_EQ(reader->in_flight(), 6U);
    std::vector<std::uint64_t> order;
    while (reader->in_flight() > 0) {
      const BlockDone done = reader->wait();
      EXPECT_TRUE(done.good());
      order.push_back(done.tag);
    }
    EXPECT_TRUE(same(memory.data(), text));
    EXPECT_EQ(reader->bytes_read(), 6 << 20);
    EXPECT_TRUE(depth > 1 || std::is_sorted(order.begin(), order.end()));
  }
}

TEST_P(BlockReaderTest, reads_go_on_while_the_caller_is_busy_with_what_ended) {
  BlockReader::Options one_at_a_time = options();
  one_at_a_time.depth = 1;
  const AlignedMemory memory(128 << 10);
  // While the caller pauses, the second extent is read; then its bytes leave the file. On a machine
  // with much to do a short pause may not be enough.
  BlockDone second;
  for (const int pause_ms : {20, 200, 5000}) {
    const auto reader = BlockReader::create(one_at_a_time);
    const fs::path path = write("a", file_text(128 << 10, 1));
    const int file = reader->add_file(path);
    reader->submit({file, 0, 64 << 10, 64 << 10, memory.data(), 1});
    reader->submit({file, 64 << 10, 64 << 10, 64 << 10, memory.data() + (64 << 10), 2});
    EXPECT_EQ(reader->wait().tag, 1U);
    std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms));
    ASSERT_EQ(::truncate(path.c_str(), 64 << 10), 0);
    second = reader->wait();
    if (second.good()) break;
  }
  EXPECT_TRUE(second.good());
}

TEST_P(BlockReaderTest, many_files) {
  const auto reader = BlockReader::create(options());
  constexpr int kFiles = 300;
  const AlignedMemory memory(kFiles * 3 * kBlockBytes);
  std::vector<BlockRead> reads;
  std::vector<std::string> texts;
  for (int i = 0; i < kFiles; ++i) {
    texts.push_back(file_text(1 + i * 37, std::uint64_t(i)));
    std::ofstream(folder_ / std::to_string(i)) << texts.back();
    const auto bytes = static_cast<std::int64_t>(texts.back().size());
    reads.push_back({reader->add_file(folder_ / std::to_string(i)), 0, align_up(bytes, kBlockBytes),
                     bytes, memory.data() + i * 3 * kBlockBytes, std::uint64_t(i)});
  }
  reader->submit(reads);
  const auto done = wait_for_all(*reader);
  ASSERT_EQ(done.size(), std::size_t(kFiles));
  for (int i = 0; i < kFiles; ++i) {
    EXPECT_TRUE(done.at(std::uint64_t(i)).good());
    EXPECT_TRUE(same(memory.data() + i * 3 * kBlockBytes, texts[std::size_t(i)])) << i;
  }
  if (GetParam().direct && !GetParam().disk) {  // one reason once, not 300 times
    EXPECT_EQ(reader->facts().why,
              "tmpfs keeps files in memory (" + (folder_ / "0").string() + " and 299 more)");
  }
}

TEST_P(BlockReaderTest, an_extent_of_no_bytes_ends_at_once) {
  const auto reader = BlockReader::create(options());
  const int file = reader->add_file(write("a", ""));
  reader->submit({file, 0, 0, 0, nullptr, 9});
  EXPECT_EQ(reader->in_flight(), 1U);
  const BlockDone done = reader->wait();
  EXPECT_TRUE(done.good());
  EXPECT_EQ(done.tag, 9U);
  EXPECT_EQ(reader->in_flight(), 0U);
}

TEST_P(BlockReaderTest, nothing_is_written_after_destruction) {
  constexpr std::int64_t kBytes = 16 << 20, kExtentBytes = 4 << 20;
  const fs::path path = write("a", file_text(kBytes, 1));
  for (int round = 0; round < 6; ++round) {
    const AlignedMemory memory(kBytes);
    auto reader = BlockReader::create(options());
    const int file = reader->add_file(path);
    for (std::int64_t at = 0; at < kBytes; at += kExtentBytes) {
      reader->submit({file, at, kExtentBytes, kExtentBytes, memory.data() + at, std::uint64_t(at)});
    }
    for (int i = 0; i < round % 3; ++i) reader->wait();
    EXPECT_GT(reader->in_flight(), 0U);
    reader.reset();
    memory.poison();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    EXPECT_TRUE(memory.poisoned(0, memory.size()));
  }
}

TEST_P(BlockReaderTest, the_reader_may_outlive_the_thread_that_submitted) {
  const std::string text = file_text(8 << 20, 1);
  const AlignedMemory memory(8 << 20);
  auto reader = BlockReader::create(options());
  const int file = reader->add_file(write("a", text));
  std::thread([&] { reader->submit(whole(file, 8 << 20, memory)); }).join();
  reader.reset();
  memory.poison();
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_TRUE(memory.poisoned(0, memory.size()));
}

/// Pages of a file in the page cache.
std::int64_t pages_cached(const fs::path& path) {
  const MappedFile map(path);
  std::vector<unsigned char> present(map.bytes().size() / 4096 + 1);
  EXPECT_EQ(
      ::mincore(const_cast<std::byte*>(map.bytes().data()), map.bytes().size(), present.data()), 0);
  std::int64_t pages = 0;
  for (const unsigned char page : present) pages += page & 1;
  return pages;
}

TEST_P(DiskReaderTest, leaves_the_page_cache_as_it_was) {
  constexpr std::int64_t kBytes = 24 << 20;
  const fs::path path = write("a", file_text(kBytes, 1));
  const int descriptor = ::open(path.c_str(), O_RDONLY);
  ASSERT_EQ(::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED), 0);
  ::close(descriptor);
  if (pages_cached(path) != 0) GTEST_SKIP() << "this file system does not drop pages when asked";
  const auto reader = BlockReader::create(options());
  const AlignedMemory memory(kBytes);
  reader->submit(whole(reader->add_file(path), kBytes, memory));
  EXPECT_TRUE(reader->wait().good());
  // Read-ahead may have been on its way to a page while the piece was dropped.
  EXPECT_LE(pages_cached(path), GetParam().direct ? 0 : kBytes / 4096 / 8);
}

std::int64_t disk_bytes_of_process() {
  std::ifstream file("/proc/self/io");
  std::string key;
  std::int64_t value = -1;
  while (file >> key >> value) {
    if (key == "read_bytes:") return value;
  }
  return -1;
}

TEST_P(DirectReaderTest, counts_exactly_what_the_disk_was_asked_for) {
  if (disk_bytes_of_process() < 0) GTEST_SKIP() << "there is no read_bytes in /proc/self/io";
  constexpr std::int64_t kBytes = 12 << 20;
  const fs::path path = write("a", file_text(kBytes, 1));
  const AlignedMemory memory(kBytes);
  std::int64_t extra = -1;
  // Pages of this program itself may have to be read meanwhile: then it was not a fair try.
  for (int attempt = 0; attempt < 5 && extra != 0; ++attempt) {
    const auto reader = BlockReader::create(options());
    const int file = reader->add_file(path);
    if (!reader->facts().direct) GTEST_SKIP() << reader->facts().why;
    const std::int64_t before = disk_bytes_of_process();
    for (std::int64_t at = 0; at < kBytes; at += 3 << 20) {
      reader->submit({file, at, 3 << 20, 3 << 20, memory.data() + at, std::uint64_t(at)});
    }
    std::int64_t sum = 0;
    for (const auto& [tag, done] : wait_for_all(*reader)) sum += done.bytes_read;
    extra = disk_bytes_of_process() - before - reader->bytes_read();
    ASSERT_EQ(reader->bytes_read(), kBytes);
    ASSERT_EQ(sum, kBytes);
    ASSERT_GE(extra, 0);
  }
  EXPECT_EQ(extra, 0);
}

TEST_P(BlockReaderTest, registered_or_not_the_bytes_are_the_same) {
  const std::string text = file_text(3 << 20, 1);
  const fs::path path = write("a", text);
  const auto reader = BlockReader::create(options());
  const int file = reader->add_file(path);
  const AlignedMemory first(3 << 20), second(3 << 20, true), unknown(3 << 20);
  reader->register_memory(first.bytes());
  reader->register_memory(second.bytes());
  if (GetParam().engine == Engine::io_uring) {
    EXPECT_TRUE(reader->facts().registered) << reader->facts().why;
  } else {
    EXPECT_EQ(reader->facts().registered, false);
  }
  std::uint64_t tag = 0;
  for (const AlignedMemory* memory : {&first, &second, &unknown}) {
    memory->poison();
    reader->submit(whole(file, 3 << 20, *memory, ++tag));
  }
  for (const auto& [key, done] : wait_for_all(*reader)) EXPECT_TRUE(done.good()) << key;
  for (const AlignedMemory* memory : {&first, &second, &unknown}) {
    EXPECT_TRUE(same(memory->data(), text));
  }
}

TEST_P(BlockReaderTest, what_cannot_be_read_in_blocks_is_refused_by_name) {
  const auto reader = BlockReader::create(options());
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  for (const fs::path& path :
       {folder_ / "pipe", folder_, folder_ / "absent", fs::path("/dev/null")}) {
    try {
      reader->add_file(path);
      ADD_FAILURE() << path;
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::io);
      EXPECT_EQ(error.parts().where, path.string());
    }
  }
}

TEST_P(BlockReaderTest, an_extent_off_the_blocks_is_our_mistake_and_starts_nothing) {
  const auto reader = BlockReader::create(options());
  const int file = reader->add_file(write("a", file_text(1 << 20, 1)));
  const AlignedMemory memory(1 << 20);
  const BlockRead good = whole(file, 1 << 20, memory);
  const auto refused = [&](auto change) {
    BlockRead read = good;
    change(read);
    try {
      const std::vector<BlockRead> both = {good, read};
      reader->submit(both);
    } catch (const Error& error) {
      return error.fault() == Fault::internal && reader->in_flight() == 0;
    }
    return false;
  };
  EXPECT_TRUE(refused([](BlockRead& read) { read.offset = 512; }));
  EXPECT_TRUE(refused([](BlockRead& read) { read.offset = -4096; }));
  EXPECT_TRUE(refused([](BlockRead& read) { read.bytes += 8; }));
  EXPECT_TRUE(refused([](BlockRead& read) { read.to += 512; }));
  EXPECT_TRUE(refused([](BlockRead& read) { read.file = 7; }));
  EXPECT_TRUE(refused([](BlockRead& read) { read.bytes_needed = read.bytes + 1; }));
  EXPECT_THROW(reader->wait(), Error);
}

constexpr Place kDirectPlaces[] = {{Engine::io_uring, true, true}, {Engine::threads, true, true}};
constexpr Place kDiskPlaces[] = {{Engine::io_uring, true, true},
                                 {Engine::io_uring, false, true},
                                 {Engine::threads, true, true},
                                 {Engine::threads, false, true}};
constexpr Place kAllPlaces[] = {{Engine::io_uring, true, true},  {Engine::io_uring, false, true},
                                {Engine::io_uring, true, false}, {Engine::io_uring, false, false},
                                {Engine::threads, true, true},   {Engine::threads, false, true},
                                {Engine::threads, true, false},  {Engine::threads, false, false}};

INSTANTIATE_TEST_SUITE_P(Direct, DirectReaderTest, testing::ValuesIn(kDirectPlaces), name_of_place);
INSTANTIATE_TEST_SUITE_P(Disk, DiskReaderTest, testing::ValuesIn(kDiskPlaces), name_of_place);
INSTANTIATE_TEST_SUITE_P(All, BlockReaderTest, testing::ValuesIn(kAllPlaces), name_of_place);

class UringTest : public FolderTest {
 protected:
  void SetUp() override {
    FolderTest::SetUp();
    const std::string why = BlockReader::create({})->facts().why;
    if (!why.empty()) GTEST_SKIP() << why;
  }
};

TEST_F(FolderTest, io_uring_forbidden_means_threads_and_is_said) {
  const std::string text = file_text(1'000'001, 1);
  const fs::path path = write("a", text);
  for (const int error_number : {EPERM, ENOSYS, ENOMEM}) {
    BlockReader::Options forbidden;
    forbidden.pretend_queue_init_error = error_number;
    const auto reader = BlockReader::create(forbidden);
    EXPECT_EQ(reader->facts().engine, Engine::threads);
    EXPECT_EQ(reader->facts().why,
              std::string("io_uring_queue_init: ") + std::strerror(error_number));
    const AlignedMemory memory(1'000'001);
    reader->submit(whole(reader->add_file(path), 1'000'001, memory));
    EXPECT_TRUE(reader->wait().good());
    EXPECT_TRUE(same(memory.data(), text));

    forbidden.engine = Engine::io_uring;
    try {
      BlockReader::create(forbidden);
      ADD_FAILURE();
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::io);
      EXPECT_THAT(to_text(error), HasSubstr(std::strerror(error_number)));
    }
  }
}

TEST_F(UringTest, destruction_waits_for_a_read_that_has_not_ended) {
  // The reader's descriptor becomes an empty pipe's: that read stays with the kernel until bytes
  // come.
  const fs::path path = write("a", file_text(kBlockBytes, 1));
  BlockReader::Options options;
  options.engine = Engine::io_uring;
  auto reader = BlockReader::create(options);
  const int file = reader->add_file(path);
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  ASSERT_GE(::dup2(ends[0], descriptor_of(path)), 0);
  ::close(ends[0]);
  const AlignedMemory memory(kBlockBytes);
  reader->submit({file, 0, kBlockBytes, kBlockBytes, memory.data(), 0});
  std::atomic<bool> written = false;
  std::thread writer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    written = true;
    const std::string late(std::size_t(kBlockBytes), 'z');
    EXPECT_EQ(::write(ends[1], late.data(), late.size()), ssize_t(late.size()));
  });
  reader.reset();
  EXPECT_TRUE(written);
  EXPECT_EQ(memory.data()[0], std::byte{'z'});
  writer.join();
  ::close(ends[1]);
}

TEST_F(UringTest, memory_that_cannot_be_registered_is_read_into_all_the_same) {
  const std::string text = file_text(1 << 20, 1);
  const auto reader = BlockReader::create({});
  const int file = reader->add_file(write("a", text));
  const AlignedMemory good(1 << 20), closed(1 << 20);
  ASSERT_EQ(::mprotect(closed.data(), 1 << 20, PROT_NONE), 0);
  reader->register_memory(good.bytes());
  reader->register_memory(closed.bytes());
  EXPECT_FALSE(reader->facts().registered);
  EXPECT_EQ(reader->facts().why, "io_uring_register_buffers: Bad address");
  ASSERT_EQ(::mprotect(closed.data(), 1 << 20, PROT_READ | PROT_WRITE), 0);
  reader->submit(whole(file, 1 << 20, good, 1));
  reader->submit(whole(file, 1 << 20, closed, 2));
  for (const auto& [tag, done] : wait_for_all(*reader)) EXPECT_TRUE(done.good()) << tag;
  EXPECT_TRUE(same(good.data(), text));
  EXPECT_TRUE(same(closed.data(), text));
}

/// Takes the right to lock memory without limit from this thread. False if it cannot be told.
bool drop_ipc_lock() {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  if (::syscall(SYS_capget, &header, data) != 0) return false;
  data[CAP_TO_INDEX(CAP_IPC_LOCK)].effective &= ~CAP_TO_MASK(CAP_IPC_LOCK);
  return ::syscall(SYS_capset, &header, data) == 0;
}

TEST_F(UringTest, a_small_limit_on_locked_memory_is_no_error) {
  const std::string text = file_text(4 << 20, 1);
  const fs::path path = write("a", text);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_MEMLOCK, &before), 0);
  rlimit small = before;
  small.rlim_cur = std::min<rlim_t>(before.rlim_max, 64 << 10);
  ASSERT_EQ(::setrlimit(RLIMIT_MEMLOCK, &small), 0);
  std::string skipped;
  std::thread([&] {  // capabilities are a thread's own
    if (!drop_ipc_lock()) {
      skipped = "this thread's capabilities cannot be changed";
      return;
    }
    const auto reader = BlockReader::create({});
    const AlignedMemory memory(4 << 20);
    reader->register_memory(memory.bytes());
    EXPECT_FALSE(reader->facts().registered);
    EXPECT_EQ(reader->facts().why,
              "io_uring_register_buffers: Cannot allocate memory, ulimit -l is 64 KiB");
    reader->submit(whole(reader->add_file(path), 4 << 20, memory));
    EXPECT_TRUE(reader->wait().good());
    EXPECT_TRUE(same(memory.data(), text));
  })
      .join();
  ASSERT_EQ(::setrlimit(RLIMIT_MEMLOCK, &before), 0);
  if (!skipped.empty()) GTEST_SKIP() << skipped;
}

}  // namespace
}  // namespace tailor
