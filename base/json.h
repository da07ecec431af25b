#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/file.h"

namespace tailor {

/// Object keys keep the order they were written in, so that files diff well.
using Json = nlohmann::ordered_json;

/// Parses `text`. Throws Error{bad_file} naming `where`, line and column. Refuses nesting deeper
/// than 200 levels, which no format of ours needs.
Json parse_json(std::string_view text, const std::string& where);
Json read_json(const fs::path& path);

/// Members of an object with their type checked; the error names `where` and the key.
/// Throws Error{bad_file} when the key is missing (without `fallback`) or of another type.
class JsonReader {
 public:
  JsonReader(const Json& object, std::string where);

  bool has(std::string_view key) const;  ///< present and not null
  std::int64_t integer(std::string_view key) const;
  std::int64_t integer(std::string_view key, std::int64_t fallback) const;
  double number(std::string_view key) const;
  double number(std::string_view key, double fallback) const;
  bool boolean(std::string_view key, bool fallback) const;
  std::string text(std::string_view key) const;
  std::string text(std::string_view key, std::string_view fallback) const;
  const Json& at(std::string_view key) const;
  const std::string& where() const noexcept { return where_; }

 private:
  [[noreturn]] void wrong_type(std::string_view key, std::string_view needed) const;
  const Json& object_;
  std::string where_;
};

}  // namespace tailor
