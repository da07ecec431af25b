// A disk that another program fills while weights are merged.

#include <gmock/gmock.h>

#include <atomic>
#include <mutex>

#include "adapters/merge/receipt.h"
#include "merge_support.h"
#include "tests/data/store/store_fixture.h"
#include "tests/support/small_disk.h"

namespace tailor {
namespace {

using namespace testing_support;
using testing::HasSubstr;
using testing::IsEmpty;

class MergeDisk : public testing::Test {
 protected:
  MergeDisk() : disk_(box_ / "disk") {
    TinyModel tiny;
    tiny.hidden = 1024;
    tiny.expert_width = 1000;
    tiny.experts = 4;
    tiny.shards = 3;
    ModelMaker(tiny).write(model());
    make_adapter(box_ / "adapter", read_model_spec(model()), {"experts", "attention"});
    options_ = one_adapter(box_ / "adapter");
    options_.threads = 1;
    merge_adapters(model(), box_ / "whole", options_);
    for (const auto& entry : fs::directory_iterator(box_ / "whole"))
      bytes_ += static_cast<std::int64_t>(entry.file_size());
  }
  fs::path model() const { return box_ / "model"; }

  /// Fills the disk when the merge has asked `calls` times whether to go on, which it does before
  /// every piece.
  Error merge_on_filling_disk(int calls) {
    MergeOptions options = options_;
    std::mutex mutex;
    int asked = 0;
    options.stop = [&] {
      const std::lock_guard lock(mutex);
      if (++asked == calls) disk_.fill();
      return false;
    };
    try {
      merge_adapters(model(), disk_ / "out", options);
    } catch (const Error& error) {
      return error;
    }
    ADD_FAILURE() << "the disk was not full";
    return Error(Fault::internal, {});
  }
  void expect_goes_on() {
    EXPECT_FALSE(fs::exists(disk_ / "out"));
    disk_.make_room();
    merge_adapters(model(), disk_ / "out", options_);
    EXPECT_EQ(merged_files(disk_ / "out"), merged_files(box_ / "whole"));
    EXPECT_THAT(verify_merge(disk_ / "out", {}).problems, IsEmpty());
    EXPECT_FALSE(fs::exists(disk_ / ".out.tailor-merge"));
    Json ours = read_json(disk_ / "out" / kReceiptName),
         theirs = read_json(box_ / "whole" / kReceiptName);
    ours.erase("run");
    theirs.erase("run");
    EXPECT_EQ(ours, theirs);
  }

  TemporaryFolder box_;
  SmallDisk disk_;
  MergeOptions options_;
  std::int64_t bytes_ = 0;
};

/// Space is not reserved there, so that weights meet the full disk.
TEST_F(MergeDisk, filled_half_way_through_the_weights_it_goes_on_to_the_same_bytes) {
  if (!disk_.without_reserving(bytes_ + (16 << 20))) {
    GTEST_SKIP() << "no file system can be mounted here";
  }
  const Error error = merge_on_filling_disk(12);
  EXPECT_EQ(error.fault(), Fault::io);
  EXPECT_THAT(error.parts().what, HasSubstr("No space left on device"));
  EXPECT_THAT(error.parts().where, HasSubstr(".out.tailor-merge/model-0000"));
  const fs::path begun = disk_ / ".out.tailor-merge";
  EXPECT_TRUE(fs::exists(begun / "merge.journal"));
  // Once more on a disk that is still full: nothing is lost of what is there.
  try {
    merge_adapters(model(), disk_ / "out", options_);
    ADD_FAILURE() << "the disk was not full";
  } catch (const Error& again) {
    EXPECT_EQ(again.fault(), Fault::does_not_fit);
    EXPECT_THAT(again.parts().what, HasSubstr("of disk"));
  }
  expect_goes_on();
}

/// The weights have their space from the start; what meets the full disk is the journal, or the
/// small files.
TEST_F(MergeDisk, filled_where_space_is_reserved_it_goes_on_to_the_same_bytes) {
  if (!disk_.in_memory(bytes_ + (2 << 20))) GTEST_SKIP() << "no file system can be mounted here";
  const Error error = merge_on_filling_disk(12);
  EXPECT_EQ(error.fault(), Fault::io);
  EXPECT_THAT(error.parts().what, HasSubstr("No space left on device"));
  EXPECT_THAT(error.parts().where, HasSubstr("disk/.out.tailor-merge"));
  expect_goes_on();
}

}  // namespace
}  // namespace tailor
