#include "base/file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "base/error.h"
#include "base/random.h"
#include "base/units.h"

namespace tailor {
namespace {

class FileTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) / ("tailor_file_" + std::to_string(::getpid()));
    make_folders(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  fs::path folder_;
};

TEST_F(FileTest, atomic_write_leaves_the_old_file_when_filling_fails) {
  const fs::path path = folder_ / "a.txt";
  write_atomically(path, "old");
  EXPECT_THROW(replace_atomically(path,
                                  [](const fs::path& staging) {
                                    std::ofstream(staging) << "half";
                                    throw Error(Fault::io, {"no more", "", ""});
                                  }),
               Error);
  EXPECT_EQ(read_text(path), "old");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1);
}

TEST_F(FileTest, names_from_files_stay_in_their_folder) {
  fs::create_directory_symlink("/etc", folder_ / "link");
  for (const std::string name : {"../x", "/etc/passwd", "a/../../b", "", "link/passwd"}) {
    EXPECT_THROW(inside_folder(folder_, name), Error) << name;
  }
  EXPECT_THROW(inside_folder(folder_, std::string_view("a\0b", 3)), Error);
  EXPECT_THROW(inside_folder(folder_, std::string(5000, 'a')), Error);
  EXPECT_EQ(inside_folder(folder_, "sub/a.bin"), folder_ / "sub/a.bin");
}

TEST_F(FileTest, digest_of_a_file_is_the_digest_of_its_bytes) {
  const std::string text(3'000'001, 'x');
  write_atomically(folder_ / "big", text);
  EXPECT_EQ(sha256_file(folder_ / "big"), sha256_hex(text));
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_F(FileTest, missing_file_is_an_io_error_that_names_it) {
  try {
    read_text(folder_ / "absent");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::io);
    EXPECT_EQ(error.parts().where, (folder_ / "absent").string());
  }
}

TEST(Philox, known_answers) {  // Random123's kat_vectors, philox4x32-10
  EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}),
            (std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (std::array<std::uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Units, cost_is_exact_in_micro_dollars) {
  EXPECT_EQ(cost_usd_micros(2'690'000, 3'600'000), 2'690'000);
  EXPECT_EQ(cost_usd_micros(1'190'000, 1), 0);
  EXPECT_EQ(cost_usd_micros(1'000'000'000'000, 9'000'000'000), 2'500'000'000'000'000);
}

}  // namespace
}  // namespace tailor
