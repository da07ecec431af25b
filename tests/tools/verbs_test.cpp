// What the verbs do and print when all is well.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>

#include "base/text.h"
#include "data/runs/ledger.h"
#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

const std::vector<std::vector<std::string>> kVerbs = {{"recipe", "ls"},
                                                      {"recipe", "show"},
                                                      {"recipe", "cp"},
                                                      {"recipe", "validate"},
                                                      {"plan"},
                                                      {"train"},
                                                      {"eval"},
                                                      {"generate"},
                                                      {"data", "prepare"},
                                                      {"data", "inspect"},
                                                      {"data", "tokenize"},
                                                      {"model", "inspect"},
                                                      {"model", "pack"},
                                                      {"model", "verify"},
                                                      {"runs", "ls"},
                                                      {"runs", "show"},
                                                      {"runs", "report"},
                                                      {"runs", "export"},
                                                      {"prices", "ls"},
                                                      {"prices", "check"},
                                                      {"doctor"},
                                                      {"calibrate"}};

TEST(Help, every_verb_has_one_that_ends_with_an_example) {
  const Sandbox box;
  for (std::vector<std::string> arguments : kVerbs) {
    const std::string command = "tailor " + join(arguments, " ");
    arguments.push_back("--help");
    const Outcome outcome = run_tailor(box, arguments);
    EXPECT_EQ(outcome.code, 0) << command;
    EXPECT_EQ(outcome.err, "") << command;
    const auto example = outcome.out.rfind("Example:\n  ");
    ASSERT_NE(example, std::string::npos) << command;
    EXPECT_THAT(outcome.out.substr(example + 11), StartsWith(command));
    EXPECT_THAT(outcome.out, HasSubstr("\nUsage: " + command)) << command;
    EXPECT_THAT(outcome.out, HasSubstr("--json")) << command;
  }
}

TEST(Help, names_every_verb) {
  const Sandbox box;
  const Outcome outcome = run_tailor(box, {"--help"});
  EXPECT_EQ(outcome.code, 0);
  for (const auto& verb : kVerbs) EXPECT_THAT(outcome.out, HasSubstr("\n  " + verb.front()));
}

TEST(Help, and_docs_cli_md_name_the_same_flags) {
  const Sandbox box;
  const std::string docs = read_text(fs::path(TAILOR_SOURCE_DIR) / "docs/cli.md");
  for (std::vector<std::string> arguments : kVerbs) {
    EXPECT_THAT(docs, HasSubstr("`" + join(arguments, " "))) << "docs/cli.md";
    arguments.push_back("--help");
    std::istringstream help(run_tailor(box, arguments).out);
    for (std::string line; std::getline(help, line);) {
      if (!line.starts_with("  --")) continue;
      const std::string flag = line.substr(2, line.find(' ', 2) - 2);
      EXPECT_THAT(docs, HasSubstr(flag)) << join(arguments, " ");
    }
  }
}

TEST(Speed, help_and_plan_start_at_once) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "a sanitizer starts slowly";
#endif
  const Sandbox box;
  box.copy_model("llama4_maverick_tiny", "model");
  double help = 1e9, plan = 1e9;
  for (int i = 0; i < 8; ++i) {
    help = std::min(help, run_tailor(box, {"--help"}).seconds);
    const Outcome outcome = run_tailor(box, {"plan", "demo-maverick", "base_model=model"});
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    plan = std::min(plan, outcome.seconds);
  }
  RecordProperty("help_ms", static_cast<int>(help * 1e3));
  RecordProperty("plan_ms", static_cast<int>(plan * 1e3));
  EXPECT_LT(help, 0.050);
  EXPECT_LT(plan, 0.300);
}

TEST(Recipe, shipped_ones_validate) {
  const Sandbox box;
  const Outcome list = run_tailor(box, {"recipe", "ls", "--json"});
  const Json recipes = Json::parse(list.out);
  ASSERT_GE(recipes.size(), 3U);
  for (const Json& recipe : recipes) {
    const Outcome outcome =
        run_tailor(box, {"recipe", "validate", recipe["name"].get<std::string>()});
    EXPECT_EQ(outcome.code, 0) << recipe << outcome.err;
  }
}

TEST(Recipe, copy_validates_and_shows_the_same_text) {
  const Sandbox box;
  EXPECT_EQ(run_tailor(box, {"recipe", "cp", "demo-maverick", "mine.yaml"}).code, 0);
  EXPECT_EQ(run_tailor(box, {"recipe", "validate", "mine.yaml", "lora.rank=4"}).code, 0);
  EXPECT_EQ(run_tailor(box, {"recipe", "show", "mine.yaml"}).out,
            run_tailor(box, {"recipe", "show", "demo-maverick"}).out);
  const Outcome resolved = run_tailor(box, {"recipe", "show", "mine.yaml", "lora.rank=4"});
  EXPECT_THAT(resolved.out, HasSubstr("override lora.rank=4"));
}

TEST(Plan, prints_every_figure_with_its_working) {
  const Sandbox box;
  const Outcome outcome = run_tailor(box, {"plan", "maverick-a100", "training.max_steps=100"});
  EXPECT_EQ(outcome.code, 0);
  EXPECT_THAT(outcome.out, HasSubstr("maverick-a100 on a100-40gb"));
  const Json plan = Json::parse(
      run_tailor(box, {"plan", "maverick-a100", "training.max_steps=100", "--json"}).out);
  for (const char* key :
       {"device_bytes_peak", "host_bytes_peak", "disk_bytes", "stream_bytes_per_step",
        "tokens_per_step", "seconds_per_step", "tokens_per_second", "crossover_tokens_per_step",
        "steps", "hours", "gpu_hours", "usd", "bound", "fits"}) {
    ASSERT_TRUE(plan.contains(key)) << key;
    EXPECT_FALSE(plan[key]["value"].is_null()) << key;
    EXPECT_FALSE(plan[key]["working"].get<std::string>().empty()) << key;
  }
}

TEST(Plan, that_does_not_fit_prints_and_exits_66) {
  const Sandbox box;
  const Outcome outcome =
      run_tailor(box, {"plan", "maverick-a100", "training.micro_batch_size=64",
                       "data.sequence_len=65536", "base.activations=device", "--json"});
  EXPECT_EQ(outcome.code, 66);
  EXPECT_FALSE(Json::parse(outcome.out)["fits"]["value"].get<bool>());
  EXPECT_THAT(outcome.err, StartsWith("error: device memory: "));
}

TEST(Data, tokenize_gives_what_hugging_face_gives) {
  const Sandbox box;
  const fs::path golden = fs::path(TAILOR_SOURCE_DIR) / "tests/golden/tokenizer";
  const Json cases = read_json(golden / "cases.json");
  std::string rows;
  for (const Json& one : cases["encode"]) rows += Json{{"text", one["text"]}}.dump() + "\n";
  box.write_text("texts.jsonl", rows);
  const Outcome outcome = run_tailor(
      box, {"data", "tokenize", "--tokenizer", golden.string(), "--data", "texts.jsonl"});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  std::istringstream lines(outcome.out);
  std::string line;
  for (const Json& one : cases["encode"]) {
    ASSERT_TRUE(std::getline(lines, line));
    EXPECT_EQ(Json::parse(line), (Json{{"input_ids", one["ids"]}})) << one["text"];
  }
  EXPECT_FALSE(std::getline(lines, line));
}

TEST(Data, a_model_of_several_layouts_is_inspected) {
  const Sandbox box;
  for (const char* name :
       {"llama_tiny", "llama4_maverick_tiny", "llama4_scout_tiny", "llama4_conditional_tiny"}) {
    const fs::path golden = fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name;
    const Outcome outcome =
        run_tailor(box, {"model", "inspect", (golden / "model").string(), "--json"});
    EXPECT_EQ(outcome.code, 0) << name << outcome.err;
    EXPECT_GT(Json::parse(outcome.out)["parameters"].get<std::int64_t>(), 0);
  }
}

/// A sandbox with a model, data, a recipe and a ledger that holds one run.
class JsonDocuments : public testing::Test {
 protected:
  void SetUp() override {
    box_.copy_model("llama4_maverick_tiny", "model");
    box_.write_text("rows.jsonl",
                    "{\"input_ids\": [1, 2, 3], \"labels\": [-100, 2, 3]}\n"
                    "{\"input_ids\": [4, 5, 6, 7], \"labels\": [-100, 5, 6, 7]}\n");
    box_.write_text("texts.jsonl", "{\"text\": \"Hello world\"}\n{\"text\": \"\"}\n");
    box_.write_text("r.yaml",
                    "base_model: model\noutput_dir: run\ndata:\n  train: [rows.jsonl]\n"
                    "  format: tokenized\n  sequence_len: 8\ntraining: {max_steps: 5}\n");
    const RealClock clock;
    const auto ledger = Ledger::open((box_.root() / "data/ledger.db").string(), clock);
    RunFacts facts;
    facts.name = "first";
    facts.output_dir = (box_.root() / "run").string();
    const std::string run = ledger->begin_run(facts);
    AttemptFacts attempt;
    attempt.usd_micros_per_device_hour = 100'000;
    const AttemptId id = ledger->begin_attempt(run, attempt);
    SegmentFacts segment;
    segment.ms = 36'000;
    segment.step = segment.steps = 5;
    segment.tokens = 100;
    ledger->segments(id, std::vector{segment});
    ledger->end_attempt(id, RunStatus::succeeded, 0, "");
  }
  Sandbox box_;
};

TEST_F(JsonDocuments, of_every_verb_are_alone_on_stdout) {
  const std::string tokenizer = std::string(TAILOR_SOURCE_DIR) + "/tests/golden/tokenizer";
  const std::vector<std::vector<std::string>> commands = {
      {"recipe", "ls"},
      {"recipe", "show", "demo-maverick"},
      {"recipe", "cp", "demo-maverick", "copy.yaml"},
      {"recipe", "validate", "r.yaml"},
      {"plan", "r.yaml"},
      {"plan", "r.yaml", "--data"},
      {"plan", "r.yaml", "training.max_steps=null"},
      {"data", "prepare", "r.yaml"},
      {"data", "inspect", "r.yaml"},
      {"data", "tokenize", "--tokenizer", tokenizer, "--data", "texts.jsonl"},
      {"model", "inspect", "model"},
      {"model", "pack", "model", "--to", "store"},
      {"model", "pack", "model", "--to", "store"},
      {"model", "verify", "store"},
      {"model", "verify", "store", "--against", "model"},
      {"runs", "ls"},
      {"runs", "ls", "--ledger", "data/ledger.db"},
      {"runs", "show", "first"},
      {"runs", "report"},
      {"runs", "report", "first"},
      {"runs", "export"},
      {"prices", "ls"},
      {"prices", "check"},
      {"doctor"}};
  for (std::vector<std::string> arguments : commands) {
    const std::string command = join(arguments, " ");
    arguments.emplace_back("--json");
    const Outcome outcome = run_tailor(box_, arguments);
    EXPECT_EQ(outcome.code, 0) << command << "\n" << outcome.err;
    EXPECT_TRUE(Json::accept(outcome.out)) << command << "\n" << outcome.out;
  }
}

TEST_F(JsonDocuments, of_failures_are_empty_and_the_error_is_on_stderr) {
  const Outcome outcome = run_tailor(box_, {"model", "inspect", "nowhere", "--json"});
  EXPECT_EQ(outcome.code, 2);
  EXPECT_EQ(outcome.out, "");
  EXPECT_THAT(outcome.err, StartsWith("error: no such model: 'nowhere'"));
}

TEST_F(JsonDocuments, of_runs_carry_exact_costs) {
  const Json runs = Json::parse(run_tailor(box_, {"runs", "ls", "--json"}).out);
  ASSERT_EQ(runs.size(), 1U);
  EXPECT_EQ(runs[0]["name"], "first");
  EXPECT_EQ(runs[0]["status"], "succeeded");
  EXPECT_DOUBLE_EQ(runs[0]["gpu_hours"].get<double>(), 0.01);
  EXPECT_DOUBLE_EQ(runs[0]["usd"].get<double>(), 0.001);
  const Json report = Json::parse(run_tailor(box_, {"runs", "report", "--json"}).out);
  EXPECT_EQ(report["run"], runs[0]["run"]);
}

TEST_F(JsonDocuments, of_data_agree_with_the_rows) {
  const Json report = Json::parse(run_tailor(box_, {"data", "prepare", "r.yaml", "--json"}).out);
  EXPECT_EQ(report["train"]["tokens"], 7);
  EXPECT_EQ(report["train"]["trained_tokens"], 5);
  EXPECT_EQ(report["train"]["rows"], 1);
  EXPECT_EQ(report["reused"], false);
  EXPECT_EQ(Json::parse(run_tailor(box_, {"data", "prepare", "r.yaml", "--json"}).out)["reused"],
            true);
  const Json rows = Json::parse(run_tailor(box_, {"data", "inspect", "r.yaml", "--json"}).out);
  std::vector<std::vector<int>> found;
  for (const Json& document : rows["rows"][0]["documents"]) {
    found.push_back(document["input_ids"].get<std::vector<int>>());
  }
  std::sort(found.begin(), found.end());
  EXPECT_EQ(found, (std::vector<std::vector<int>>{{1, 2, 3}, {4, 5, 6, 7}}));
}

TEST_F(JsonDocuments, of_a_plan_know_the_data_when_no_steps_are_set) {
  const Json plan = Json::parse(run_tailor(box_, {"plan", "r.yaml", "training.max_steps=null",
                                                  "training.num_epochs=3", "--json"})
                                    .out);
  EXPECT_EQ(plan["steps"]["value"], 3);
}

}  // namespace
}  // namespace tailor::testing_support
