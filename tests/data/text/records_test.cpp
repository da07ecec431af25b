#include "data/text/records.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "base/error.h"

namespace tailor {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class Records : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("tailor_records_" + std::to_string(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path write(const std::string& text, const std::string& name = "data.jsonl") const {
    std::ofstream(folder_ / name, std::ios::binary) << text;
    return folder_ / name;
  }
  std::vector<Record> read(const std::string& text,
                           RecordFormat format = RecordFormat::automatic) const {
    RecordReader reader(write(text), format, 1000);
    std::vector<Record> out;
    while (auto record = reader.next()) out.push_back(std::move(*record));
    return out;
  }
  /// "what | where" of the refusal, the folder's name taken out.
  std::string refusal(const std::string& text,
                      RecordFormat format = RecordFormat::automatic) const {
    try {
      read(text, format);
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::bad_file) << text;
      EXPECT_FALSE(error.parts().mend.empty());
      std::string where = error.parts().where;
      const std::string folder = folder_.string() + "/";
      if (where.starts_with(folder)) where = where.substr(folder.size());
      return error.parts().what + " | " + where;
    }
    return "read";
  }
  fs::path folder_;
};

const Conversation& talk(const Record& record) { return std::get<Conversation>(record.content); }

TEST_F(Records, messages_keep_their_fields_and_overrides) {
  const auto records = read(
      "\xEF\xBB\xBF{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": "
      "\"assistant\", \"content\": "
      "\"b\", \"train\": false}, {\"role\": \"assistant\", \"content\": \"c\", \"weight\": 1, "
      "\"name\": \"x\"}], "
      "\"id\": 7}\r\n\n  \n{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"text\", "
      "\"text\": "
      "\"p\"}, {\"type\": \"text\", \"text\": \"q\"}]}]}");
  ASSERT_EQ(records.size(), 2U);
  const Conversation& first = talk(records[0]);
  EXPECT_EQ(first.where, (folder_ / "data.jsonl").string() + ":1");
  EXPECT_EQ(first.messages[0].train, std::nullopt);
  EXPECT_EQ(first.messages[1].train, false);
  EXPECT_EQ(first.messages[2].train, true);
  EXPECT_EQ(first.messages[2].fields,
            (Json{{"role", "assistant"}, {"content", "c"}, {"name", "x"}}));
  EXPECT_EQ(records[1].line, 4);
  EXPECT_EQ(talk(records[1]).messages[0].fields["content"], "pq");
}

TEST_F(Records, every_format_is_recognised) {
  const auto share = read(
      R"({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})");
  EXPECT_EQ(talk(share[0]).messages[0].role, "user");
  EXPECT_EQ(talk(share[0]).messages[1].fields["content"], "b");
  const auto alpaca =
      read(R"({"instruction": "do", "input": "it", "output": "done", "history": [["q", "r"]]})");
  EXPECT_EQ(talk(alpaca[0]).messages.size(), 4U);
  EXPECT_EQ(talk(alpaca[0]).messages[2].fields["content"], "do\n\nit");
  const auto pair = read(R"({"prompt": "p", "completion": "c"})");
  EXPECT_EQ(std::get<PromptCompletion>(pair[0].content).completion, "c");
  const auto chat = read(
      R"({"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]})");
  EXPECT_EQ(talk(chat[0]).messages[0].train, false);
  EXPECT_EQ(talk(chat[0]).messages[1].train, std::nullopt);
  EXPECT_EQ(std::get<PlainText>(read(R"({"text": "t"})")[0].content).text, "t");
  const auto tokens = read(
      R"({"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]})");
  EXPECT_THAT(std::get<TokenDocument>(tokens[0].content).ids, ElementsAre(5, 6, 7));
  EXPECT_THAT(std::get<TokenDocument>(tokens[0].content).trained, ElementsAre(0, 1, 1));
  EXPECT_THAT(std::get<TokenDocument>(read(R"({"input_ids": [5, 6]})")[0].content).trained,
              ElementsAre(1, 1));
}

TEST_F(Records, refusals_name_line_and_key) {
  EXPECT_EQ(refusal(""), "the data file holds no records | data.jsonl");
  EXPECT_EQ(refusal(" \n\n"), "the data file holds no records | data.jsonl");
  EXPECT_THAT(refusal("{\"text\": \"a\"}\n{\"text\": "), HasSubstr("not valid JSON"));
  EXPECT_THAT(refusal("{\"text\": \"a\"}\n{\"text\": x}"), HasSubstr("| data.jsonl:2:10"));
  EXPECT_EQ(refusal("{\"text\": \"\xFF\"}"), "the line is not UTF-8 | data.jsonl:1");
  EXPECT_EQ(refusal("[1, 2]"), "a JSON object is needed on each line, found a list | data.jsonl:1");
  EXPECT_EQ(refusal("3"), "a JSON object is needed on each line, found number | data.jsonl:1");
  EXPECT_EQ(refusal(R"({"body": 1})"),
            "cannot tell the data's format by its keys 'body' | data.jsonl:1");
  EXPECT_EQ(refusal(R"({"messages": []})"), "'messages' is empty | data.jsonl:1 (messages)");
  EXPECT_EQ(refusal(R"({"messages": "a"})"),
            "'messages' must be a list, found string | data.jsonl:1 (messages)");
  EXPECT_EQ(refusal(R"({"messages": [{"role": 1}]})"),
            "a message needs a 'role' that is text | data.jsonl:1 (messages[0].role)");
  EXPECT_EQ(refusal(R"({"messages": [{"role": "asistant", "content": "a"}]})"),
            "unknown role 'asistant' | data.jsonl:1 (messages[0].role)");
  EXPECT_EQ(refusal(R"({"messages": [{"role": "user", "content": 3}]})"),
            "'content' must be text, found number | data.jsonl:1 (messages[0].content)");
  EXPECT_EQ(refusal(R"({"messages": [{"role": "user", "content": "a", "weight": 0.5}]})"),
            "'weight' of a message must be 0 or 1, found 0.5 | data.jsonl:1 (messages[0].weight)");
  EXPECT_THAT(refusal(R"({"messages": [{"role": "user", "content": [{"type": "image"}]}]})"),
              HasSubstr("only text content can be trained on"));
  EXPECT_EQ(refusal(R"({"text": "a"}
{"messages": []})"),
            "'text' is missing | data.jsonl:2 (text)");
  EXPECT_EQ(refusal(R"({"input_ids": [1, 1000]})"),
            "token id 1000 is not in 0..999 | data.jsonl:1 (input_ids[1])");
  EXPECT_EQ(refusal(R"({"input_ids": [1, -1]})"),
            "token id -1 is not in 0..999 | data.jsonl:1 (input_ids[1])");
  EXPECT_EQ(refusal(R"({"input_ids": [1, 2.5]})"),
            "'input_ids[1]' must be an integer, found number | data.jsonl:1 (input_ids[1])");
  EXPECT_EQ(refusal(R"({"input_ids": [1, 18446744073709551615]})"),
            "token id 18446744073709551615 is not in 0..999 | data.jsonl:1 (input_ids[1])");
  EXPECT_EQ(refusal(R"({"input_ids": []})"), "'input_ids' is empty | data.jsonl:1 (input_ids)");
  EXPECT_EQ(refusal(R"({"input_ids": [1, 2], "labels": [1]})"),
            "'labels' has 1 entries, 'input_ids' has 2 | data.jsonl:1 (labels)");
  EXPECT_EQ(refusal(R"({"input_ids": [1, 2], "labels": [2, -100]})"),
            "label 2 differs from its token id 1 | data.jsonl:1 (labels[0])");
  EXPECT_THAT(refusal("{\"text\": " + std::string(1000, '[') + "}"), HasSubstr("deeper than 200"));
  EXPECT_THAT(refusal(R"({"conversations": [{"from": "narrator", "value": "a"}]})"),
              HasSubstr("unknown speaker"));
}

TEST_F(Records, a_damaged_line_is_read_or_refused_never_worse) {
  const std::string good =
      R"({"messages": [{"role": "user", "content": "a\u00e9"}, {"role": "assistant", "content": "b", "weight": 1}]})";
  for (std::size_t at = 0; at < good.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string line = good;
      line[at] = static_cast<char>(line[at] ^ (1 << bit));
      try {
        parse_record(line, RecordFormat::messages, "x.jsonl", 1, 0);
      } catch (const Error& error) {
        EXPECT_EQ(error.fault(), Fault::bad_file);
      }
    }
    EXPECT_THROW(
        parse_record(std::string_view(good).substr(0, at), RecordFormat::messages, "x.jsonl", 1, 0),
        Error);
  }
}

TEST_F(Records, globs_are_sorted_and_other_files_refused_by_name) {
  write("{}", "b.jsonl");
  write("{}", "a.jsonl");
  EXPECT_THAT(expand_files(folder_.string() + "/*.jsonl"),
              ElementsAre(folder_ / "a.jsonl", folder_ / "b.jsonl"));
  EXPECT_THROW(expand_files(folder_.string() + "/*.nothing"), Error);
  EXPECT_THROW(expand_files(folder_.string() + "/none.jsonl"), Error);
  EXPECT_THROW(expand_files(folder_.string()), Error);
  for (const char* name : {"model.pt", "data.pkl", "data.parquet", "data.h5"}) {
    write("x", name);
    try {
      expand_files((folder_ / name).string());
      FAIL() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::bad_file);
      EXPECT_THAT(error.parts().mend, HasSubstr("to_json"));
    }
  }
}

TEST(RecordFormats, names_go_both_ways_and_misspellings_get_a_hint) {
  EXPECT_EQ(record_format_from_name("auto"), RecordFormat::automatic);
  EXPECT_EQ(record_format_name(RecordFormat::prompt_completion), "prompt_completion");
  try {
    record_format_from_name("mesages");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::usage);
    EXPECT_EQ(error.parts().mend, "Did you mean 'messages'?");
  }
}

}  // namespace
}  // namespace tailor
