// Shards, the index and small files; and that the folder appears whole or not at all.

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mount.h>

#include <set>

#include "tests/data/store_export/export_fixture.h"

namespace tailor {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using namespace testing_support;

class Folder : public ExportTest {
 protected:
  void SetUp() override {
    ExportTest::SetUp();
    pack(golden("llama4_maverick_tiny"), int4_of());
  }
  fs::path staging() const { return folder_ / ".out.tailor-export"; }
  void expect_nothing_left() const { EXPECT_THAT(names_in(folder_), ElementsAre("store")); }
};

TEST_F(Folder, shards_keep_to_their_size_and_a_matrix_to_one_shard) {
  ExportOptions options;
  options.shard_bytes_max = 40'000;
  const ExportReport report = export_to(out(), options);
  EXPECT_GT(report.shards, 5);
  const Json index = read_json(out() / "model.safetensors.index.json");
  const Checkpoint exported = Checkpoint::open(out());
  EXPECT_EQ(index["metadata"]["total_size"], report.bytes);
  EXPECT_EQ(exported.total_bytes(), report.bytes);
  std::set<std::string> used;
  for (const auto& [name, file] : index["weight_map"].items()) {
    used.insert(file.get<std::string>());
    EXPECT_EQ(exported.shard_path(exported.find(name)).filename(), file.get<std::string>());
    if (!name.ends_with("_packed")) continue;
    const std::string weight = name.substr(0, name.size() - 7);
    EXPECT_EQ(index["weight_map"][weight + "_scale"], file);
    EXPECT_EQ(index["weight_map"][weight + "_shape"], file);
  }
  EXPECT_EQ(used.size(), static_cast<std::size_t>(report.shards));
  char last[64];
  std::snprintf(last, sizeof last, "model-%05d-of-%05d.safetensors",
                static_cast<int>(report.shards), static_cast<int>(report.shards));
  EXPECT_EQ(used.count(last), 1U);
  for (const std::string& file : used) EXPECT_LE(fs::file_size(out() / file), 40'000U) << file;
  for (const auto& [name, tensor] : exported.tensors()) {
    EXPECT_EQ(tensor.info.offset % dtype_bytes(tensor.info.dtype), 0) << name;
  }
  expect_round_trip();
}

TEST_F(Folder, a_tensor_larger_than_a_shard_has_a_file_of_its_own) {
  ExportOptions options;
  options.shard_bytes_max = 100;
  const ExportReport report = export_to(out(), options);
  EXPECT_LT(report.shards, report.tensors) << "an int4 matrix is three tensors";
  expect_round_trip();
}

TEST_F(Folder, tokenizer_and_generation_config_come_along_and_nothing_of_the_stores_own) {
  write_atomically(store() / "tokenizer.json", "{\"a\": 1}");
  write_atomically(store() / "chat_template.jinja", "hello");
  make_folders(store() / "private");
  static_cast<void>(export_to(out()));
  EXPECT_THAT(names_in(out()),
              ElementsAre("chat_template.jinja", "config.json", "generation_config.json",
                          "model-00001-of-00001.safetensors", "model.safetensors.index.json",
                          "tokenizer.json"));
  EXPECT_EQ(read_text(out() / "tokenizer.json"), "{\"a\": 1}");
}

TEST_F(Folder, config_is_the_stores_but_for_the_quantization) {
  static_cast<void>(export_to(out()));
  Json exported = read_json(out() / "config.json");
  exported.erase("quantization_config");
  EXPECT_EQ(exported, read_json(store() / "config.json"));
}

TEST_F(Folder, what_is_there_is_refused_and_left_alone) {
  for (const bool empty : {true, false}) {
    make_folders(out());
    if (!empty) write_atomically(out() / "mine", "x");
    const Error error = error_of([&] { static_cast<void>(export_to(out())); });
    EXPECT_EQ(error.fault(), Fault::usage);
    EXPECT_THAT(error.parts().what, HasSubstr("there already"));
    EXPECT_EQ(fs::is_empty(out()), empty);
  }
  fs::remove_all(out());
  fs::create_symlink("nowhere", out());
  EXPECT_EQ(error_of([&] { static_cast<void>(export_to(out())); }).fault(), Fault::usage);
  EXPECT_EQ(error_of([&] { static_cast<void>(export_to(store())); }).fault(), Fault::usage);
}

TEST_F(Folder, a_trailing_slash_names_the_same_folder) {
  static_cast<void>(export_to(fs::path(out().string() + "/")));
  EXPECT_TRUE(fs::exists(out() / "config.json"));
  EXPECT_THAT(names_in(folder_), ElementsAre("out", "store"));
}

TEST_F(Folder, interrupted_leaves_nothing) {
  int asked = 0;
  ExportOptions options;
  options.stop = [&] { return ++asked == 5; };
  const Error error = error_of([&] { static_cast<void>(export_to(out(), options)); });
  EXPECT_EQ(error.fault(), Fault::stopped);
  expect_nothing_left();
}

TEST_F(Folder, what_a_killed_export_left_is_cleared_away) {
  make_folders(staging() / "deep");
  write_atomically(staging() / "model-00001-of-00001.safetensors", "half");
  static_cast<void>(export_to(out()));
  EXPECT_THAT(names_in(folder_), ElementsAre("out", "store"));
  EXPECT_FALSE(fs::exists(out() / "deep"));
  expect_round_trip();
}

TEST_F(Folder, two_exports_do_not_fill_one_folder) {
  make_folders(staging());
  write_atomically(staging() / "theirs", "x");
  const int descriptor = ::open(staging().c_str(), O_RDONLY | O_DIRECTORY);
  ASSERT_EQ(::flock(descriptor, LOCK_EX), 0);
  const Error error = error_of([&] { static_cast<void>(export_to(out())); });
  ::close(descriptor);
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_THAT(error.parts().what, HasSubstr("another export"));
  EXPECT_TRUE(fs::exists(staging() / "theirs"));
}

TEST_F(Folder, a_damaged_tile_ends_it_and_leaves_nothing) {
  const Store opened = Store::open(store());
  const StoredUnit* unit = opened.layout().find({UnitKind::expert, 3, 6});
  ASSERT_NE(unit, nullptr);
  {
    std::fstream file(opened.path_of(*unit), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(unit->offset + unit->matrices[1].codes_offset + 3);
    file.put('\x55');
    file.put('\xAA');
  }
  const Error error = error_of([&] { static_cast<void>(export_to(out())); });
  EXPECT_EQ(error.fault(), Fault::bad_file);
  EXPECT_THAT(error.parts().where, HasSubstr("layer 3, expert 6"));
  expect_nothing_left();
}

TEST_F(Folder, a_full_disk_says_so_before_anything_is_read_and_leaves_nothing) {
  const fs::path disk = folder_ / "disk";
  make_folders(disk);
  if (::mount("tailor_test", disk.c_str(), "tmpfs", 0, "size=128k") != 0) {
    GTEST_SKIP() << "no file system can be mounted here";
  }
  bool read = false;
  ExportOptions options;
  options.stop = [&] {
    read = true;
    return false;
  };
  const Error error = error_of([&] { static_cast<void>(export_to(disk / "out", options)); });
  const auto left = names_in(disk);
  ::umount2(disk.c_str(), MNT_DETACH);
  EXPECT_EQ(error.fault(), Fault::io);
  EXPECT_THAT(error.parts().mend, HasSubstr("Free space"));
  EXPECT_FALSE(read);
  EXPECT_THAT(left, ElementsAre());
}

TEST_F(Folder, progress_ends_at_the_whole) {
  std::int64_t last = 0, of = 0;
  ExportOptions options;
  options.progress = [&](std::int64_t done, std::int64_t bytes, double) {
    EXPECT_GE(done, last);
    last = done;
    of = bytes;
  };
  static_cast<void>(export_to(out(), options));
  EXPECT_GT(of, 0);
  EXPECT_EQ(last, of);
}

}  // namespace
}  // namespace tailor
