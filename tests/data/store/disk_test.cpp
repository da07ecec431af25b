// A disk that is full, or too small.

#include <sys/mount.h>
#include <sys/statvfs.h>

#include "base/text.h"
#include "data/store/journal.h"
#include "tests/data/store/pack_process.h"
#include "tests/data/store/store_fixture.h"

namespace tailor::testing_support {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;

/// A small file system of its own at `disk()`; tests are skipped where mounting is not allowed.
class Disk : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    ModelMaker(TinyModel{}).write(model());
    make_folders(disk());
    pack_store(model(), folder_ / "whole", options());
    bytes_ = Store::open(folder_ / "whole").layout().bytes();
  }
  void TearDown() override {
    if (mounted_) ::umount(disk().c_str());
    StoreTest::TearDown();
  }
  fs::path disk() const { return folder_ / "disk"; }
  bool mount(std::int64_t bytes) {
    const std::string size = "size=" + std::to_string(align_up(bytes, 4096));
    const unsigned long flags = mounted_ ? MS_REMOUNT : 0;
    const bool done = ::mount("tmpfs", disk().c_str(), "tmpfs", flags, size.c_str()) == 0;
    mounted_ = mounted_ || done;
    return done;
  }
  bool mounted_ = false;
  std::int64_t bytes_ = 0;
};

TEST_F(Disk, too_small_says_what_is_needed_and_goes_on_with_more_room) {
  if (!mount(bytes_ / 2)) GTEST_SKIP() << "no file system can be mounted here";
  const std::string error =
      error_of([&] { pack_store(model(), disk() / "store", options()); }, folder_, Fault::io);
  EXPECT_THAT(error, AllOf(HasSubstr("the store needs " + bytes_text(bytes_) + " of disk"),
                           HasSubstr("No space left on device"), HasSubstr("DIR/disk/store"),
                           HasSubstr("Free space on that disk")));
  ASSERT_TRUE(mount(bytes_ + (1 << 20)));
  pack_store(model(), disk() / "store", options());
  EXPECT_THAT(problems(disk() / "store", model()), IsEmpty());
  EXPECT_THAT(differing_files(disk() / "store", folder_ / "whole"), IsEmpty());
}

TEST_F(Disk, that_cannot_hold_even_the_journal_goes_on_with_more_room) {
  if (!mount(4096)) GTEST_SKIP() << "no file system can be mounted here";
  write_atomically(disk() / "other", std::string(4000, 'x'));
  const std::string error =
      error_of([&] { pack_store(model(), disk() / "store", options()); }, folder_, Fault::io);
  EXPECT_THAT(error, AllOf(HasSubstr("No space left on device"), HasSubstr("DIR/disk/store")));
  ASSERT_TRUE(mount(bytes_ + (1 << 20)));
  pack_store(model(), disk() / "store", options());
  EXPECT_THAT(differing_files(disk() / "store", folder_ / "whole"), IsEmpty());
}

/// Tiles cannot meet a full disk, as their space is taken before the first: what is written after
/// another program filled the disk is journal, manifest and small files.
TEST_F(Disk, filled_by_another_while_it_is_packed_leaves_a_store_that_goes_on) {
  TinyModel tiny;
  tiny.layers = 4;
  tiny.shards = 4;
  ModelMaker maker(tiny);
  fs::remove_all(model());
  maker.write(model());
  fs::remove_all(folder_ / "whole");
  pack_store(model(), folder_ / "whole", options());
  bytes_ = Store::open(folder_ / "whole").layout().bytes();
  if (!mount(bytes_ + (1 << 20))) GTEST_SKIP() << "no file system can be mounted here";
  // The last shard comes when the disk is full.
  const fs::path late = model() / maker.shard_name(3), store = disk() / "store";
  fs::rename(late, folder_ / "late");
  PackOptions asked = options();
  asked.follow = true;
  asked.stop = [&] {
    if (!fs::exists(store / "head.tiles") || fs::exists(late)) return false;
    struct statvfs info {};
    ::statvfs(disk().c_str(), &info);
    FileWriter(disk() / "filler")
        .write(std::string(static_cast<std::size_t>(info.f_bavail * info.f_frsize), 'x'));
    fs::rename(folder_ / "late", late);
    return false;
  };
  EXPECT_THAT(error_of([&] { pack_store(model(), store, asked); }, folder_, Fault::io),
              AllOf(HasSubstr("No space left on device"), HasSubstr("DIR/disk/store")));
  EXPECT_TRUE(fs::exists(late));
  EXPECT_FALSE(fs::exists(store / kManifestName));
  fs::remove(disk() / "filler");
  const PackReport report = pack_store(model(), store, options());
  EXPECT_GT(report.units_before, 0);
  EXPECT_THAT(differing_files(store, folder_ / "whole"), IsEmpty());
}

TEST_F(Disk, a_journal_that_met_a_full_disk_is_as_before) {
  if (!mount(8192)) GTEST_SKIP() << "no file system can be mounted here";
  PackJournal::Header header;
  header.forms.of_matrix = {WeightFormat::bf16()};
  const auto id = [](std::int64_t index) { return UnitId{UnitKind::expert, 0, index}; };
  {
    PackJournal journal(disk(), header);
    for (int i = 0; i < 10; ++i) journal.add(id(i), {});
    journal.sync();
    for (int i = 10; i < 200; ++i) journal.add(id(i), {});  // 190 lines of some 80 bytes
    EXPECT_THROW(journal.sync(), Error);
    EXPECT_THROW(journal.sync(), Error) << "once more, as a failing packer does";
  }
  {
    PackJournal journal(disk(), header);
    EXPECT_EQ(journal.units().size(), 10U);
  }
  ASSERT_TRUE(mount(1 << 20));
  {
    PackJournal journal(disk(), header);
    for (int i = 10; i < 200; ++i) journal.add(id(i), {});
    journal.sync();
  }
  EXPECT_EQ(PackJournal(disk(), header).units().size(), 200U);
}

}  // namespace
}  // namespace tailor::testing_support
