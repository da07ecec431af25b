// `tailor adapter`: what it says, what it refuses, and with which exit code.

#include <gmock/gmock.h>

#include <cstring>

#include "tests/support/small_disk.h"
#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

using testing::HasSubstr;

const std::string kGolden = std::string(TAILOR_SOURCE_DIR) + "/tests/golden/";
const std::string kAdapter = kGolden + "llama4_maverick_tiny/lora/adapter_final";
const std::string kModel = kGolden + "llama4_maverick_tiny/model";

/// A copy of the adapter in the sandbox, to be damaged.
void copy_adapter(const Sandbox& box, const std::string& name = "adapter") {
  fs::copy(kAdapter, box.root() / name, fs::copy_options::recursive);
}
void change_config(const Sandbox& box, const std::string& key, const Json& value) {
  const fs::path path = box.root() / "adapter/adapter_config.json";
  Json config = read_json(path);
  config[key] = value;
  write_atomically(path, config.dump());
}

TEST(AdapterInspect, shows_targets_norms_and_a_picture) {
  const Sandbox box;
  const Outcome outcome = run_tailor(box, {"adapter", "inspect", kAdapter});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("rank, alpha  4, 8\n"));
  EXPECT_THAT(outcome.out, HasSubstr("layout       PEFT 0.21.2\n"));
  EXPECT_THAT(outcome.out,
              HasSubstr("feed_forward.experts.gate_up_proj          2     4      2      10,240  16 "
                        "of 16    4.46  layer 1: 3.24\n"));
  EXPECT_THAT(outcome.out, HasSubstr("feed_forward.experts.gate_up_proj     ·█·█\n"));
  EXPECT_EQ(outcome.err, "");
}

TEST(AdapterInspect, json_has_everything) {
  const Sandbox box;
  const Outcome outcome =
      run_tailor(box, {"adapter", "inspect", kAdapter, "--base", kModel, "--against",
                       kGolden + "llama4_maverick_tiny/lora/adapter_init", "--json"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json json = parse_json(outcome.out, "stdout");
  EXPECT_EQ(json.at("parameters"), 31104);
  EXPECT_EQ(json.at("rank"), 4);
  EXPECT_EQ(json.at("rslora"), false);
  EXPECT_EQ(json.at("dtypes"), Json::array({"F32"}));
  EXPECT_EQ(json.at("base_fingerprint"), nullptr);
  EXPECT_EQ(json.at("targets").size(), 12U);
  EXPECT_EQ(json.at("modules").size(), 32U);
  EXPECT_EQ(json.at("modules").at(0).at("layer"), 0);
  EXPECT_EQ(json.at("fit").at("fits"), true);
  EXPECT_EQ(json.at("fit").at("trained_on_it"), nullptr);
  EXPECT_EQ(json.at("against").at("modules").size(), 32U);
  EXPECT_NEAR(json.at("against").at("cosine").get<double>(), 0.5954, 1e-4);
}

TEST(AdapterInspect, a_base_that_does_not_fit_ends_with_65_and_says_why) {
  const Sandbox box;
  const Outcome outcome =
      run_tailor(box, {"adapter", "inspect", kAdapter, "--base", kGolden + "qwen2_tiny/model"});
  EXPECT_EQ(outcome.code, 65);
  EXPECT_THAT(outcome.out, HasSubstr("fits         SRC/tests/golden/qwen2_tiny/model: no, "));
  EXPECT_EQ(outcome.err,
            "error: the adapter does not fit SRC/tests/golden/qwen2_tiny/model: factors of "
            "'model.layers.0.feed_forward.down_proj' belong to no matrix of this model\n"
            "  where: SRC/tests/golden/llama4_maverick_tiny/lora/adapter_final\n"
            "  mend:  This adapter belongs to another base model, or adapts something Tailor does "
            "not train.\n");
}

TEST(AdapterInspect, weights_of_another_base_are_told_by_the_fingerprint) {
  const Sandbox box;
  copy_adapter(box);
  // A recorded fingerprint: PEFT's tensors with one more line of metadata.
  const fs::path file = box.root() / "adapter/adapter_model.safetensors";
  const std::string text = read_text(file);
  std::uint64_t length = 0;
  std::memcpy(&length, text.data(), sizeof length);
  Json header = parse_json(text.substr(sizeof length, length), "header");
  header["__metadata__"] = {{"format", "pt"}, {"base_fingerprint", "of something else"}};
  const std::string changed = header.dump();
  const std::uint64_t size = changed.size();
  write_atomically(file, std::string(reinterpret_cast<const char*>(&size), sizeof size) + changed +
                             text.substr(sizeof length + length));
  const auto fit = [&] {
    const Outcome outcome =
        run_tailor(box, {"adapter", "inspect", "adapter", "--base", kModel, "--json"});
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return parse_json(outcome.out, "stdout").at("fit");
  };
  EXPECT_EQ(fit().at("fits"), true);
  EXPECT_EQ(fit().at("trained_on_it"), false);
}

TEST(AdapterInspect, a_model_that_is_not_here_is_not_needed) {
  const Sandbox box;
  copy_adapter(box);
  change_config(box, "base_model_name_or_path", "nobody/nothing");
  const Outcome outcome =
      run_tailor(box, {"adapter", "inspect", "adapter", "--against", kAdapter, "--json"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json json = parse_json(outcome.out, "stdout");
  EXPECT_EQ(json.at("base_model"), "nobody/nothing");
  EXPECT_EQ(json.at("against").at("relative_difference"), 0);
  EXPECT_EQ(json.at("fit"), nullptr);
}

TEST(AdapterInspect, refuses_what_is_no_adapter) {
  const Sandbox box;
  EXPECT_EQ(run_tailor(box, {"adapter", "inspect", "nowhere"}).err,
            "error: adapter_config.json is missing\n"
            "  where: nowhere\n"
            "  mend:  Name an adapter folder: adapter_config.json beside "
            "adapter_model.safetensors.\n");
  copy_adapter(box);
  change_config(box, "use_dora", true);
  const Outcome outcome = run_tailor(box, {"adapter", "inspect", "adapter"});
  EXPECT_EQ(outcome.code, 65);
  EXPECT_EQ(outcome.out, "");
  EXPECT_THAT(outcome.err, HasSubstr("use_dora is true, which Tailor does not implement"));
  EXPECT_EQ(run_tailor(box, {"adapter", "inspect", kAdapter, "--base", "nobody/nothing"}).code, 2);
}

TEST(AdapterExport, writes_what_the_server_takes_and_says_how_to_serve_it) {
  const Sandbox box;
  const std::string adapter = kGolden + "qwen2_tiny/lora/adapter_final",
                    model = kGolden + "qwen2_tiny/model";
  const Outcome outcome = run_tailor(box, {"adapter", "export", adapter, "--for", "sglang", "--to",
                                           "out", "--base", model, "--json"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json json = parse_json(outcome.out, "stdout");
  EXPECT_EQ(json.at("for"), "sglang");
  EXPECT_EQ(json.at("layout"), nullptr);
  EXPECT_THAT(json.at("command").get<std::string>(), HasSubstr("--lora-paths tailored=out"));
  EXPECT_EQ(read_json(box.root() / "out/adapter_config.json").at("use_rslora"), false);
  EXPECT_THAT(json.at("notes").dump(), HasSubstr("rsLoRA's scale, alpha / sqrt(rank)"));
  // What was made fits, and is the same change.
  const Outcome same = run_tailor(
      box, {"adapter", "inspect", "out", "--base", model, "--against", adapter, "--json"});
  ASSERT_EQ(same.code, 0) << same.err;
  const Json against = parse_json(same.out, "stdout").at("against");
  for (const Json& module : against.at("modules"))
    EXPECT_LT(module.at("relative_difference").get<double>(), 1e-6);
  EXPECT_TRUE(against.at("only_there").empty());
  // A second time the folder is there.
  const std::string before = read_text(box.root() / "out/adapter_config.json");
  const Outcome again = run_tailor(
      box, {"adapter", "export", adapter, "--for", "vllm", "--to", "out", "--base", model});
  EXPECT_EQ(again.code, 2);
  EXPECT_EQ(again.err,
            "error: the folder is there already\n"
            "  where: out\n"
            "  mend:  Name a new folder with --to; nothing was changed.\n");
  EXPECT_EQ(read_text(box.root() / "out/adapter_config.json"), before);
}

TEST(AdapterExport, refuses_word_for_word) {
  const Sandbox box;
  const auto outcome = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"adapter", "export", kAdapter, "--to", "out"});
    const Outcome done = run_tailor(box, more);
    EXPECT_EQ(done.out, "");
    EXPECT_FALSE(fs::exists(box.root() / "out"));
    return done;
  };
  const Outcome experts = outcome({"--for", "vllm", "--base", kModel});
  EXPECT_EQ(experts.code, 65);
  EXPECT_THAT(experts.err, HasSubstr("vLLM applies LoRA of Llama 4's routed experts wrongly"));
  const Outcome misspelt = outcome({"--for", "vlm", "--base", kModel});
  EXPECT_EQ(misspelt.code, 2);
  EXPECT_EQ(misspelt.err,
            "error: 'vlm' is no value of --for\n"
            "  where: --for\n"
            "  mend:  Did you mean vllm? Use vllm, sglang, peft, or peft@VERSION.\n");
  const Outcome no_base = outcome({"--for", "peft"});
  EXPECT_EQ(no_base.code, 2);
  EXPECT_THAT(no_base.err, HasSubstr("the adapter's base model '../../model' is not here"));
  EXPECT_EQ(outcome({"--for", "peft", "--base", kGolden + "llama_tiny/model"}).code, 65);
  EXPECT_EQ(outcome({"--for", "sglang", "--uniform-rank", "--base", kModel}).code, 2);
  EXPECT_EQ(outcome({"--base", kModel}).code, 2);
  // A disk that cannot be written, and one that is full.
  const Outcome nowhere = run_tailor(box, {"adapter", "export", kAdapter, "--for", "peft", "--base",
                                           kModel, "--to", "/proc/nowhere/out"});
  EXPECT_EQ(nowhere.code, 74);
}

TEST(AdapterExport, a_disk_that_is_full_half_way_ends_with_74_and_leaves_nothing) {
  const Sandbox box;
  SmallDisk disk(box.root() / "disk");
  // Its folder, the begun export's, the weights: no place for the config.
  if (!disk.in_memory(8 << 20, 3)) GTEST_SKIP() << "no file system can be mounted here";
  const auto export_to = [&](const std::string& to) {
    return run_tailor(
        box, {"adapter", "export", kAdapter, "--for", "peft", "--base", kModel, "--to", to});
  };
  const Outcome full = export_to("disk/out");
  EXPECT_EQ(full.code, 74);
  EXPECT_EQ(full.out, "");
  EXPECT_THAT(full.err, HasSubstr("No space left on device"));
  EXPECT_TRUE(fs::is_empty(disk.path()));
  ASSERT_TRUE(disk.in_memory(64 << 10));
  EXPECT_EQ(export_to("disk/out").code, 66) << "too small for the weights: known before";
  EXPECT_TRUE(fs::is_empty(disk.path()));
  ASSERT_TRUE(disk.in_memory(8 << 20));
  ASSERT_EQ(export_to("disk/out").code, 0);
  ASSERT_EQ(export_to("whole").code, 0);
  for (const char* name : {"adapter_model.safetensors", "adapter_config.json"}) {
    EXPECT_EQ(read_text(disk / "out" / name), read_text(box.root() / "whole" / name)) << name;
  }
}

TEST(AdapterExport, a_config_alone_is_base_enough) {
  const Sandbox box;
  const Outcome outcome = run_tailor(box, {"adapter", "export", kAdapter, "--for", "peft@0.18.1",
                                           "--base", kModel + "/config.json", "--to", "out"});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("experts straight"));
  EXPECT_EQ(read_json(box.root() / "out/adapter_config.json").at("peft_version"), "0.18.1");
}

}  // namespace
}  // namespace tailor::testing_support
