// `tailor experts scan` and training with what it wrote, as a user runs them, on a tiny model.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/text.h"
#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

using testing::HasSubstr;

class ExpertsProgram : public testing::Test {
 protected:
  void SetUp() override {
    box_.copy_model("llama4_maverick_tiny", "model");
    std::string lines;
    for (std::uint64_t row = 0; row < 40; ++row) {
      Json ids = Json::array();
      const std::uint64_t length = 6 + row % 17;
      for (std::uint64_t i = 0; i < length; ++i) ids.push_back((row % 4 * 50 + i * 7) % 256);
      tokens_ += static_cast<std::int64_t>(length);
      lines += Json({{"input_ids", ids}}).dump() + "\n";
    }
    box_.write_text("rows.jsonl", lines);
    box_.write_text(
        "recipe.yaml",
        "base_model: model\noutput_dir: run\nlora: {rank: 4, alpha: 8, targets: [all]}\n"
        "data: {train: [rows.jsonl], validation: [rows.jsonl], sequence_len: 24}\n"
        "training: {micro_batch_size: 2, gradient_accumulation_steps: 2, num_epochs: 50, "
        "max_steps: 6, learning_rate: 5.0e-3, eval_every_steps: 0}\n"
        "compute: {dtype: float32, threads: 1}\n"
        "cost: {price: {usd_per_gpu_hour: 0.10}, ledger: ledger.db}\n");
  }
  Outcome run(std::vector<std::string> arguments) const { return run_tailor(box_, arguments); }
  Outcome scan(std::vector<std::string> more) const {
    std::vector<std::string> words = {"experts", "scan",       "--model",   "model",
                                      "--data",  "rows.jsonl", "--threads", "1"};
    words.insert(words.end(), more.begin(), more.end());
    return run(words);
  }
  Json scanned(std::vector<std::string> more) const {
    more.emplace_back("--json");
    const Outcome done = scan(std::move(more));
    EXPECT_EQ(done.code, 0) << done.err;
    return parse_json(done.out, "stdout");
  }
  std::string file(const std::string& name) const { return read_text(box_.root() / name); }
  void expect_refused(const Outcome& outcome, int code, const std::string& what) const {
    EXPECT_EQ(outcome.code, code) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(what));
    EXPECT_EQ(outcome.out, "");
  }

  static std::string fixed(double usd) {
    return std::to_string(std::llround(usd * 1e6) / 1'000'000) + "." +
           std::to_string(1'000'000 + std::llround(usd * 1e6) % 1'000'000).substr(1);
  }

  Sandbox box_;
  std::int64_t tokens_ = 0;
};

TEST_F(ExpertsProgram, a_scan_counts_every_token_and_writes_what_it_says) {
  const Json all = scanned({"--top-p", "1", "--out", "chosen.yaml", "--report", "map.html"});
  EXPECT_EQ(all.at("tokens"), tokens_);
  ASSERT_EQ(all.at("layers").size(), 2U);
  for (const Json& layer : all.at("layers")) {
    std::int64_t sum = 0;
    for (const Json& tokens : layer.at("tokens")) sum += tokens.get<std::int64_t>();
    EXPECT_EQ(sum, tokens_);
    EXPECT_NEAR(layer.at("tokens_covered").get<double>(), 1, 1e-12);
    EXPECT_GT(layer.at("effective_experts").get<double>(), 1);
  }
  EXPECT_THAT(file("chosen.yaml"), HasSubstr("family: llama4"));
  EXPECT_THAT(file("chosen.yaml"), HasSubstr("tokens: " + std::to_string(tokens_)));
  EXPECT_THAT(file("map.html"), HasSubstr("<td class="));
  // The same rows in passes of another size, and the rows that --limit leaves.
  EXPECT_EQ(scanned({"--top-p", "1", "--batch-tokens", "40"}).at("layers")[0].at("tokens"),
            all.at("layers")[0].at("tokens"));
  EXPECT_EQ(scanned({"--limit", "7", "--batch-tokens", "60"}).at("tokens"),
            6 + 7 + 8 + 9 + 10 + 11 + 12);
  EXPECT_EQ(scanned({"--count-tokens", "trained"}).at("tokens"), tokens_ - 40)
      << "a document's last token has no successor";
}

TEST_F(ExpertsProgram, progress_has_dollars_where_there_is_a_price) {
  const auto last_line = [&](std::vector<std::string> more) {
    std::vector<std::string> words = {"experts", "scan", "--recipe", "recipe.yaml"};
    words.insert(words.end(), more.begin(), more.end());
    const Outcome done = run(words);
    EXPECT_EQ(done.code, 0) << done.err;
    const std::size_t at = done.err.rfind("scanned ");
    EXPECT_NE(at, std::string::npos) << done.err;
    return done.err.substr(at, done.err.find('\n', at) - at);
  };
  const std::string dear = last_line({"cost.price={usd_per_gpu_hour: 3600000}"});
  EXPECT_THAT(dear, HasSubstr("tokens/s  ETA "));
  const std::size_t dollar = dear.rfind('$');
  ASSERT_NE(dollar, std::string::npos) << dear;
  // 1,000 dollars a second: of a scan that takes some time, and not an hour.
  std::string digits;
  for (const char c : dear.substr(dollar + 1)) {
    if (c != ',') digits += c;
  }
  EXPECT_GT(std::stod(digits), 1) << dear;
  EXPECT_LT(std::stod(digits), 600'000) << dear;
  // Without a recipe there is no price to go by.
  const Outcome free = scan({});
  EXPECT_THAT(free.err, HasSubstr("scanned 40 of 40 rows"));
  EXPECT_EQ(free.err.find('$'), std::string::npos) << free.err;
}

TEST_F(ExpertsProgram, every_rule_keeps_to_its_bound) {
  const Json all = scanned({"--top-p", "1"});
  for (const char* by : {"gate", "token"}) {
    for (const Json& layer : scanned({"--by", by, "--count", "2"}).at("layers")) {
      EXPECT_EQ(layer.at("chosen").size(), 2U);
    }
  }
  const std::int64_t each =
      all.at("bytes").get<std::int64_t>() / all.at("experts").get<std::int64_t>();
  const Json capped = scanned({"--max-bytes", std::to_string(3 * each + each / 2)});
  EXPECT_EQ(capped.at("experts"), 3);
  EXPECT_EQ(capped.at("bytes"), 3 * each);
  const Json doubled = scanned({"--top-p", "1", "--expert-rank", "16"});
  EXPECT_EQ(doubled.at("bytes").get<std::int64_t>() / doubled.at("expert_rank").get<int>(),
            all.at("bytes").get<std::int64_t>() / all.at("expert_rank").get<int>());
}

TEST_F(ExpertsProgram, a_cap_in_dollars_is_what_the_plan_says_of_the_choice) {
  // Long and dear, so that micro-dollars tell choices apart.
  const std::vector<std::string> run_of = {"training.max_steps=1000000",
                                           "cost.price={usd_per_gpu_hour: 1000000}"};
  const auto scan_with = [&](const std::string& usd) {
    return run({"experts", "scan", "--recipe", "recipe.yaml", run_of[0], run_of[1], "--max-usd",
                usd, "--out", "usd.yaml", "--force", "--json"});
  };
  const auto planned = [&](const std::string& experts) {
    const Outcome done =
        run({"plan", "recipe.yaml", run_of[0], run_of[1], "lora.experts=" + experts, "--json"});
    EXPECT_EQ(done.code, 0) << done.err;
    return parse_json(done.out, "stdout").at("usd").at("value").get<double>();
  };
  ASSERT_EQ(scan({"--max-bytes", "5KB", "--out", "one.yaml", "--expert-rank", "4"}).code, 0);
  const double one = planned("one.yaml"), all = planned("all");
  ASSERT_LT(one, all);
  const double cap = one + (all - one) * 0.5;
  const Outcome half = scan_with(fixed(cap));
  ASSERT_EQ(half.code, 0) << half.err;
  const auto experts = parse_json(half.out, "stdout").at("experts").get<std::int64_t>();
  EXPECT_GT(experts, 1);
  EXPECT_LT(experts, 16);
  EXPECT_LE(planned("usd.yaml"), cap);

  const Outcome free = scan_with(fixed(all + 1));
  ASSERT_EQ(free.code, 0) << free.err;
  EXPECT_EQ(parse_json(free.out, "stdout").at("experts"), 16);
  EXPECT_THAT(free.err, HasSubstr("costs no more than --max-usd"));
  expect_refused(scan_with(fixed(one * 0.9)), 2, "with a single expert");
}

TEST_F(ExpertsProgram, training_takes_the_chosen_experts_and_the_plan_counts_them) {
  ASSERT_EQ(scan({"--count", "2", "--out", "two.yaml", "--expert-rank", "4"}).code, 0);
  const auto plan = [&](const std::string& experts) {
    const Outcome done = run({"plan", "recipe.yaml", "lora.experts=" + experts, "--json"});
    EXPECT_EQ(done.code, 0) << done.err;
    return parse_json(done.out, "stdout").at("trainable_parameters").at("value").get<double>();
  };
  EXPECT_EQ(plan("all") - plan("two.yaml"), (16 - 4) * 3 * 4 * (64 + 48));

  const std::vector<std::string> train = {"train", "recipe.yaml", "lora.experts=two.yaml",
                                          "--json"};
  const auto with = [&](std::vector<std::string> more) {
    std::vector<std::string> words = train;
    words.insert(words.end(), more.begin(), more.end());
    return run(words);
  };
  const Outcome done = with({});
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_THAT(done.err, HasSubstr("2 of 8 experts on average"));
  const std::string adapter = file("run/adapter/adapter_model.safetensors");

  // Half the run, then the other half; and with the experts' state on disk.
  ASSERT_EQ(
      with({"output_dir=halves", "training.max_steps=3", "training.lr_scheduler=constant"}).code,
      0);
  ASSERT_EQ(with({"output_dir=halves", "training.lr_scheduler=constant", "--resume"}).code, 0);
  ASSERT_EQ(with({"output_dir=whole", "training.lr_scheduler=constant"}).code, 0);
  EXPECT_EQ(sha256_hex(file("halves/adapter/adapter_model.safetensors")),
            sha256_hex(file("whole/adapter/adapter_model.safetensors")));
  // The run has its own copy of the choice, and goes on with nothing else.
  EXPECT_EQ(file("halves/experts.yaml"), file("two.yaml"));
  EXPECT_EQ(parse_json(file("halves/run.json"), "run.json").at("experts_sha256"),
            sha256_hex(file("two.yaml")));
  box_.write_text("edited.yaml", file("two.yaml") + "# by hand\n");
  const auto on = [&](const std::string& experts) {
    return run({"train", "recipe.yaml", "output_dir=halves", "training.lr_scheduler=constant",
                "training.max_steps=7", "lora.experts=" + experts, "--resume"});
  };
  expect_refused(on("edited.yaml"), 2, "not the choice of experts that this run was started with");
  const Outcome own = on("halves/experts.yaml");
  EXPECT_EQ(own.code, 0) << own.err;
  ASSERT_EQ(with({"output_dir=paged", "lora.expert_state=disk"}).code, 0);
  EXPECT_EQ(sha256_hex(file("paged/adapter/adapter_model.safetensors")), sha256_hex(adapter));

  // What was evaluated at the end of training is what the file evaluates to.
  const Outcome eval =
      run({"eval", "--model", "model", "--adapter", "run/adapter", "--data", "rows.jsonl",
           "--dtype", "float32", "--threads", "1", "--sequence-len", "24", "--json"});
  ASSERT_EQ(eval.code, 0) << eval.err;
  const std::string metrics = file("run/metrics.jsonl");
  const std::size_t at = metrics.rfind("\"eval_loss\":");
  ASSERT_NE(at, std::string::npos);
  EXPECT_NEAR(std::stod(metrics.substr(at + 12)),
              parse_json(eval.out, "stdout").at("loss").get<double>(), 1e-5);

  // Going on: with the same experts, with more, and not with fewer.
  ASSERT_EQ(scan({"--count", "1", "--out", "one.yaml"}).code, 0);
  EXPECT_EQ(with({"output_dir=further", "lora.init_from=run/adapter"}).code, 0);
  const Outcome more =
      run({"train", "recipe.yaml", "output_dir=more", "lora.init_from=run/adapter"});
  EXPECT_EQ(more.code, 0) << more.err;
  expect_refused(run({"train", "recipe.yaml", "output_dir=less", "lora.experts=one.yaml",
                      "lora.init_from=run/adapter"}),
                 2, "which lora.experts does not choose");
  // Another choice is another run.
  expect_refused(
      run({"train", "recipe.yaml", "lora.experts=one.yaml", "training.max_steps=9", "--resume"}), 2,
      "choice of experts");
}

TEST_F(ExpertsProgram, files_that_do_not_fit_are_refused_before_anything_is_made) {
  ASSERT_EQ(scan({"--count", "2", "--out", "two.yaml"}).code, 0);
  const std::string good = file("two.yaml");
  const auto damaged = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    box_.write_text("bad.yaml", text);
    return run({"train", "recipe.yaml", "lora.experts=bad.yaml"});
  };
  expect_refused(damaged("hidden: 64", "hidden: 65"), 65, "made for another model");
  expect_refused(damaged("experts: [", "experts: [8, "), 65, "expert 8 is out of range");
  expect_refused(damaged("counted", "count"), 65, "problems in expert selection");
  expect_refused(damaged("fingerprint: \"", "fingerprint: \"0"), 65, "of the same shape");
  expect_refused(run({"train", "recipe.yaml", "lora.experts=nowhere.yaml"}), 2, "nowhere.yaml");
  EXPECT_FALSE(fs::exists(box_.root() / "run"));
  EXPECT_FALSE(fs::exists(box_.root() / "ledger.db"));
}

TEST_F(ExpertsProgram, wrong_command_lines_are_refused_before_the_scan) {
  ASSERT_EQ(scan({"--out", "chosen.yaml"}).code, 0);
  expect_refused(scan({"--out", "chosen.yaml"}), 2, "there is a file already");
  EXPECT_EQ(scan({"--out", "chosen.yaml", "--force"}).code, 0);
  expect_refused(scan({"--top-p", "0"}), 2, "--top-p is 0");
  expect_refused(scan({"--top-p", "1.5"}), 2, "--top-p is 1.5");
  expect_refused(scan({"--top-p", "0.5", "--count", "3"}), 2, "more than one rule");
  expect_refused(scan({"--max-bytes", "much"}), 2, "--max-bytes is 'much'");
  expect_refused(scan({"--max-bytes", "10"}), 2, "one expert's factors take");
  expect_refused(scan({"--max-usd", "3"}), 2, "--max-usd without --recipe");
  expect_refused(scan({"lora.rank=3"}), 2, "without --recipe");
  expect_refused(scan({"--by", "luck"}), 2, "'luck' is no value of --by");
  expect_refused(run({"experts", "scan", "--model", "model"}), 2, "--data is required");
  box_.copy_model("llama_tiny", "dense");
  expect_refused(run({"experts", "scan", "--model", "dense", "--data", "rows.jsonl"}), 2,
                 "has no routed experts");
  expect_refused(run({"experts"}), 2, "needs a verb");
}

}  // namespace
}  // namespace tailor::testing_support
