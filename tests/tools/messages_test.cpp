// Wording is behaviour: bad input meets exactly these texts and exit codes. Each case is a file
// tests/tools/messages/NAME.txt: the command line's outcome as "exit CODE" and the text on stderr.
// TAILOR_WRITE_MESSAGES=1 writes missing and changed ones, to be read before they are committed.

#include <gtest/gtest.h>

#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

const fs::path kMessages = fs::path(TAILOR_SOURCE_DIR) / "tests/tools/messages";

void expect_message(const std::string& name, const Outcome& outcome) {
  const std::string found = "exit " + std::to_string(outcome.code) + "\n" + outcome.err;
  const fs::path expected = kMessages / (name + ".txt");
  if (std::getenv("TAILOR_WRITE_MESSAGES") != nullptr) write_atomically(expected, found);
  ASSERT_TRUE(fs::exists(expected)) << "missing " << expected << "; the message now:\n" << found;
  EXPECT_EQ(found, read_text(expected));
  EXPECT_EQ(outcome.out, "") << "nothing belongs on stdout";
}

/// A recipe on the golden Maverick with tokenised rows in rows.jsonl.
std::string recipe_text(const std::string& more = "") {
  return "base_model: model\noutput_dir: run\ndata:\n  train: [rows.jsonl]\n  format: tokenized\n"
         "  sequence_len: 8\n" +
         more;
}

struct CommandLineCase {
  const char* name;
  std::vector<std::string> arguments;
};

class CommandLine : public testing::TestWithParam<CommandLineCase> {};
TEST_P(CommandLine, is_refused_word_for_word) {
  const Sandbox box;
  expect_message(GetParam().name, run_tailor(box, GetParam().arguments));
}
INSTANTIATE_TEST_SUITE_P(
    Case, CommandLine,
    testing::Values(
        CommandLineCase{"no_verb", {}}, CommandLineCase{"verb_misspelt", {"plna", "x.yaml"}},
        CommandLineCase{"verb_unknown", {"fly"}},
        CommandLineCase{"second_verb_misspelt", {"recipe", "lss"}},
        CommandLineCase{"second_verb_missing", {"data"}},
        CommandLineCase{"flag_misspelt", {"plan", "demo-maverick", "--explian"}},
        CommandLineCase{"flag_unknown", {"runs", "ls", "--zzz"}},
        CommandLineCase{"recipe_key_as_flag", {"plan", "demo-maverick", "--lora.rank=3"}},
        CommandLineCase{"argument_missing", {"plan"}},
        CommandLineCase{"argument_too_many", {"model", "inspect", "a", "b"}},
        CommandLineCase{"flag_needs_value", {"eval", "--model"}},
        CommandLineCase{"flag_required", {"eval", "--model", "m"}},
        CommandLineCase{"flag_value_no_choice",
                        {"eval", "--model", "m", "--data", "d", "--dtype", "fp32"}},
        CommandLineCase{"flag_value_no_number",
                        {"eval", "--model", "m", "--data", "d", "--limit", "many"}},
        CommandLineCase{"flag_value_negative",
                        {"eval", "--model", "m", "--data", "d", "--limit", "-3"}},
        CommandLineCase{"scan_rule_misspelt",
                        {"experts", "scan", "--model", "m", "--data", "d", "--topp", "0.5"}},
        CommandLineCase{"scan_no_score",
                        {"experts", "scan", "--model", "m", "--data", "d", "--by", "weight"}},
        CommandLineCase{"scan_no_experts",
                        {"experts", "scan", "--model", "m", "--data", "d", "--count", "0"}},
        CommandLineCase{"pack_no_model", {"model", "pack", "--to", "store"}},
        CommandLineCase{"pack_model_and_follow",
                        {"model", "pack", "m", "--follow", "m", "--to", "store"}},
        CommandLineCase{"pack_delete_without_follow",
                        {"model", "pack", "m", "--to", "store", "--delete-source"}},
        CommandLineCase{
            "pack_group_without_int4",
            {"model", "pack", "m", "--to", "store", "--format", "nf4", "--group", "64"}},
        CommandLineCase{"pack_no_size",
                        {"model", "pack", "m", "--to", "store", "--max-ram", "plenty"}},
        CommandLineCase{"pack_format_misspelt",
                        {"model", "pack", "m", "--to", "store", "--format", "int5"}},
        CommandLineCase{"pack_flag_misspelt",
                        {"model", "pack", "m", "--to", "store", "--non-expert-fromat", "nf4"}},
        CommandLineCase{"pack_to_nowhere", {"model", "pack", "m"}},
        CommandLineCase{"verify_no_store", {"model", "verify", "nowhere"}},
        CommandLineCase{"verify_flag_misspelt", {"model", "verify", "s", "--agianst", "m"}},
        CommandLineCase{"recipe_name_misspelt", {"plan", "demo-maverik"}},
        CommandLineCase{"plan_machine_misspelt", {"plan", "maverick-a100", "--on", "a100-40bg"}},
        CommandLineCase{"plan_machine_unclear", {"plan", "maverick-a100", "--on", "4xh100,a100"}},
        CommandLineCase{"plan_machine_empty", {"plan", "maverick-a100", "--on", "4xh100,"}},
        CommandLineCase{"plan_probe_elsewhere", {"plan", "maverick-a100", "--probe"}},
        CommandLineCase{"plan_probe_on", {"plan", "maverick-a100", "--probe", "--on", "auto"}},
        CommandLineCase{"plan_probe_no_recipe", {"plan", "demo-maverik", "--probe"}},
        CommandLineCase{"plan_second_recipe", {"plan", "maverick-a100", "r1-4xh10"}},
        CommandLineCase{"no_runs", {"runs", "report"}},
        CommandLineCase{"no_such_run", {"runs", "show", "nothing"}},
        CommandLineCase{"no_such_ledger", {"runs", "ls", "--ledger", "nowhere.db"}},
        CommandLineCase{"no_such_sku", {"prices", "ls", "--sku", "a100-40gb-pci"}},
        CommandLineCase{"no_such_folder_of_tokenizer",
                        {"data", "tokenize", "--tokenizer", "nowhere", "--data", "x.jsonl"}}),
    [](const auto& entry) { return std::string(entry.param.name); });

struct RecipeCase {
  const char* name;
  const char* text;
};
class RecipeMessage : public testing::TestWithParam<RecipeCase> {};
TEST_P(RecipeMessage, is_word_for_word) {
  const Sandbox box;
  box.write_text("r.yaml", GetParam().text);
  expect_message(GetParam().name, run_tailor(box, {"recipe", "validate", "r.yaml"}));
}
INSTANTIATE_TEST_SUITE_P(
    Case, RecipeMessage,
    testing::Values(
        RecipeCase{"recipe_key_misspelt",
                   "base_model: m\noutput_dir: o\ndata: {train: [a.jsonl]}\nlora:\n  rnak: 4\n"},
        RecipeCase{"recipe_wrong_type",
                   "base_model: m\noutput_dir: o\ndata: {train: [a.jsonl]}\nlora:\n  rank: many\n"},
        RecipeCase{"recipe_negative_rank",
                   "base_model: m\noutput_dir: o\ndata: {train: [a.jsonl]}\nlora:\n  rank: -4\n"}),
    [](const auto& entry) { return std::string(entry.param.name); });

TEST(RecipeMessage, target_that_matches_nothing) {
  const Sandbox box;
  box.copy_model("llama_tiny", "model");
  box.write_text("r.yaml", recipe_text("lora:\n  targets: [attention, experts]\n"));
  expect_message("target_matches_nothing", run_tailor(box, {"recipe", "validate", "r.yaml"}));
}

TEST(ModelMessage, no_such_model) {
  const Sandbox box;
  expect_message("no_such_model", run_tailor(box, {"model", "inspect", "someone/some-model"}));
  box.write_text("r.yaml", recipe_text());
  expect_message("no_such_model_folder", run_tailor(box, {"plan", "r.yaml"}));
}

TEST(ModelMessage, no_demo_model_yet) {
  const Sandbox box;
  expect_message("no_demo_model", run_tailor(box, {"plan", "demo-maverick"}));
}

TEST(ModelMessage, missing_shard) {
  const Sandbox box;
  box.copy_model("llama4_maverick_tiny", "model");
  fs::remove(box.root() / "model/model-00002-of-00002.safetensors");
  expect_message("missing_shard", run_tailor(box, {"model", "inspect", "model"}));
}

TEST(ModelMessage, truncated_safetensors) {
  const Sandbox box;
  box.copy_model("llama4_maverick_tiny", "model");
  const fs::path shard = box.root() / "model/model-00001-of-00002.safetensors";
  fs::resize_file(shard, fs::file_size(shard) - 1000);
  expect_message("truncated_safetensors", run_tailor(box, {"model", "inspect", "model"}));
  fs::resize_file(shard, 100);
  expect_message("truncated_safetensors_header", run_tailor(box, {"model", "inspect", "model"}));
  fs::resize_file(shard, 0);
  expect_message("empty_safetensors", run_tailor(box, {"model", "inspect", "model"}));
}

void change_config(const Sandbox& box, const std::string& key, const Json& value) {
  Json config = read_json(box.root() / "model/config.json");
  config[key] = value;
  box.write_text("model/config.json", config.dump(1));
}

TEST(ModelMessage, shape_mismatch) {
  const Sandbox box;
  box.copy_model("llama4_maverick_tiny", "model");
  change_config(box, "num_local_experts", 16);
  expect_message("shape_mismatch_several", run_tailor(box, {"model", "inspect", "model"}));
  change_config(box, "num_local_experts", 8);
  change_config(box, "tie_word_embeddings", true);
  EXPECT_EQ(run_tailor(box, {"model", "inspect", "model"}).code, 0);
}

TEST(ModelMessage, one_tensor_of_another_shape) {
  const Sandbox box;
  box.copy_model("llama_tiny", "model");
  change_config(box, "vocab_size", 300);
  expect_message("shape_mismatch", run_tailor(box, {"model", "inspect", "model"}));
}

TEST(ModelMessage, missing_tensors) {
  const Sandbox box;
  box.copy_model("llama_tiny", "model");
  const auto layers = read_json(box.root() / "model/config.json")["num_hidden_layers"].get<int>();
  change_config(box, "num_hidden_layers", layers + 1);
  expect_message("missing_tensors", run_tailor(box, {"model", "inspect", "model"}));
}

TEST(ModelMessage, unknown_architecture) {
  const Sandbox box;
  box.copy_model("llama_tiny", "model");
  change_config(box, "model_type", "mamba");
  change_config(box, "architectures", Json::array({"MambaForCausalLM"}));
  expect_message("unknown_architecture", run_tailor(box, {"model", "inspect", "model"}));
}

TEST(ModelMessage, no_config) {
  const Sandbox box;
  make_folders(box.root() / "model");
  expect_message("no_config", run_tailor(box, {"model", "inspect", "model"}));
}

class SelectionMessage : public testing::Test {
 protected:
  void SetUp() override {
    box_.copy_model("llama4_maverick_tiny", "model");
    box_.write_text("r.yaml", recipe_text("lora:\n  experts: chosen.yaml\n"));
  }
  /// What the plan says of a selection that is good but for `from`.
  Outcome plan(const std::string& from, const std::string& to) {
    std::string text =
        "format: 1\nmodel:\n  name: tiny\n  family: llama4\n  layers: 4\n  hidden: 64\n"
        "  experts: 8\n  experts_per_token: 1\n  expert_width: 48\nscan:\n  data: [rows.jsonl]\n"
        "  counted: all\n  tokens: 100\nchoice:\n  by: gate\n  rule: top_p\n  value: 0.5\n"
        "  expert_rank: 8\n  bytes: 26112\nlayers:\n"
        "  - {layer: 1, tokens_covered: 0.5, gate_covered: 0.5, experts: [0-1, 5]}\n"
        "  - {layer: 3, tokens_covered: 0, gate_covered: 0, experts: []}\n";
    const std::size_t at = text.find(from);
    if (at == std::string::npos) throw std::runtime_error(from);
    box_.write_text("chosen.yaml", text.replace(at, from.size(), to));
    return run_tailor(box_, {"plan", "r.yaml", "training.max_steps=3", "--json"});
  }
  Sandbox box_;
};

TEST_F(SelectionMessage, a_good_one_is_taken) {
  const Outcome done = plan("[]", "[]");
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_NE(done.out.find("in 3 of 16 routed experts"), std::string::npos) << done.out;
}
TEST_F(SelectionMessage, missing) {
  expect_message("selection_missing", run_tailor(box_, {"plan", "r.yaml"}));
}
TEST_F(SelectionMessage, of_another_model) {
  expect_message("selection_of_another_model", plan("experts: 8", "experts: 16"));
  expect_message("selection_of_other_layers", plan("layer: 3", "layer: 2"));
}
TEST_F(SelectionMessage, wrong_keys_and_experts) {
  expect_message("selection_unknown_key", plan("rule: top_p", "rulle: top_p"));
  expect_message("selection_expert_out_of_range", plan("[0-1, 5]", "[0-1, 8]"));
  expect_message("selection_expert_twice", plan("[0-1, 5]", "[0-1, 1]"));
  expect_message("selection_of_nothing", plan("[0-1, 5]", "[]"));
}

class DataMessage : public testing::Test {
 protected:
  void SetUp() override {
    box_.copy_model("llama4_maverick_tiny", "model");
    box_.write_text("r.yaml", recipe_text());
  }
  Outcome prepare(const std::string& rows, std::vector<std::string> overrides = {}) {
    box_.write_text("rows.jsonl", rows);
    std::vector<std::string> arguments = {"data", "prepare", "r.yaml"};
    arguments.insert(arguments.end(), overrides.begin(), overrides.end());
    return run_tailor(box_, arguments);
  }
  Sandbox box_;
};

TEST_F(DataMessage, no_file) {
  expect_message("data_missing", run_tailor(box_, {"data", "prepare", "r.yaml"}));
}
TEST_F(DataMessage, empty) { expect_message("data_empty", prepare("")); }
TEST_F(DataMessage, all_masked) {
  expect_message("data_all_masked",
                 prepare("{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, -100]}\n"));
}
TEST_F(DataMessage, row_too_long) {
  expect_message(
      "data_row_too_long",
      prepare("{\"input_ids\": [1, 2, 3], \"labels\": [1, 2, 3]}\n"
              "{\"input_ids\": [1, 2, 3, 4, 5, 6, 7, 8, 9], \"labels\": [1, 2, 3, 4, 5, 6, 7, 8, "
              "9]}\n",
              {"data.too_long=error"}));
}
TEST_F(DataMessage, wrong_vocabulary) {
  expect_message("data_wrong_vocabulary",
                 prepare("{\"input_ids\": [1, 300, 3], \"labels\": [1, 300, 3]}\n"));
}
TEST_F(DataMessage, no_json) { expect_message("data_no_json", prepare("hello\n")); }
TEST_F(DataMessage, no_tokenizer) {
  expect_message("data_no_tokenizer",
                 prepare("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": "
                         "\"assistant\", \"content\": \"b\"}]}\n",
                         {"data.format=messages"}));
}
TEST_F(DataMessage, tokenizer_of_another_model) {
  const fs::path golden = fs::path(TAILOR_SOURCE_DIR) / "tests/golden/tokenizer";
  fs::copy(golden / "tokenizer.json", box_.root() / "model/tokenizer.json");
  expect_message("tokenizer_of_another_model",
                 prepare("{\"input_ids\": [1, 2, 3], \"labels\": [1, 2, 3]}\n"));
}

class StoreMessage : public testing::Test {
 protected:
  void SetUp() override { box_.copy_model("llama4_maverick_tiny", "model"); }
  Outcome pack(std::vector<std::string> more = {}) {
    std::vector<std::string> arguments = {"model", "pack", "model", "--to", "store"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_tailor(box_, arguments);
  }
  Outcome verify(std::vector<std::string> more = {}) {
    std::vector<std::string> arguments = {"model", "verify", "store"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_tailor(box_, arguments);
  }
  void change_byte(const std::string& name, std::size_t at, char value) {
    std::string bytes = read_text(box_.root() / name);
    bytes[at] = value;
    box_.write_text(name, bytes);
  }
  Sandbox box_;
};

TEST_F(StoreMessage, too_little_memory) {
  expect_message("pack_memory", pack({"--max-ram", "10MB"}));
}
TEST_F(StoreMessage, folder_of_something_else) {
  box_.write_text("store/photo.jpg", "x");
  expect_message("pack_foreign_folder", pack());
}
TEST_F(StoreMessage, other_formats) {
  ASSERT_EQ(pack().code, 0);
  expect_message("pack_other_formats", pack({"--format", "nf4"}));
}
TEST_F(StoreMessage, of_a_store_made_a_model) {
  ASSERT_EQ(pack().code, 0);
  expect_message("pack_of_a_store", run_tailor(box_, {"model", "pack", "store", "--to", "other"}));
}
TEST_F(StoreMessage, weight_that_is_no_number) {
  const std::string shard = "model/model-00001-of-00002.safetensors";
  const std::size_t last = fs::file_size(box_.root() / shard) - 1;
  change_byte(shard, last, '\x7f');
  change_byte(shard, last - 1, '\xff');
  expect_message("pack_no_number", pack({"--threads", "1"}));
}
TEST_F(StoreMessage, missing_shard_of_a_model) {
  fs::remove(box_.root() / "model/model-00002-of-00002.safetensors");
  expect_message("pack_missing_shard", pack());
}
TEST_F(StoreMessage, store_that_is_not_finished) {
  box_.write_text("store/pack.journal", "");
  expect_message("verify_unfinished", verify());
}
TEST_F(StoreMessage, store_with_a_changed_manifest) {
  ASSERT_EQ(pack().code, 0);
  const std::string manifest = read_text(box_.root() / "store/store.json");
  change_byte("store/store.json", manifest.find("\"units\":[[") + 10, '2');
  expect_message("verify_manifest", verify());
}
TEST_F(StoreMessage, store_with_a_cut_off_file) {
  ASSERT_EQ(pack().code, 0);
  fs::resize_file(box_.root() / "store/layers/00001.tiles", 5000);
  expect_message("verify_cut_off", verify());
}
TEST_F(StoreMessage, store_of_another_model) {
  ASSERT_EQ(pack().code, 0);
  box_.copy_model("llama4_scout_tiny", "other");
  expect_message("verify_against_another", verify({"--against", "other"}));
}

TEST(OutputMessage, folder_that_is_a_file) {
  const Sandbox box;
  box.write_text("file", "x");
  expect_message("output_below_a_file",
                 run_tailor(box, {"recipe", "cp", "demo-maverick", "file/mine.yaml"}));
}

TEST(OutputMessage, recipe_is_not_overwritten) {
  const Sandbox box;
  box.write_text("mine.yaml", "x");
  expect_message("output_is_there",
                 run_tailor(box, {"recipe", "cp", "demo-maverick", "mine.yaml"}));
}

TEST(OutputMessage, read_only_folder) {
  const Sandbox box;
  make_folders(box.root() / "locked");
  fs::permissions(box.root() / "locked", fs::perms::owner_read | fs::perms::owner_exec |
                                             fs::perms::others_read | fs::perms::others_exec);
  fs::permissions(box.root(), fs::perms::all);
  const Outcome outcome = run_tailor(box, {"runs", "export", "--output", "locked/runs.csv"},
                                     {.as_nobody = ::geteuid() == 0, .out = ""});
  if (outcome.code == 126) GTEST_SKIP() << "the program lies where other users cannot reach it";
  expect_message("output_read_only", outcome);
}

TEST(OutputMessage, full_disk) {
  const Sandbox box;
  expect_message("output_full",
                 run_tailor(box, {"recipe", "show", "demo-maverick"}, {.out = "/dev/full"}));
}

}  // namespace
}  // namespace tailor::testing_support
