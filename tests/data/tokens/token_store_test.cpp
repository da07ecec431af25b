#include "data/tokens/token_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "base/error.h"
#include "data/tokens/hdf5.h"

namespace tailor {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class TokenStoreFile : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("tailor_store_" + std::to_string(::getpid()));
    fs::create_directories(folder_);
    path_ = folder_ / "tokens.h5";
  }
  void TearDown() override { fs::remove_all(folder_); }

  /// Rows {doc 0, doc 2}, {doc 1}.
  void write() const {
    static const std::vector<std::vector<std::int32_t>> ids = {{1, 2, 3}, {4, 5, 6, 7}, {8, 9}};
    static const std::vector<std::vector<std::uint8_t>> trained = {{1, 0, 1}, {0, 0, 1, 1}, {1, 1}};
    TokenStoreContent content;
    content.rows = {{0, 2}, {1}};
    content.sequence_len = 5;
    content.manifest = Json{{"digest", "abc"}};
    content.document = [](std::int64_t d) {
      const auto i = static_cast<std::size_t>(d);
      return TokenStoreContent::Document{ids[i], trained[i], static_cast<std::int32_t>(d), 10 + d};
    };
    write_token_store(path_, content);
  }
  fs::path folder_, path_;
};

TEST_F(TokenStoreFile, gives_back_what_was_written) {
  write();
  const TokenStore store = TokenStore::open(path_);
  EXPECT_THAT(store.ids(), ElementsAre(1, 2, 3, 8, 9, 4, 5, 6, 7));
  EXPECT_THAT(store.row_start(), ElementsAre(0, 5, 9));
  EXPECT_THAT(store.document_start(), ElementsAre(0, 3, 5, 9));
  EXPECT_THAT(store.document_file(), ElementsAre(0, 2, 1));
  EXPECT_THAT(store.document_line(), ElementsAre(10, 12, 11));
  EXPECT_EQ(store.manifest().at("digest"), "abc");
  EXPECT_EQ(store.sequence_len(), 5);
}

TEST_F(TokenStoreFile, the_first_token_of_a_document_never_carries_loss) {
  write();
  const TokenStore store = TokenStore::open(path_);
  EXPECT_THAT(store.trained(), ElementsAre(0, 0, 1, 0, 1, 0, 0, 1, 1));
  EXPECT_EQ(store.trained_tokens(), 4);
}

TEST_F(TokenStoreFile, the_same_data_give_the_same_bytes) {
  write();
  const std::string first = read_text(path_);
  const std::string manifest = read_text(TokenStore::manifest_path(path_));
  write();
  EXPECT_EQ(read_text(path_), first);
  EXPECT_EQ(read_text(TokenStore::manifest_path(path_)), manifest);
}

TEST_F(TokenStoreFile, cut_off_at_any_length_is_an_error) {
  write();
  const std::string whole = read_text(path_);
  for (std::size_t length = 0; length < whole.size(); length += length < 200 ? 1 : 13) {
    std::ofstream(path_, std::ios::binary) << whole.substr(0, length);
    try {
      TokenStore::open(path_);
      FAIL() << length;
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::bad_file);
      EXPECT_THAT(error.parts().mend, HasSubstr("data prepare"));
    }
  }
}

TEST_F(TokenStoreFile, any_flipped_bit_is_an_error) {
  write();
  const std::string whole = read_text(path_);
  for (std::size_t at = 0; at < whole.size(); at += 7) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << (at % 8)));
    std::ofstream(path_, std::ios::binary) << damaged;
    EXPECT_THROW(TokenStore::open(path_), Error) << at;
  }
}

TEST_F(TokenStoreFile, a_store_without_its_manifest_is_not_opened) {
  write();
  const fs::path manifest = TokenStore::manifest_path(path_);
  const std::string text = read_text(manifest);
  for (std::size_t length = 0; length + 2 < text.size(); length += 5) {
    std::ofstream(manifest, std::ios::binary) << text.substr(0, length);
    EXPECT_THROW(TokenStore::open(path_), Error) << length;
  }
  fs::remove(manifest);
  EXPECT_THROW(TokenStore::open(path_), Error);
  fs::remove(path_);
  try {
    TokenStore::open(path_);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::io);
  }
}

TEST_F(TokenStoreFile, another_version_says_so) {
  write();
  const fs::path path = TokenStore::manifest_path(path_);
  Json manifest = read_json(path);
  manifest["version"] = 99;
  write_atomically(path, manifest.dump());
  try {
    TokenStore::open(path_);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.parts().what,
              "the token store has format version 99, this program reads version 1");
  }
}

TEST_F(TokenStoreFile, a_failed_write_leaves_the_older_store_whole) {
  write();
  const std::string before = read_text(path_);
  TokenStoreContent content;
  content.rows = {{0}};
  content.document = [calls = 0](std::int64_t) mutable -> TokenStoreContent::Document {
    static const std::vector<std::int32_t> ids = {1};
    static const std::vector<std::uint8_t> trained = {1};
    if (++calls > 1) throw Error(Fault::io, {"no", "", ""});
    return {ids, trained, 0, 0};
  };
  EXPECT_THROW(write_token_store(path_, content), Error);
  EXPECT_EQ(read_text(path_), before);
  EXPECT_EQ(TokenStore::open(path_).rows(), 2);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 2);
}

TEST_F(TokenStoreFile, hdf5_errors_become_errors_of_ours) {
  const hdf5::Session session;
  try {
    hdf5::check(H5Fopen("/nonexistent/x.h5", H5F_ACC_RDONLY, H5P_DEFAULT), "cannot open",
                "/nonexistent/x.h5");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::io);
    EXPECT_THAT(error.what(), HasSubstr("No such file"));
  }
}

}  // namespace
}  // namespace tailor
