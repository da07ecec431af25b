// What every job file needs: names, quoting, times, places; and YAML that reads back.

#include "tools/launch/job.h"

#include <gtest/gtest.h>
#include <yaml-cpp/yaml.h>

#include "base/error.h"
#include "tools/launch/client.h"
#include "tools/launch/yaml_out.h"

namespace tailor {
namespace {

TEST(JobName, is_one_that_every_cluster_takes) {
  EXPECT_EQ(job_name("r1-4xh100"), "r1-4xh100");
  EXPECT_EQ(job_name("My Run_2.1"), "my-run-2-1");
  EXPECT_EQ(job_name("--x--"), "x");
  EXPECT_EQ(job_name("4x"), "t-4x");
  EXPECT_EQ(job_name("日本"), "tailor");
  EXPECT_EQ(job_name(""), "tailor");
  EXPECT_EQ(job_name(std::string(80, 'a')), std::string(50, 'a'));
}

TEST(ShellWord, is_read_back_by_a_shell) {
  std::vector<std::string> words = {
      "plain",     "",         "two words",   "it's", "'",   "''", "\"", "$HOME",
      "$(echo x)", "`echo x`", "a\nb",        "\\",   "*",   "~",  "#",  "-n",
      "k=[1, 2]",  "!x",       "caf\xc3\xa9", "a;b",  "a&b", "\t"};
  std::string all;
  for (int code = 1; code < 256; ++code) all += static_cast<char>(code);
  words.push_back(all);
  std::vector<std::string> command = {"/bin/sh", "-c", "printf '%s\\001' " + shell_words(words)};
  std::string expected;
  for (const std::string& word : words) expected += word + "\001";
  EXPECT_EQ(client_output(command), expected);
  command[0] = "/bin/bash";
  EXPECT_EQ(client_output(command), expected);
  EXPECT_THROW(shell_word(std::string("a\0b", 3)), Error);
}

TEST(TimeLimit, is_as_slurm_writes_it) {
  EXPECT_EQ(time_limit_seconds("90"), 5400);
  EXPECT_EQ(time_limit_seconds("30:15"), 1815);
  EXPECT_EQ(time_limit_seconds("1:30:00"), 5400);
  EXPECT_EQ(time_limit_seconds("2-12"), 216'000);
  EXPECT_EQ(time_limit_seconds("2-12:30"), 217'800);
  EXPECT_EQ(time_limit_seconds("1-00:00:01"), 86'401);
  for (const char* bad : {"", "0", "x", "1:2:3:4", "-1", "1-", "-1:00", "1 h", "1-1:1:1:1"}) {
    EXPECT_THROW(time_limit_seconds(bad), Error) << bad;
  }
}

TEST(Places, ranks_spread_evenly_over_nodes_with_enough_gpus) {
  LaunchJob job;
  job.ranks = 8;
  job.nodes = 2;
  EXPECT_NO_THROW(check_places(job));
  job.gpus_per_node = 3;
  EXPECT_THROW(check_places(job), Error);
  job.gpus_per_node = 4;
  EXPECT_NO_THROW(check_places(job));
  job.nodes = 3;
  EXPECT_THROW(check_places(job), Error);
}

/// A document read by yaml-cpp, as ours: every scalar text.
void expect_same(const YAML::Node& node, const Json& json) {
  if (json.is_object()) {
    ASSERT_TRUE(node.IsMap());
    ASSERT_EQ(node.size(), json.size());
    for (const auto& [key, value] : json.items()) expect_same(node[key], value);
  } else if (json.is_array()) {
    ASSERT_TRUE(node.IsSequence());
    ASSERT_EQ(node.size(), json.size());
    for (std::size_t i = 0; i < json.size(); ++i) expect_same(node[i], json[i]);
  } else if (json.is_string()) {
    ASSERT_TRUE(node.IsScalar());
    EXPECT_EQ(node.Scalar(), json.get<std::string>());
    // "!" marks a quoted one; a plain one must not read as something else.
    if (node.Tag() != "!") {
      const std::string plain = node.Scalar();
      bool boolean = false;
      double number = 0;
      EXPECT_FALSE(YAML::convert<bool>::decode(node, boolean)) << plain;
      EXPECT_FALSE(YAML::convert<double>::decode(node, number)) << plain;
      EXPECT_FALSE(node.IsNull());
    }
  } else if (json.is_boolean()) {
    EXPECT_EQ(node.as<bool>(), json.get<bool>());
  } else {
    EXPECT_EQ(node.as<double>(), json.get<double>());
  }
}

TEST(YamlDocument, reads_back_as_it_was) {
  Json texts = Json::array({"plain",
                            "",
                            " ",
                            "yes",
                            "no",
                            "null",
                            "~",
                            "0755",
                            "1e3",
                            "1:30",
                            "-",
                            "- a",
                            "a: b",
                            "a #b",
                            "#a",
                            "'",
                            "\"",
                            "\\n",
                            "a\nb\n",
                            "a\nb",
                            "a\n\nb\n",
                            "  a\nb\n",
                            "a\n",
                            "\n",
                            "a \nb\n",
                            "\ta",
                            "a\tb\nc\n",
                            "{x}",
                            "[1]",
                            "&a",
                            "*a",
                            "!t",
                            "%d",
                            "@x",
                            "`x`",
                            "|",
                            ">",
                            "?",
                            "caf\xc3\xa9",
                            "\xe6\x97\xa5",
                            "a\x01z",
                            "true",
                            "On",
                            "2026-11-24",
                            "--resume",
                            "key=[a, b]",
                            "#!/bin/sh\necho 'x: y' # z\n"});
  const Json document = {
      {"texts", texts}, {"number", 29500},         {"flag", true},
      {"one", {75}},    {"empty", Json::object()}, {"deep", {{"a b", {{"c: d", {1, 2}}}}}}};
  expect_same(YAML::Load(yaml_document(document)), document);
}

TEST(YamlDocument, reads_back_random_texts) {
  constexpr std::string_view kLetters = "ab:#- \n'\"{}[]&*!|>%@`,?\\\t01~.$";
  std::uint64_t state = 7;
  const auto next = [&] {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<std::size_t>(state >> 33U);
  };
  for (int round = 0; round < 5000; ++round) {
    std::string text;
    for (std::size_t length = next() % 12; length > 0; --length) {
      text += kLetters[next() % kLetters.size()];
    }
    const Json document = {{"map", {{"key", text}}}, {"list", Json::array({text, "x"})}};
    ASSERT_NO_FATAL_FAILURE(expect_same(YAML::Load(yaml_document(document)), document)) << text;
  }
}

TEST(Client, says_what_to_install_and_what_it_was_told) {
  EXPECT_EQ(client_output({"/bin/sh", "-c", "echo out; echo err >&2"}), "out\n");
  const ClientOutcome outcome = run_client({"/bin/sh", "-c", "echo err >&2; exit 3"});
  EXPECT_EQ(outcome.code, 3);
  EXPECT_EQ(outcome.err, "err\n");
  try {
    client_output({"/bin/sh", "-c", "echo no such partition >&2; exit 1"});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::device);
    EXPECT_EQ(error.parts().what, "/bin/sh failed with exit code 1: no such partition");
  }
  try {
    run_client({"sbatch-that-is-not-here"});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::device);
    EXPECT_NE(error.parts().mend.find("slurm-client"), std::string::npos);
  }
}

TEST(Client, output_larger_than_a_pipe_arrives_whole) {
  const std::string out = client_output({"/bin/sh", "-c",
                                         "i=0; while [ $i -lt 20000 ]; do echo 0123456789; "
                                         "echo 0123456789 >&2; i=$((i+1)); done"});
  EXPECT_EQ(out.size(), 220'000U);
}

}  // namespace
}  // namespace tailor
