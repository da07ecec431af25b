#include "data/text/records.h"

#include <glob.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <fstream>
#include <utility>

#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

constexpr std::array<std::pair<RecordFormat, std::string_view>, 7> kFormats = {{
    {RecordFormat::automatic, "auto"},
    {RecordFormat::messages, "messages"},
    {RecordFormat::sharegpt, "sharegpt"},
    {RecordFormat::prompt_completion, "prompt_completion"},
    {RecordFormat::alpaca, "alpaca"},
    {RecordFormat::text, "text"},
    {RecordFormat::tokenized, "tokenized"},
}};

const std::vector<std::string>& known_roles() {
  static const std::vector<std::string> roles = {"system", "developer", "user",     "assistant",
                                                 "tool",   "ipython",   "function", "observation"};
  return roles;
}

/// A line's object with its place, and refusals that name both.
class Line {
 public:
  Line(const Json& object, std::string where) : reader_(object, where), object_(object) {}

  [[noreturn]] void refuse(const std::string& what, const std::string& key = {},
                           const std::string& mend = "Repair this line of the data file.") const {
    throw Error(Fault::bad_file, {what, where() + (key.empty() ? "" : " (" + key + ")"), mend});
  }
  const std::string& where() const { return reader_.where(); }
  const Json& object() const { return object_; }
  bool has(std::string_view key) const { return reader_.has(key); }

  const Json& list(const std::string& key) const {
    if (!has(key)) refuse("'" + key + "' is missing", key);
    const Json& value = reader_.at(key);
    if (!value.is_array()) refuse(found(key, value, "a list"), key);
    if (value.empty()) refuse("'" + key + "' is empty", key);
    return value;
  }
  std::string text(const std::string& key) const {
    if (!has(key)) refuse("'" + key + "' is missing", key);
    const Json& value = reader_.at(key);
    if (!value.is_string()) refuse(found(key, value, "text"), key);
    return value.get<std::string>();
  }
  std::string text_or_empty(const std::string& key) const {
    return has(key) ? text(key) : std::string();
  }
  static std::string found(const std::string& key, const Json& value, const std::string& needed) {
    return "'" + key + "' must be " + needed + ", found " + std::string(value.type_name());
  }

 private:
  JsonReader reader_;
  const Json& object_;
};

Message plain_message(const std::string& role, const std::string& content) {
  Message message;
  message.role = role;
  message.fields = Json{{"role", role}, {"content", content}};
  return message;
}

/// [{"type": "text", "text": "a"}, ...] as one text: Tailor trains the language part only.
std::string joined_parts(const Line& line, const Json& parts, const std::string& key) {
  std::string out;
  for (const Json& part : parts) {
    const bool is_text = part.is_object() && part.value("type", Json()) == "text" &&
                         part.contains("text") && part["text"].is_string();
    if (!is_text) {
      line.refuse("only text content can be trained on, found " + part.dump().substr(0, 80), key,
                  "Take pictures, sound and other parts out of the messages.");
    }
    out += part["text"].get_ref<const std::string&>();
  }
  return out;
}

std::vector<Message> read_messages(const Line& line, const std::string& key) {
  std::vector<Message> out;
  const Json& list = line.list(key);
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::string here = key + "[" + std::to_string(i) + "]";
    const Json& entry = list[i];
    if (!entry.is_object()) line.refuse(Line::found(here, entry, "an object"), here);
    Message message;
    message.fields = entry;
    const auto role = entry.find("role");
    if (role == entry.end() || !role->is_string()) {
      line.refuse("a message needs a 'role' that is text", here + ".role");
    }
    message.role = role->get<std::string>();
    const auto& roles = known_roles();
    if (std::find(roles.begin(), roles.end(), message.role) == roles.end()) {
      const std::string near = nearest_name(message.role, roles);
      line.refuse(
          "unknown role '" + message.role.substr(0, 80) + "'", here + ".role",
          (near.empty() ? "Use one of: " + join(roles, ", ") : "Did you mean '" + near + "'?") +
              std::string(near.empty() ? "." : ""));
    }
    const auto content = entry.find("content");
    const bool has_calls = entry.contains("tool_calls") && entry["tool_calls"].is_array();
    if (content == entry.end() || content->is_null()) {
      if (!has_calls) line.refuse("a message needs a 'content' that is text", here + ".content");
    } else if (content->is_array()) {
      message.fields["content"] = joined_parts(line, *content, here + ".content");
    } else if (!content->is_string()) {
      line.refuse(Line::found("content", *content, "text"), here + ".content");
    }
    if (const auto train = entry.find("train"); train != entry.end()) {
      if (!train->is_boolean())
        line.refuse(Line::found("train", *train, "true or false"), here + ".train");
      message.train = train->get<bool>();
      message.fields.erase("train");
    }
    if (const auto weight = entry.find("weight"); weight != entry.end()) {
      if (!weight->is_number() || (*weight != 0 && *weight != 1)) {
        line.refuse("'weight' of a message must be 0 or 1, found " + weight->dump().substr(0, 40),
                    here + ".weight");
      }
      if (!message.train) message.train = *weight == 1;
      message.fields.erase("weight");
    }
    out.push_back(std::move(message));
  }
  return out;
}

Conversation read_sharegpt(const Line& line) {
  static const std::array<std::pair<std::string_view, const char*>, 11> kRoles = {{
      {"human", "user"},
      {"user", "user"},
      {"gpt", "assistant"},
      {"assistant", "assistant"},
      {"chatgpt", "assistant"},
      {"bing", "assistant"},
      {"bard", "assistant"},
      {"system", "system"},
      {"tool", "tool"},
      {"observation", "tool"},
      {"function_response", "tool"},
  }};
  Conversation out;
  if (line.has("system") && !line.text("system").empty()) {
    out.messages.push_back(plain_message("system", line.text("system")));
  }
  const Json& list = line.list("conversations");
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::string here = "conversations[" + std::to_string(i) + "]";
    const Json& entry = list[i];
    if (!entry.is_object() || !entry.contains("from") || !entry["from"].is_string() ||
        !entry.contains("value") || !entry["value"].is_string()) {
      line.refuse("a turn needs 'from' and 'value' that are text", here);
    }
    const auto from = entry["from"].get<std::string>();
    const auto* const role = std::find_if(kRoles.begin(), kRoles.end(),
                                          [&](const auto& known) { return known.first == from; });
    if (role == kRoles.end()) {
      line.refuse("unknown speaker '" + from.substr(0, 80) + "'", here + ".from",
                  "Use one of: human, gpt, system, tool; or write the row in messages format.");
    }
    Message message = plain_message(role->second, entry["value"].get<std::string>());
    if (const auto weight = entry.find("weight"); weight != entry.end()) {
      if (!weight->is_number() || (*weight != 0 && *weight != 1)) {
        line.refuse("'weight' of a turn must be 0 or 1", here + ".weight");
      }
      message.train = *weight == 1;
    }
    out.messages.push_back(std::move(message));
  }
  return out;
}

Conversation read_alpaca(const Line& line) {
  Conversation out;
  if (const std::string system = line.text_or_empty("system"); !system.empty()) {
    out.messages.push_back(plain_message("system", system));
  }
  if (line.has("history")) {
    const Json& history = line.object()["history"];
    if (!history.is_array()) line.refuse(Line::found("history", history, "a list"), "history");
    for (const Json& pair : history) {
      if (!pair.is_array() || pair.size() != 2 || !pair[0].is_string() || !pair[1].is_string()) {
        line.refuse("'history' must hold pairs of texts: [question, answer]", "history");
      }
      out.messages.push_back(plain_message("user", pair[0].get<std::string>()));
      out.messages.push_back(plain_message("assistant", pair[1].get<std::string>()));
    }
  }
  const std::string input = line.text_or_empty("input");
  out.messages.push_back(
      plain_message("user", line.text("instruction") + (input.empty() ? "" : "\n\n" + input)));
  out.messages.push_back(plain_message("assistant", line.text("output")));
  return out;
}

TokenDocument read_tokenized(const Line& line, std::int32_t vocab_size) {
  constexpr std::int64_t kNoLoss = -100;
  TokenDocument out;
  const Json& ids = line.list("input_ids");
  const std::int64_t limit = vocab_size > 0 ? vocab_size : std::int64_t{1} << 30;
  out.ids.reserve(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const Json& id = ids[i];
    const std::string here = "input_ids[" + std::to_string(i) + "]";
    if (!id.is_number_integer()) line.refuse(Line::found(here, id, "an integer"), here);
    if (id < 0 || id >= limit) {
      line.refuse("token id " + id.dump() + " is not in 0.." + std::to_string(limit - 1), here,
                  "Tokenise the data with this model's own tokenizer.");
    }
    out.ids.push_back(id.get<std::int32_t>());
  }
  out.trained.assign(out.ids.size(), 1);
  if (line.has("labels")) {
    const Json& labels = line.list("labels");
    if (labels.size() != ids.size()) {
      line.refuse("'labels' has " + std::to_string(labels.size()) + " entries, 'input_ids' has " +
                      std::to_string(ids.size()),
                  "labels", "Labels stand unshifted, one for each id, -100 for no loss.");
    }
    for (std::size_t i = 0; i < labels.size(); ++i) {
      const Json& label = labels[i];
      const std::string here = "labels[" + std::to_string(i) + "]";
      if (!label.is_number_integer()) line.refuse(Line::found(here, label, "an integer"), here);
      if (label == kNoLoss) {
        out.trained[i] = 0;
      } else if (label != ids[i]) {
        line.refuse("label " + label.dump() + " differs from its token id " + ids[i].dump(), here,
                    "Labels stand unshifted: each is its own token's id, or -100 for no loss.");
      }
    }
  }
  if (line.has("attention_mask")) {  // right padding is taken off
    const Json& mask = line.list("attention_mask");
    if (mask.size() != ids.size()) {
      line.refuse("'attention_mask' and 'input_ids' must be equally long", "attention_mask");
    }
    std::size_t kept = mask.size();
    while (kept > 0 && mask[kept - 1] == 0) --kept;
    for (std::size_t i = 0; i < kept; ++i) {
      if (mask[i] != 1) {
        line.refuse("'attention_mask' must be ones, then zeros for padding on the right",
                    "attention_mask[" + std::to_string(i) + "]");
      }
    }
    out.ids.resize(kept);
    out.trained.resize(kept);
    if (kept == 0) line.refuse("the row is padding only", "attention_mask");
  }
  return out;
}

RecordFormat detect(const Json& object, const std::string& where) {
  const auto has = [&](const char* key) { return object.contains(key); };
  if (has("input_ids")) return RecordFormat::tokenized;
  if (has("messages")) return RecordFormat::messages;
  if (has("conversations")) return RecordFormat::sharegpt;
  if (has("prompt") && has("completion")) return RecordFormat::prompt_completion;
  if (has("instruction") && has("output")) return RecordFormat::alpaca;
  if (has("text")) return RecordFormat::text;
  std::vector<std::string> keys;
  for (const auto& [key, value] : object.items()) {
    if (keys.size() < 8) keys.push_back("'" + key.substr(0, 40) + "'");
  }
  throw Error(
      Fault::bad_file,
      {"cannot tell the data's format by its keys " + join(keys, ", "), where,
       "Use one of: messages; conversations; prompt and completion; instruction and output; "
       "text; input_ids."});
}

Json parse_line(std::string_view text, const std::string& where) {
  if (!is_utf8(text)) {
    throw Error(Fault::bad_file, {"the line is not UTF-8", where,
                                  "Convert the file, for instance with iconv -t utf-8."});
  }
  if (const std::string_view start = trim(text); !start.empty() && start.front() == '[') {
    throw Error(Fault::bad_file,
                {"a JSON object is needed on each line, found a list", where,
                 "Write JSON lines, for instance with: jq -c '.[]' FILE > FILE.jsonl"});
  }
  try {
    Json object = parse_json(text, where);
    if (!object.is_object()) {
      throw Error(Fault::bad_file,
                  {"a JSON object is needed on each line, found " + std::string(object.type_name()),
                   where, "Repair this line of the data file."});
    }
    return object;
  } catch (const Error& error) {  // "file:7:1:12" -> "file:7:12": a record is one line
    Error::Parts parts = error.parts();
    const std::string prefix = where + ":1:";
    if (parts.where.starts_with(prefix))
      parts.where = where + ":" + parts.where.substr(prefix.size());
    throw Error(error.fault(), std::move(parts));
  }
}

Record to_record(const Json& object, RecordFormat format, const std::string& where,
                 std::int64_t line_number, std::int32_t vocab_size) {
  const Line line(object, where);
  Record record;
  record.line = line_number;
  record.where = where;
  const auto keep = [&](Conversation conversation) {
    conversation.where = where;
    if (line.has("tools")) conversation.tools = object["tools"];
    record.content = std::move(conversation);
  };
  switch (format) {
    case RecordFormat::messages:
      keep({read_messages(line, "messages"), {}, {}});
      break;
    case RecordFormat::sharegpt:
      keep(read_sharegpt(line));
      break;
    case RecordFormat::alpaca:
      keep(read_alpaca(line));
      break;
    case RecordFormat::prompt_completion:
      if (line.has("prompt") && object["prompt"].is_array()) {
        Conversation conversation{read_messages(line, "prompt"), {}, {}};
        for (Message& message : conversation.messages) {
          if (!message.train) message.train = false;  // the completion is what is learnt
        }
        for (Message& message : read_messages(line, "completion")) {
          conversation.messages.push_back(std::move(message));
        }
        keep(std::move(conversation));
      } else {
        record.content = PromptCompletion{line.text("prompt"), line.text("completion")};
      }
      break;
    case RecordFormat::text:
      record.content = PlainText{line.text("text")};
      break;
    case RecordFormat::tokenized:
      record.content = read_tokenized(line, vocab_size);
      break;
    case RecordFormat::automatic:
      TAILOR_CHECK(false, "the format must be known here");
  }
  return record;
}

}  // namespace

RecordFormat record_format_from_name(const std::string& name) {
  std::vector<std::string> names;
  for (const auto& [format, known] : kFormats) {
    if (known == name) return format;
    names.emplace_back(known);
  }
  const std::string near = nearest_name(name, names);
  throw Error(Fault::usage, {"unknown data format '" + name + "'", "data.format",
                             near.empty() ? "Use one of: " + join(names, ", ") + "."
                                          : "Did you mean '" + near + "'?"});
}

std::string_view record_format_name(RecordFormat format) {
  for (const auto& [known, name] : kFormats) {
    if (known == format) return name;
  }
  return "?";
}

Record parse_record(std::string_view line, RecordFormat format, const fs::path& path,
                    std::int64_t line_number, std::int32_t vocab_size) {
  const std::string where = path.string() + ":" + std::to_string(line_number);
  return to_record(parse_line(line, where), format, where, line_number, vocab_size);
}

struct RecordReader::State {
  fs::path path;
  RecordFormat format;
  std::int32_t vocab_size;
  std::ifstream file;
  std::int64_t line = 0, records = 0, bytes = 0;
};

RecordReader::RecordReader(const fs::path& path, RecordFormat format, std::int32_t vocab_size)
    : state_(std::make_unique<State>()) {
  state_->path = path;
  state_->format = format;
  state_->vocab_size = vocab_size;
  errno = 0;
  state_->file.open(path, std::ios::binary);
  if (!state_->file)
    throw io_error(errno == 0 ? EIO : errno, "cannot open data file", path.string());
}

RecordReader::~RecordReader() = default;

std::optional<Record> RecordReader::next() {
  std::string text;
  while (std::getline(state_->file, text)) {
    ++state_->line;
    state_->bytes += static_cast<std::int64_t>(text.size()) + 1;
    if (state_->line == 1 && text.starts_with("\xEF\xBB\xBF")) text.erase(0, 3);
    if (trim(text).empty()) continue;
    const std::string where = state_->path.string() + ":" + std::to_string(state_->line);
    const Json object = parse_line(text, where);
    if (state_->format == RecordFormat::automatic) state_->format = detect(object, where);
    ++state_->records;
    return to_record(object, state_->format, where, state_->line, state_->vocab_size);
  }
  if (state_->file.bad()) throw io_error(EIO, "cannot read data file", state_->path.string());
  if (state_->records == 0) {
    throw Error(Fault::bad_file, {"the data file holds no records", state_->path.string(),
                                  "Give a file with one JSON object a line."});
  }
  return std::nullopt;
}

RecordFormat RecordReader::format() const { return state_->format; }
std::int64_t RecordReader::bytes_read() const { return state_->bytes; }

std::vector<fs::path> expand_files(const std::string& pattern) {
  std::vector<fs::path> out;
  if (fs::exists(pattern)) {
    out.emplace_back(pattern);
  } else if (pattern.find_first_of("*?[") != std::string::npos) {
    glob_t found{};
    const int code = ::glob(pattern.c_str(), GLOB_ERR, nullptr, &found);
    for (std::size_t i = 0; code == 0 && i < found.gl_pathc; ++i)
      out.emplace_back(found.gl_pathv[i]);
    ::globfree(&found);
    if (out.empty()) {
      throw Error(Fault::bad_file,
                  {"no file matches the pattern", pattern,
                   "Give the path of a JSON lines file, or a pattern that matches some."});
    }
  } else {
    throw io_error(ENOENT, "cannot open data file", pattern);
  }
  static const std::array<std::pair<std::string_view, std::string_view>, 16> kOthers = {{
      {".pt", "pickle"},
      {".pth", "pickle"},
      {".bin", "pickle"},
      {".pkl", "pickle"},
      {".pickle", "pickle"},
      {".npy", "NumPy"},
      {".npz", "NumPy"},
      {".parquet", "Parquet"},
      {".arrow", "Arrow"},
      {".csv", "CSV"},
      {".tsv", "CSV"},
      {".h5", "HDF5"},
      {".hdf5", "HDF5"},
      {".gz", "compressed"},
      {".zst", "compressed"},
      {".zip", "compressed"},
  }};
  for (const fs::path& path : out) {
    if (!fs::is_regular_file(path)) {
      throw Error(Fault::bad_file, {"not a file", path.string(),
                                    "Name JSON lines files, or a pattern such as DIR/*.jsonl."});
    }
    const std::string extension = lower(path.extension().string());
    for (const auto& [ending, kind] : kOthers) {
      if (extension != ending) continue;
      throw Error(
          Fault::bad_file,
          {"data must be JSON lines, this is a " + std::string(kind) + " file", path.string(),
           kind == "compressed" ? "Unpack it first."
                                : "Convert it, for instance with Python's datasets: "
                                  "load_dataset(...).to_json(\"data.jsonl\")."});
    }
  }
  return out;
}

}  // namespace tailor
