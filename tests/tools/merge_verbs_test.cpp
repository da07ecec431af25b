// `tailor merge` as a program: killed and gone on with, refused, verified.

#include <gmock/gmock.h>
#include <signal.h>

#include <set>

#include "program.h"
#include "tests/support/small_disk.h"

namespace tailor {
namespace {

using namespace testing_support;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;

class MergeVerbs : public testing::Test {
 protected:
  MergeVerbs() {
    box_.copy_model("llama4_maverick_tiny", "model");
    fs::copy(fs::path(TAILOR_SOURCE_DIR) / "tests/golden/llama4_maverick_tiny/lora/adapter_final",
             box_.root() / "adapter");
  }
  Outcome run(const std::vector<std::string>& arguments) { return run_tailor(box_, arguments); }
  std::vector<std::string> merge_to(const std::string& out) const {
    return {"merge", "--base", "model", "--adapter", "adapter", "--out", out};
  }
  /// Digests of what a merge wrote, but for the receipt, which tells how long it took.
  std::string all_of(const std::string& folder) const {
    std::set<std::string> lines;
    for (const auto& entry : fs::directory_iterator(box_.root() / folder)) {
      const std::string name = entry.path().filename();
      if (name != "merge_receipt.json") lines.insert(name + " " + sha256_file(entry.path()) + "\n");
    }
    std::string text;
    for (const std::string& line : lines) text += line;
    return text;
  }
  /// One more tensor in a shard of its own, `bytes` long and made of holes.
  void add_large_tensor(std::int64_t bytes) const {
    Json index = read_json(box_.root() / "model/model.safetensors.index.json");
    index["weight_map"]["model.padding"] = "padding.safetensors";
    write_atomically(box_.root() / "model/model.safetensors.index.json", index.dump());
    const std::string header = R"({"model.padding":{"dtype":"U8","shape":[)" +
                               std::to_string(bytes) + R"(],"data_offsets":[0,)" +
                               std::to_string(bytes) + "]}}";
    const std::uint64_t length = header.size();
    std::string text(reinterpret_cast<const char*>(&length), sizeof length);
    box_.write_text("model/padding.safetensors", text + header);
    fs::resize_file(box_.root() / "model/padding.safetensors",
                    text.size() + header.size() + static_cast<std::uint64_t>(bytes));
  }
  /// What lies beside the outputs for as long as work goes on.
  std::vector<std::string> hidden() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(box_.root())) {
      const std::string name = entry.path().filename();
      if (name.starts_with(".out.")) names.push_back(name);
    }
    return names;
  }
  Sandbox box_;
};

TEST_F(MergeVerbs, merges_says_what_it_did_and_verifies) {
  const Outcome merged = run(merge_to("out"));
  ASSERT_EQ(merged.code, 0) << merged.err;
  EXPECT_THAT(merged.out, StartsWith("Merged "));
  EXPECT_THAT(merged.out, HasSubstr("of the change is in the result"));
  EXPECT_THAT(merged.out, HasSubstr("out/merge_receipt.json"));
  const Outcome again = run(merge_to("out"));
  EXPECT_EQ(again.code, 0);
  EXPECT_EQ(again.out, "out holds this very merge already; nothing was done\n");
  const Outcome good = run({"merge", "--verify", "out", "--base", "model", "--adapter", "adapter"});
  EXPECT_EQ(good.code, 0) << good.out << good.err;
  EXPECT_THAT(good.out, HasSubstr("are as they were merged"));
  box_.write_text("out/config.json", "{}");
  const Outcome bad = run({"merge", "--verify", "out", "--json"});
  EXPECT_EQ(bad.code, 65);
  const Json json = Json::parse(bad.out);
  EXPECT_EQ(json["good"], false);
  EXPECT_EQ(json["problems"], Json({"config.json is not as it was written"}));
  const Outcome document =
      run({"merge", "--base", "model", "--adapter", "adapter", "--adapter", "adapter", "--weight",
           "0.5", "--weight", "0.5", "--out", "twice", "--json"});
  EXPECT_EQ(document.code, 0) << document.err;
  EXPECT_EQ(Json::parse(document.out)["folder"], "twice");
  EXPECT_GT(Json::parse(document.out)["adapted_tensors"].get<int>(), 0);
}

TEST_F(MergeVerbs, killed_at_any_moment_it_goes_on_to_the_same_bytes) {
  add_large_tensor(std::int64_t{192} << 20);  // so that there is a moment to be killed in
  ASSERT_EQ(run(merge_to("whole")).code, 0);
  const std::string program = std::string(TAILOR_BIN_DIR) + "/tailor";
  for (int attempt = 1; attempt <= 6; ++attempt) {
    const pid_t child = ::fork();
    if (child == 0) {
      const int nowhere = ::open("/dev/null", O_WRONLY);
      ::dup2(nowhere, STDOUT_FILENO);
      ::dup2(nowhere, STDERR_FILENO);
      if (::chdir(box_.root().c_str()) != 0) ::_exit(126);
      ::execl(program.c_str(), "tailor", "merge", "--base", "model", "--adapter", "adapter",
              "--out", "out", "--threads", "1", nullptr);
      ::_exit(126);
    }
    ::usleep(static_cast<useconds_t>(20'000 * attempt));
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    if (WIFEXITED(status)) break;
    EXPECT_FALSE(fs::exists(box_.root() / "out"));
  }
  const Outcome last = run(merge_to("out"));
  ASSERT_EQ(last.code, 0) << last.err;
  EXPECT_EQ(all_of("out"), all_of("whole"));
  EXPECT_FALSE(fs::exists(box_.root() / ".out.tailor-merge"));
}

TEST_F(MergeVerbs, a_disk_that_is_too_small_is_known_before_anything_is_written) {
  add_large_tensor(std::int64_t{8} << 40);
  const Outcome refused = run(merge_to("out"));
  EXPECT_EQ(refused.code, 66) << refused.err;
  EXPECT_THAT(refused.err, HasSubstr("the merged model needs 8.8"));
  EXPECT_FALSE(fs::exists(box_.root() / "out"));
  EXPECT_FALSE(fs::exists(box_.root() / ".out.tailor-merge"));
}

TEST_F(MergeVerbs, a_disk_that_is_full_after_the_weights_ends_with_74_and_goes_on) {
  SmallDisk disk(box_.root() / "disk");
  // Its folder, the begun merge's, the journal, two shards.
  if (!disk.in_memory(64 << 20, 5)) GTEST_SKIP() << "no file system can be mounted here";
  ASSERT_EQ(run(merge_to("whole")).code, 0);
  const Outcome full = run(merge_to("disk/out"));
  EXPECT_EQ(full.code, 74);
  EXPECT_EQ(full.out, "");
  EXPECT_THAT(full.err, HasSubstr("No space left on device\n"));
  EXPECT_THAT(full.err, HasSubstr("  where: disk/.out.tailor-merge/"));
  EXPECT_FALSE(fs::exists(disk / "out"));
  EXPECT_EQ(run(merge_to("disk/out")).code, 74) << "once more, still full";
  ASSERT_TRUE(disk.in_memory(64 << 20));
  const Outcome done = run(merge_to("disk/out"));
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_EQ(all_of("disk/out"), all_of("whole"));
  EXPECT_FALSE(fs::exists(disk / ".out.tailor-merge"));
  const Json run_facts = read_json(disk / "out" / "merge_receipt.json")["run"];
  EXPECT_EQ(run_facts["jobs_of_earlier_attempts"], run_facts["jobs"]) << "no weight again";
}

TEST_F(MergeVerbs, what_an_attempt_from_another_store_decoded_is_not_used) {
  for (const char* format : {"int4", "fp8"}) {
    ASSERT_EQ(run({"model", "pack", "model", "--to", format, "--format", format}).code, 0);
  }
  const auto merge = [&](const char* base, const char* to, const char* max_ram) {
    return run({"merge", "--base", base, "--adapter", "adapter", "--out", to, "--onto", "trained",
                "--dtype", "bfloat16", "--max-ram", max_ram});
  };
  EXPECT_EQ(merge("int4", "out", "1MB").code, 66);  // after it was decoded
  ASSERT_EQ(hidden().size(), 1U);
  const Outcome merged = merge("fp8", "out", "1GiB");
  ASSERT_EQ(merged.code, 0) << merged.err;
  EXPECT_THAT(hidden(), IsEmpty());
  ASSERT_EQ(merge("fp8", "whole", "1GiB").code, 0);
  EXPECT_EQ(all_of("out"), all_of("whole"));
}

TEST_F(MergeVerbs, an_adapter_of_a_quantised_base_goes_onto_its_store) {
  box_.write_text("adapter/base_record.json", R"({"experts": "int4", "others": "as_is"})");
  ASSERT_EQ(run({"model", "pack", "model", "--to", "store", "--format", "int4"}).code, 0);
  const Outcome asked = run(merge_to("out"));
  EXPECT_EQ(asked.code, 2);
  EXPECT_THAT(asked.err, HasSubstr("--onto original"));
  EXPECT_EQ(run({"merge", "--base", "store", "--adapter", "adapter", "--out", "out"}).code, 2);
  const Outcome trained = run({"merge", "--base", "store", "--adapter", "adapter", "--out", "out",
                               "--onto", "trained", "--dtype", "bfloat16"});
  ASSERT_EQ(trained.code, 0) << trained.err;
  EXPECT_THAT(hidden(), IsEmpty());
  // The same as decoding the store by hand and merging onto that.
  ASSERT_EQ(run({"model", "export", "store", "--to", "decoded", "--dtype", "bfloat16"}).code, 0);
  ASSERT_EQ(run({"merge", "--base", "decoded", "--adapter", "adapter", "--out", "by-hand", "--onto",
                 "trained", "--dtype", "bfloat16"})
                .code,
            0);
  EXPECT_EQ(read_json(box_.root() / "out/merge_receipt.json")["output"],
            read_json(box_.root() / "by-hand/merge_receipt.json")["output"]);
  const Outcome int4 = run(
      {"merge", "--base", "store", "--adapter", "adapter", "--out", "int4", "--onto", "trained"});
  EXPECT_EQ(int4.code, 0) << int4.err;
  EXPECT_TRUE(read_json(box_.root() / "int4/config.json").contains("quantization_config"));
}

TEST_F(MergeVerbs, refusals_name_what_and_how_to_mend) {
  const auto refusal = [&](const std::vector<std::string>& arguments) {
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.out, "");
    return std::to_string(outcome.code) + " " + outcome.err;
  };
  EXPECT_THAT(refusal({"merge"}), StartsWith("2 error: no base is given"));
  EXPECT_THAT(refusal({"merge", "--base", "model"}), StartsWith("2 error: no adapter is given"));
  EXPECT_THAT(refusal({"merge", "--base", "model", "--adapter", "adapter"}),
              StartsWith("2 error: no output is given"));
  EXPECT_THAT(refusal({"merge", "--base", "model", "--adaptor", "x"}), HasSubstr("--adapter"));
  EXPECT_THAT(refusal({"merge", "--base", "model", "--adapter", "adapter", "--out", "o", "--weight",
                       "1", "--weight", "2"}),
              StartsWith("2 error: 2 weights are given for 1 adapters"));
  EXPECT_THAT(refusal({"merge", "--base", "model", "--adapter", "adapter", "--out", "o", "--dtype",
                       "bf16"}),
              HasSubstr("bfloat16"));
  EXPECT_THAT(refusal({"merge", "--base", "model", "--adapter", "nowhere", "--out", "o"}),
              StartsWith("65 error: adapter_config.json is missing"));
  EXPECT_THAT(refusal({"merge", "--base", "model", "--adapter", "adapter", "--out", "model"}),
              StartsWith("2 error: the merged model would be written over the base"));
  EXPECT_THAT(refusal({"merge", "--verify", "model"}),
              StartsWith("65 error: there is no merge_receipt.json"));
  EXPECT_THAT(refusal({"merge", "--base", "model", "--adapter", "adapter", "--out", "o",
                       "--max-ram", "10MB"}),
              StartsWith("66 error: --max-ram of 10"));
}

}  // namespace
}  // namespace tailor
