// `tailor adapter check-served` before a server whose numbers are transformers' and PEFT's own.

#include <gmock/gmock.h>
#include <signal.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>

#include "base/text.h"
#include "data/checkpoint/safetensors.h"
#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

using testing::HasSubstr;
using testing::Not;

const std::string kGolden = std::string(TAILOR_SOURCE_DIR) + "/tests/golden/llama4_maverick_tiny";

class CheckServed : public testing::Test {
 protected:
  void SetUp() override {
    // The two rows of the golden batch, without their padding.
    const MappedFile file(fs::path(kGolden) / "batches.safetensors");
    const auto tensors = parse_safetensors_header(file.bytes(), file.path()).tensors;
    std::string lines;
    for (std::int64_t row = 0; row < 2; ++row) {
      Json ids = Json::array();
      for (std::int64_t t = 0; t < 24; ++t) {
        if (number(file, tensors.at("attention_mask"), row * 24 + t) == 0) continue;
        ids.push_back(number(file, tensors.at("input_ids"), row * 24 + t));
      }
      lines += Json({{"input_ids", ids}}).dump() + "\n";
    }
    box_.write_text("rows.jsonl", lines);
  }
  void TearDown() override { stop(); }

  static std::int64_t number(const MappedFile& file, const TensorInfo& info, std::int64_t at) {
    std::int64_t value = 0;
    std::memcpy(&value, file.bytes().data() + info.offset + at * 8, sizeof value);
    return value;
  }
  void serve(const std::string& mode) {
    stop();
    const fs::path port = box_.root() / "port", log = box_.root() / "log.jsonl";
    fs::remove(port);
    fs::remove(log);
    const std::string script = std::string(TAILOR_SOURCE_DIR) + "/tests/e2e/fake_server.py";
    server_ = ::fork();
    if (server_ == 0) {
      ::execl(TAILOR_PYTHON, TAILOR_PYTHON, script.c_str(), kGolden.c_str(), mode.c_str(),
              port.c_str(), log.c_str(), static_cast<char*>(nullptr));
      ::_exit(127);
    }
    for (int i = 0; i < 600 && !fs::exists(port); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    ASSERT_TRUE(fs::exists(port)) << "the server did not start";
    url_ = "http://127.0.0.1:" + read_text(port);
  }
  void stop() {
    if (server_ <= 0) return;
    ::kill(server_, SIGKILL);
    ::waitpid(server_, nullptr, 0);
    server_ = 0;
  }
  Outcome check(std::vector<std::string> more = {}) {
    std::vector<std::string> words = {
        "adapter", "check-served",     "--url",     url_,
        "--model", kGolden + "/model", "--adapter", kGolden + "/lora/adapter_final",
        "--data",  "rows.jsonl",       "--threads", "1"};
    words.insert(words.end(), more.begin(), more.end());
    return run_tailor(box_, words);
  }
  std::vector<Json> requests() const {
    std::vector<Json> out;
    for (const std::string& line : split(read_text(box_.root() / "log.jsonl"), '\n')) {
      if (!line.empty()) out.push_back(parse_json(line, "log"));
    }
    return out;
  }

  Sandbox box_;
  std::string url_;
  pid_t server_ = 0;
};

TEST_F(CheckServed, served_is_served_with_either_way_of_asking) {
  for (const char* mode : {"truth", "no_echo"}) {
    SCOPED_TRACE(mode);
    serve(mode);
    const Outcome outcome = check({"--json", "--dtype", "float32"});
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    const Json json = parse_json(outcome.out, "stdout");
    EXPECT_EQ(json.at("verdict"), "served");
    EXPECT_EQ(json.at("served_model"), "tuned") << "the one of the server's models with a parent";
    EXPECT_EQ(json.at("base_served"), "base");
    EXPECT_EQ(json.at("rows"), 2);
    // Our numbers are transformers' and PEFT's.
    EXPECT_NEAR(json.at("share").get<double>(), 1, 1e-3);
    EXPECT_LT(json.at("apart").get<double>(), 1e-3);
    EXPECT_NEAR(json.at("ours").get<double>(), json.at("served").get<double>(), 1e-4);
    EXPECT_NEAR(json.at("ours_base").get<double>(), json.at("served_base").get<double>(), 1e-4);
    EXPECT_GT(json.at("effect").get<double>(), 0.1);
  }
  const Outcome text = check();
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_THAT(text.out, HasSubstr("served: 'tuned' at http://127.0.0.1:"));
}

TEST_F(CheckServed, ignored_and_different_end_with_65_and_numbers) {
  for (const auto& [mode, share] : {std::pair("ignored", 0.0), std::pair("differs", 2.0)}) {
    SCOPED_TRACE(mode);
    serve(mode);
    const Outcome outcome = check({"--json", "--dtype", "float32"});
    EXPECT_EQ(outcome.code, 65);
    const Json json = parse_json(outcome.out, "stdout");
    EXPECT_EQ(json.at("verdict"), mode);
    // Twice the change of logits is not quite twice that of their logarithms.
    EXPECT_NEAR(json.at("share").get<double>(), share, share == 0 ? 1e-3 : 0.5);
    EXPECT_THAT(outcome.err, HasSubstr(share == 0 ? "answers as if the adapter were not there"
                                                  : "neither those with the adapter nor"));
  }
}

TEST_F(CheckServed, a_merged_model_is_held_against_its_base) {
  const std::string merged = kGolden + "/lora/merged", base = kGolden + "/model";
  const auto merged_check = [&](const std::string& name) {
    return run_tailor(box_, {"adapter", "check-served", "--url", url_, "--model", merged, "--base",
                             base, "--data", "rows.jsonl", "--served-model", name, "--threads", "1",
                             "--dtype", "float32"});
  };
  serve("truth");
  EXPECT_EQ(merged_check("tuned").code, 0);
  const Outcome base_served = merged_check("base");
  EXPECT_EQ(base_served.code, 65);
  EXPECT_THAT(base_served.out, HasSubstr("ignored: 'base'"));
}

TEST_F(CheckServed, sends_the_tokens_asked_for_and_the_key_alone) {
  serve("needs_key");
  const Outcome without = check();
  EXPECT_EQ(without.code, 2);
  EXPECT_THAT(without.err, HasSubstr("the server wants a key (401)"));
  EXPECT_THAT(without.err, HasSubstr("TAILOR_API_KEY"));
  ::setenv("TAILOR_API_KEY", "secret", 1);
  const Outcome with = check({"--rows", "1", "--sequence-len", "5"});
  ::unsetenv("TAILOR_API_KEY");
  EXPECT_EQ(with.code, 0) << with.err;
  EXPECT_THAT(with.out + with.err, Not(HasSubstr("secret")));
  std::size_t completions = 0;
  for (const Json& request : requests()) {
    if (request.at("body").is_null()) continue;
    ++completions;
    EXPECT_EQ(request.at("path"), "/v1/completions");
    EXPECT_EQ(request.at("key"), "Bearer secret");
    EXPECT_EQ(request.at("body").at("prompt").size(), 5U);
    EXPECT_EQ(request.at("body").size(), 6U) << request.at("body").dump();
  }
  EXPECT_EQ(completions, 2U) << "one row, with and without";
}

TEST_F(CheckServed, servers_that_fail_are_told_apart) {
  const auto says = [&](const char* mode, int code, const char* text,
                        const std::vector<std::string>& more = {}) {
    SCOPED_TRACE(mode);
    serve(mode);
    const Outcome outcome = check(more);
    EXPECT_EQ(outcome.code, code) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    EXPECT_THAT(outcome.err, HasSubstr(text));
  };
  says("slow", 74, "the server did not answer within 0.5 s", {"--timeout", "0.5"});
  says("not_json", 74, "the server's answer is no JSON: <html>a web page</html>");
  says("broken", 74, "the server failed (500): out of memory");
  says("bad_request", 2, "the server refuses (400): logprobs are not allowed");
  says("null", 74, "a log-probability of the server is null");
  says("short", 74, "the server gives no log-probabilities of the prompt");
  says("truth", 2, "the server has no model 'tunes'", {"--served-model", "tunes"});
  says("truth", 2, "Did you mean tuned? It serves: base, tuned.", {"--served-model", "tunes"});
  stop();
  const Outcome gone = check();
  EXPECT_EQ(gone.code, 74);
  EXPECT_THAT(gone.err, HasSubstr("cannot talk to the server"));
  url_ = "ftp://example.org";
  EXPECT_EQ(check().code, 2);
}

TEST_F(CheckServed, another_base_differs) {
  serve("other_base");
  const Outcome outcome = check({"--dtype", "float32"});
  EXPECT_EQ(outcome.code, 65);
  EXPECT_THAT(outcome.out, HasSubstr("differs: 'tuned'"));
  EXPECT_THAT(outcome.out, HasSubstr("the server's base is not ours"));
}

TEST_F(CheckServed, an_adapter_that_changes_nothing_cannot_be_told) {
  fs::copy(kGolden + "/lora/adapter_final", box_.root() / "small", fs::copy_options::recursive);
  const fs::path config = box_.root() / "small/adapter_config.json";
  Json json = read_json(config);
  json["lora_alpha"] = 0.001;
  write_atomically(config, json.dump());
  serve("truth");
  const Outcome outcome =
      run_tailor(box_, {"adapter", "check-served", "--url", url_, "--model", kGolden + "/model",
                        "--adapter", "small", "--data", "rows.jsonl", "--threads", "1"});
  EXPECT_EQ(outcome.code, 65);
  EXPECT_THAT(outcome.err, HasSubstr("too little to tell whether it is served"));
}

}  // namespace
}  // namespace tailor::testing_support
