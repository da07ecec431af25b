#include "base/json.h"

#include <utility>

#include "base/error.h"

namespace tailor {
namespace {

constexpr int kDepthMax = 200;

std::pair<int, int> line_and_column(std::string_view text, std::size_t byte) {
  int line = 1;
  int column = 1;
  for (std::size_t i = 0; i + 1 < byte && i < text.size(); ++i) {
    if (text[i] == '\n') {
      ++line;
      column = 1;
    } else {
      ++column;
    }
  }
  return {line, column};
}

/// nlohmann's "[json.exception.parse_error.101] parse error at line 1, column 2: <this part>".
std::string plain_reason(const std::string& message) {
  const std::size_t at = message.find(": ");
  return at == std::string::npos ? message : message.substr(at + 2);
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) {
  const auto too_deep = [&](int depth, Json::parse_event_t, Json&) {
    if (depth > kDepthMax) {
      throw Error(Fault::bad_file,
                  {"JSON is nested deeper than 200 levels", where,
                   "No file Tailor reads is that deep: check where it came from."});
    }
    return true;
  };
  try {
    return Json::parse(text, too_deep);
  } catch (const nlohmann::json::parse_error& error) {
    const auto [line, column] = line_and_column(text, error.byte);
    throw Error(Fault::bad_file, {"not valid JSON: " + plain_reason(error.what()),
                                  where + ":" + std::to_string(line) + ":" + std::to_string(column),
                                  "Repair the file or fetch it again; it may be cut off."});
  } catch (const nlohmann::json::out_of_range& error) {  // 1e999
    const std::string message = error.what();
    throw Error(Fault::bad_file, {"not valid JSON: " + message.substr(message.find(']') + 2), where,
                                  "Repair the file or fetch it again."});
  }
}

Json read_json(const fs::path& path) { return parse_json(read_text(path), path.string()); }

JsonReader::JsonReader(const Json& object, std::string where)
    : object_(object), where_(std::move(where)) {
  if (!object.is_object()) {
    throw Error(Fault::bad_file,
                {"a JSON object is needed here, found " + std::string(object.type_name()), where_,
                 "Repair the file or fetch it again."});
  }
}

bool JsonReader::has(std::string_view key) const {
  const auto found = object_.find(key);
  return found != object_.end() && !found->is_null();
}

const Json& JsonReader::at(std::string_view key) const {
  if (!has(key)) {
    throw Error(Fault::bad_file, {"key '" + std::string(key) + "' is missing", where_,
                                  "Repair the file or fetch it again."});
  }
  return *object_.find(key);
}

std::int64_t JsonReader::integer(std::string_view key) const {
  const Json& value = at(key);
  if (!value.is_number_integer()) wrong_type(key, "an integer");
  return value.get<std::int64_t>();
}

std::int64_t JsonReader::integer(std::string_view key, std::int64_t fallback) const {
  return has(key) ? integer(key) : fallback;
}

double JsonReader::number(std::string_view key) const {
  const Json& value = at(key);
  if (!value.is_number()) wrong_type(key, "a number");
  return value.get<double>();
}

double JsonReader::number(std::string_view key, double fallback) const {
  return has(key) ? number(key) : fallback;
}

bool JsonReader::boolean(std::string_view key, bool fallback) const {
  if (!has(key)) return fallback;
  if (!at(key).is_boolean()) wrong_type(key, "true or false");
  return at(key).get<bool>();
}

std::string JsonReader::text(std::string_view key) const {
  const Json& value = at(key);
  if (!value.is_string()) wrong_type(key, "a string");
  return value.get<std::string>();
}

std::string JsonReader::text(std::string_view key, std::string_view fallback) const {
  return has(key) ? text(key) : std::string(fallback);
}

void JsonReader::wrong_type(std::string_view key, std::string_view needed) const {
  throw Error(Fault::bad_file, {"key '" + std::string(key) + "' must be " + std::string(needed) +
                                    ", found " + object_.find(key)->dump().substr(0, 80),
                                where_, "Repair the file or fetch it again."});
}

}  // namespace tailor
