#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/file.h"
#include "data/text/chat_template.h"
#include "data/text/conversation.h"

namespace tailor {

/// The shapes of a JSONL line (data.format).
enum class RecordFormat {
  automatic,          ///< decided by the first line's keys, then fixed for the file
  messages,           ///< {"messages": [{"role", "content"}]}
  sharegpt,           ///< {"conversations": [{"from", "value"}]}
  prompt_completion,  ///< {"prompt": text or messages, "completion": text or messages}
  alpaca,             ///< {"instruction", "input", "output"}
  text,               ///< {"text"}
  tokenized,          ///< {"input_ids", "labels"}
};
/// "auto", "messages", ...; throws Error{usage} for another name.
RecordFormat record_format_from_name(const std::string& name);
std::string_view record_format_name(RecordFormat format);

struct PlainText {
  std::string text;
};
struct PromptCompletion {
  std::string prompt, completion;
};

/// One line of a data file. alpaca and sharegpt lines arrive as conversations.
struct Record {
  std::int64_t line = 0;  ///< 1-based
  std::string where;      ///< "file:line"
  std::variant<Conversation, PlainText, PromptCompletion, TokenDocument> content;
};

/// Reads a JSONL file line by line; memory holds one line at a time. Blank lines are skipped.
/// Throws Error{bad_file} naming file:line and the key for anything that is not as it should be,
/// for text that is not UTF-8, and for a file without a single record.
class RecordReader {
 public:
  /// `vocab_size` bounds the ids of tokenized lines; 0: not checked.
  RecordReader(const fs::path& path, RecordFormat format, std::int32_t vocab_size);
  ~RecordReader();
  RecordReader(const RecordReader&) = delete;
  RecordReader& operator=(const RecordReader&) = delete;

  std::optional<Record> next();
  /// What `automatic` turned out to be, after the first record.
  RecordFormat format() const;
  std::int64_t bytes_read() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// One line as a record. `format` must not be automatic.
Record parse_record(std::string_view line, RecordFormat format, const fs::path& path,
                    std::int64_t line_number, std::int32_t vocab_size);

/// Files that `pattern` (a path, or a glob with * ? [ ]) names, sorted. Throws Error{io} for a
/// missing file and Error{bad_file} for a glob that matches nothing, and for files that are not
/// JSON lines by their name (.pt, .bin, .pkl, .parquet, ...), with what to do instead.
std::vector<fs::path> expand_files(const std::string& pattern);

}  // namespace tailor
