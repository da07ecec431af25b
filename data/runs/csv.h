#pragma once

#include <string>
#include <vector>

namespace tailor {

/// RFC 4180: quoted where needed, CRLF between records.
class Csv {
 public:
  void add(const std::vector<std::string>& fields) {
    for (std::size_t i = 0; i < fields.size(); ++i) {
      if (i != 0) text_ += ',';
      text_ += quoted(fields[i]);
    }
    text_ += "\r\n";
  }
  const std::string& text() const { return text_; }

 private:
  static std::string quoted(const std::string& field) {
    if (field.find_first_of(",\"\r\n") == std::string::npos) return field;
    std::string out = "\"";
    for (const char c : field) {
      if (c == '"') out += '"';
      out += c;
    }
    return out + "\"";
  }
  std::string text_;
};

}  // namespace tailor
