#include "tools/launch/yaml_out.h"

#include <yaml-cpp/emitter.h>

#include <algorithm>

#include "recipes/yaml.h"

namespace tailor {
namespace {

/// Whether a literal block gives `text` back to the byte: lines of printable ASCII, one newline at
/// the end, no line of spaces or with spaces in front of the first.
bool literal_is_exact(const std::string& text) {
  if (text.size() < 2 || text.back() != '\n' || text[text.size() - 2] == '\n') return false;
  if (text.front() == ' ' || text.front() == '\n') return false;
  if (text.find('\n') == text.size() - 1) return false;  // one line
  return text.find(" \n") == std::string::npos &&
         std::all_of(text.begin(), text.end(), [](char letter) {
           return letter == '\n' || (letter >= ' ' && letter <= '~');
         });
}

void emit_text(YAML::Emitter& out, const std::string& text) {
  if (literal_is_exact(text)) {
    out << YAML::Literal << text;
  } else if (yaml_text(text) == text) {
    out << text;
  } else {
    out << YAML::DoubleQuoted << text;
  }
}

void emit(YAML::Emitter& out, const Json& node) {
  switch (node.type()) {
    case Json::value_t::object:
      if (node.empty()) out << YAML::Flow;
      out << YAML::BeginMap;
      for (const auto& [key, value] : node.items()) {
        out << YAML::Key;
        emit_text(out, key);
        out << YAML::Value;
        emit(out, value);
      }
      out << YAML::EndMap;
      break;
    case Json::value_t::array: {
      const bool numbers =
          std::all_of(node.begin(), node.end(), [](const Json& item) { return item.is_number(); });
      if (numbers) out << YAML::Flow;
      out << YAML::BeginSeq;
      for (const Json& item : node) emit(out, item);
      out << YAML::EndSeq;
      break;
    }
    case Json::value_t::string:
      emit_text(out, node.get_ref<const std::string&>());
      break;
    case Json::value_t::boolean:
      out << node.get<bool>();
      break;
    case Json::value_t::null:
      out << YAML::Null;
      break;
    default:
      out << node.dump();
  }
}

}  // namespace

std::string yaml_document(const Json& document) {
  YAML::Emitter out;
  emit(out, document);
  return std::string(out.c_str()) + "\n";
}

}  // namespace tailor
