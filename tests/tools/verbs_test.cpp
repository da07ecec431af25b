// What the verbs do and print when all is well.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
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
                                                      {"launch", "local"},
                                                      {"launch", "slurm"},
                                                      {"launch", "kubernetes"},
                                                      {"launch", "skypilot"},
                                                      {"launch", "status"},
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
  for (const char* name : {"llama_tiny", "llama4_maverick_tiny", "llama4_scout_tiny",
                           "llama4_conditional_tiny", "qwen2_tiny", "deepseek_v3_tiny"}) {
    const fs::path golden = fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name;
    const Outcome outcome =
        run_tailor(box, {"model", "inspect", (golden / "model").string(), "--json"});
    EXPECT_EQ(outcome.code, 0) << name << outcome.err;
    EXPECT_GT(Json::parse(outcome.out)["parameters"].get<std::int64_t>(), 0);
  }
}

TEST(ModelInspect, of_fp8_uses_its_scales) {
  const Sandbox box;
  const fs::path folder = fs::path(TAILOR_SOURCE_DIR) / "tests/golden/deepseek_v3_fp8_tiny/model";
  const Outcome outcome = run_tailor(box, {"model", "inspect", folder.string(), "--json"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json json = Json::parse(outcome.out);
  EXPECT_GT(json["dtypes"]["F8_E4M3"].get<std::int64_t>(), 0);
  for (const Json& name : json["tensors_not_used"]) {
    EXPECT_THAT(name.get<std::string>(), testing::Not(HasSubstr("scale")));
  }
}

constexpr const char* kR1 = "deepseek-ai/DeepSeek-R1";

// The figures are those of the streaming model: tables B and D of its geometry.
TEST(ModelInspect, of_a_config_alone_gives_sizes) {
  const Sandbox box;
  const Outcome named = run_tailor(box, {"model", "inspect", kR1, "--json"});
  ASSERT_EQ(named.code, 0) << named.err;
  const Json r1 = Json::parse(named.out);
  EXPECT_EQ(r1["weights"], "none");
  EXPECT_EQ(r1["parameters"], 671'026'419'200);
  EXPECT_EQ(r1["prediction_layers"], 1);
  const std::map<std::string, std::array<double, 3>> oracle = {{"bf16", {88.08, 22.55, 1307.82}},
                                                               {"fp8", {44.05, 11.28, 654.07}},
                                                               {"int4", {22.71, 5.81, 337.17}},
                                                               {"nf4", {22.72, 5.82, 337.33}}};
  ASSERT_EQ(r1["format_bytes"].size(), oracle.size());
  for (const auto& [format, sizes] : oracle) {
    const Json& bytes = r1["format_bytes"][format];
    EXPECT_NEAR(bytes["expert"].get<double>() / 1e6, sizes[0], 0.006) << format;
    EXPECT_NEAR(bytes["layer_experts"].get<double>() / 1e9, sizes[1], 0.006) << format;
    EXPECT_NEAR(bytes["experts"].get<double>() / 1e9, sizes[2], 0.006) << format;
    EXPECT_GT(bytes["total"], bytes["experts"]) << format;
  }
  const Json& adapter = r1["adapter_parameters_per_rank"];
  EXPECT_EQ(adapter["experts"], 410'517'504);
  EXPECT_EQ(adapter["attention"], 61 * 66'112);
  EXPECT_EQ(adapter["kv_b_proj"], 61 * 33'280);
  // All linear layers outside routed experts: 7.9 M a unit of rank.
  EXPECT_NEAR((adapter["attention"].get<double>() + adapter["kv_b_proj"].get<double>() +
               adapter["dense_mlp"].get<double>() + adapter["shared_expert"].get<double>()) /
                  1e6,
              7.9, 0.05);

  const Json config =
      read_json(fs::path(TAILOR_SOURCE_DIR) / "recipes/models/deepseek-ai--DeepSeek-R1.json");
  box.write_text("r1/config.json", config.dump());
  Json folder = Json::parse(run_tailor(box, {"model", "inspect", "r1", "--json"}).out);
  Json file = Json::parse(run_tailor(box, {"model", "inspect", "r1/config.json", "--json"}).out);
  for (Json* other : {&folder, &file}) {
    (*other)["folder"] = r1["folder"];
    EXPECT_EQ(*other, r1);
  }
}

TEST(ModelInspect, of_a_config_alone_says_that_no_weights_are_there) {
  const Sandbox box;
  const Outcome outcome = run_tailor(box, {"model", "inspect", kR1});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  for (const char* text :
       {"671,026,419,200", "none: this is a config alone", "hf download deepseek-ai/DeepSeek-R1",
        "128 heads of 128 + 64 rotary, values of 128; latents of 1,536 (queries) and 512",
        "1 behind them (multi-token prediction): skipped", "410,517,504", "337.17 GB", "654.07 GB",
        "in training the two share one: 304,087,040",
        "vLLM folds it into attention and ignores factors on it"}) {
    EXPECT_THAT(outcome.out, HasSubstr(text));
  }
  const Outcome dense =
      run_tailor(box, {"model", "inspect", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"});
  EXPECT_EQ(dense.code, 0) << dense.err;
  EXPECT_THAT(dense.out, HasSubstr("biases on q, k and v"));
  EXPECT_THAT(dense.out, testing::Not(HasSubstr("kv_b_proj")));
  EXPECT_THAT(dense.out, testing::Not(HasSubstr("xperts")));
}

TEST(ModelInspect, of_a_store_describes_it) {
  const Sandbox box;
  box.copy_model("llama4_maverick_tiny", "model");
  ASSERT_EQ(run_tailor(box, {"model", "pack", "model", "--to", "store"}).code, 0);
  const Outcome outcome = run_tailor(box, {"model", "inspect", "store"});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("tailor model verify store"));
  EXPECT_THAT(outcome.out, HasSubstr("experts int4"));
  const Json json = Json::parse(run_tailor(box, {"model", "inspect", "store", "--json"}).out);
  const Json model = Json::parse(run_tailor(box, {"model", "inspect", "model", "--json"}).out);
  EXPECT_EQ(json["weights"], "store");
  EXPECT_EQ(json["parameters"], model["parameters"]);
  EXPECT_EQ(json["store"]["source"], "model");
  EXPECT_GT(json["bytes"], 0);
  // A store that is not finished is told as that, not as a config without weights.
  fs::remove(box.root() / "store/store.json");
  box.write_text("store/pack.journal", "");
  const Outcome begun = run_tailor(box, {"model", "inspect", "store"});
  EXPECT_EQ(begun.code, 65);
  EXPECT_THAT(begun.err, HasSubstr("not finished"));
}

TEST(Plan, of_shipped_r1_recipes_needs_neither_weights_nor_data) {
  const Sandbox box;
  for (const char* name : {"r1-4xh100", "r1-1xh200", "r1-distill-qwen-7b"}) {
    const std::string path = std::string(TAILOR_SOURCE_DIR) + "/recipes/" + name + ".yaml";
    const Outcome outcome = run_tailor(box, {"plan", path, "training.max_steps=100", "--json"});
    EXPECT_EQ(outcome.code, 0) << name << outcome.err;
    EXPECT_TRUE(Json::parse(outcome.out)["fits"]["value"].get<bool>()) << name;
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
