// tailor model pack and verify, as a user meets them.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <regex>

#include "base/text.h"
#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;

class StoreVerbs : public testing::Test {
 protected:
  void SetUp() override { box_.copy_model("llama4_maverick_tiny", "model"); }
  Outcome run(const std::vector<std::string>& arguments) { return run_tailor(box_, arguments); }
  void flip(const std::string& name, std::size_t at) {
    std::string bytes = read_text(box_.root() / name);
    bytes[at] = static_cast<char>(bytes[at] ^ 1);
    box_.write_text(name, bytes);
  }
  /// `tailor ARGUMENTS` in the background, its output thrown away.
  pid_t begin(const std::vector<std::string>& arguments) {
    const pid_t child = ::fork();
    if (child != 0) return child;
    const int nowhere = ::open("/dev/null", O_WRONLY);
    ::dup2(nowhere, STDOUT_FILENO);
    ::dup2(nowhere, STDERR_FILENO);
    if (::chdir(box_.root().c_str()) != 0) ::_exit(126);
    std::vector<std::string> words = {std::string(TAILOR_BIN_DIR) + "/tailor"};
    words.insert(words.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    ::execv(argv[0], argv.data());
    ::_exit(126);
  }
  Sandbox box_;
};

TEST_F(StoreVerbs, pack_verify_and_pack_again) {
  for (const char* format : {"int4", "nf4", "fp8", "bf16", "as_is"}) {
    for (const char* others : {"as_is", "int4", "nf4", "fp8", "bf16"}) {
      const std::string store = std::string("store-") + format + "-" + others;
      const std::vector<std::string> pack = {"model", "pack",     "model", "--to",
                                             store,   "--format", format,  "--non-expert-format",
                                             others};
      const Outcome packed = run(pack);
      ASSERT_EQ(packed.code, 0) << packed.err;
      EXPECT_THAT(packed.out, AllOf(StartsWith("Packed "), HasSubstr(" into " + store + " in "),
                                    HasSubstr("train from it: base_model=" + store)));
      const auto loses = [](const std::string& name) { return name != "bf16" && name != "as_is"; };
      EXPECT_EQ(packed.out.find("quantisation error") != std::string::npos,
                loses(format) || loses(others));
      const Outcome verified = run({"model", "verify", store, "--against", "model"});
      EXPECT_EQ(verified.code, 0) << verified.out << verified.err;
      EXPECT_THAT(verified.out, AllOf(StartsWith("All 27 tiles ("),
                                      HasSubstr("as near the checkpoint as their formats can be")));
      const Outcome again = run(pack);
      EXPECT_EQ(again.code, 0);
      EXPECT_THAT(again.out, StartsWith("This store is complete: "));
    }
  }
}

TEST_F(StoreVerbs, json_documents_say_what_happened) {
  const Json packed =
      Json::parse(run({"model", "pack", "model", "--to", "store", "--group", "16", "--json"}).out);
  EXPECT_EQ(packed["store"], "store");
  EXPECT_EQ(packed["units"], 27);
  EXPECT_EQ(packed["units_before"], 0);
  EXPECT_GT(packed["bytes"], 100'000);
  EXPECT_GT(packed["source_bytes_read"], 100'000);
  EXPECT_GT(packed["relative_error"], 0.01);
  EXPECT_LT(packed["mse_over_absmax"], 1.0);
  ASSERT_EQ(packed["layers"].size(), 2U);
  EXPECT_EQ(packed["layers"][0]["layer"], 1);
  EXPECT_EQ(packed["layers"][0]["experts"], true);
  const Json again =
      Json::parse(run({"model", "pack", "model", "--to", "store", "--group", "16", "--json"}).out);
  EXPECT_EQ(again["units_before"], 27);
  EXPECT_TRUE(again["relative_error"].is_null());
  const Json verified = Json::parse(run({"model", "verify", "store", "--json"}).out);
  EXPECT_EQ(verified["good"], true);
  EXPECT_EQ(verified["tiles"], 27);
  EXPECT_EQ(verified["bytes"], packed["bytes"]);
  EXPECT_THAT(verified["problems"], IsEmpty());
}

TEST_F(StoreVerbs, verify_lists_twenty_problems_and_json_all) {
  ASSERT_EQ(run({"model", "pack", "model", "--to", "store"}).code, 0);
  const Json manifest = read_json(box_.root() / "store/store.json");
  std::size_t flipped = 0;
  for (const Json& unit : manifest["units"]) {
    if (flipped == 23) break;
    flip("store/" + manifest["files"][unit[3].get<std::size_t>()][0].get<std::string>(),
         unit[4].get<std::size_t>() + 4096);
    ++flipped;
  }
  const Outcome found = run({"model", "verify", "store"});
  EXPECT_EQ(found.code, 65);
  EXPECT_THAT(found.err, StartsWith("error: 23 of 27 tiles are not as they were packed\n"));
  const auto lines = split(found.out, '\n');
  ASSERT_EQ(lines.size(), 22U);  // the last is empty
  EXPECT_THAT(lines[0],
              AllOf(StartsWith("store/embedding.tiles, offset 0: embedding rows from 0: "),
                    HasSubstr("a tile is damaged: its hash is ")));
  EXPECT_EQ(lines[20], "and 3 more; --json lists them all");
  const Outcome document = run({"model", "verify", "store", "--json"});
  EXPECT_EQ(document.code, 65);
  EXPECT_EQ(document.err, found.err);
  const Json json = Json::parse(document.out);
  EXPECT_EQ(json["good"], false);
  ASSERT_EQ(json["problems"].size(), 23U);
  EXPECT_EQ(json["problems"][19], lines[19]);
}

TEST_F(StoreVerbs, memory_that_is_named_as_enough_is_enough) {
  const Outcome refused = run({"model", "pack", "model", "--to", "store", "--max-ram", "1MiB"});
  EXPECT_EQ(refused.code, 66);
  std::smatch found;
  ASSERT_TRUE(std::regex_search(refused.err, found, std::regex("--max-ram to (\\d+B) or more")));
  const std::string enough = found[1];
  const std::string less = std::to_string(std::stoll(enough) - 1) + "B";
  EXPECT_EQ(run({"model", "pack", "model", "--to", "store", "--max-ram", less}).code, 66);
  EXPECT_EQ(run({"model", "pack", "model", "--to", "store", "--max-ram", enough}).code, 0);
}

TEST_F(StoreVerbs, follow_packs_what_arrives_and_removes_it) {
  make_folders(box_.root() / "arriving");
  const pid_t child = begin({"model", "pack", "--follow", "arriving", "--delete-source", "--to",
                             "store", "--max-ram", "200MiB"});
  for (const char* name :
       {"config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors"}) {
    ::usleep(100'000);
    fs::copy_file(box_.root() / "model" / name, box_.root() / "arriving" / ".part");
    fs::rename(box_.root() / "arriving" / ".part", box_.root() / "arriving" / name);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_FALSE(fs::exists(box_.root() / "arriving/model-00001-of-00002.safetensors"));
  EXPECT_FALSE(fs::exists(box_.root() / "arriving/model-00002-of-00002.safetensors"));
  EXPECT_EQ(run({"model", "verify", "store", "--against", "model"}).code, 0);
  const Outcome again =
      run({"model", "pack", "--follow", "arriving", "--delete-source", "--to", "store"});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_THAT(again.out, StartsWith("This store is complete: "));
}

TEST_F(StoreVerbs, an_interrupt_ends_the_wait_with_75) {
  for (const int signal : {SIGINT, SIGTERM}) {
    make_folders(box_.root() / "arriving");
    const pid_t child = begin({"model", "pack", "--follow", "arriving", "--to", "store"});
    ::usleep(400'000);
    ::kill(child, signal);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 75) << status;
  }
}

TEST_F(StoreVerbs, a_model_whose_name_is_not_utf8_is_packed_all_the_same) {
  fs::rename(box_.root() / "model", box_.root() / "m\xff");
  const Outcome packed = run({"model", "pack", "m\xff", "--to", "store"});
  EXPECT_EQ(packed.code, 0) << packed.err;
  EXPECT_EQ(run({"model", "verify", "store"}).code, 0);
}

}  // namespace
}  // namespace tailor::testing_support
