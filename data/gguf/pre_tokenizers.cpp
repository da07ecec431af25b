#include "data/gguf/pre_tokenizers.h"

#include <array>
#include <vector>

namespace tailor {
namespace {

using nlohmann::json;

// As the tokenizer.json files of Llama 3, Qwen 2, Llama 4 (and GPT-4o) and DeepSeek V3 have them.
constexpr const char* kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kGpt4o =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kDigits3 = R"(\p{N}{1,3})";
constexpr const char* kHan = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+";
constexpr const char* kDeepSeek =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

json split_by(const char* expression) {
  return {{"type", "Split"},
          {"pattern", {{"Regex", expression}}},
          {"behavior", "Isolated"},
          {"invert", false}};
}
json byte_level(bool regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", regex}};
}
json sequence(std::vector<json> parts) {
  return {{"type", "Sequence"}, {"pretokenizers", std::move(parts)}};
}

/// The first name of a kind is the one that is written.
struct Kind {
  std::vector<std::string_view> names;
  GgufPreTokenizer is;
};
const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = {
      {{"llama-bpe", "llama3", "llama-v3"},
       {sequence({split_by(kLlama3), byte_level(false)}), true, false}},
      {{"qwen2", "deepseek-r1-qwen"},
       {sequence({split_by(kQwen2), byte_level(false)}), false, true}},
      {{"llama4", "gpt-4o"}, {sequence({split_by(kGpt4o), byte_level(false)}), false, false}},
      {{"deepseek-v3"},
       {sequence({split_by(kDigits3), split_by(kHan), split_by(kDeepSeek), byte_level(false)}),
        false, false}},
      {{"smollm"},
       {sequence({{{"type", "Digits"}, {"individual_digits", true}}, byte_level(true)}), false,
        false}},
      {{"gpt-2"}, {byte_level(true), false, false}},
  };
  return all;
}

/// Carriage returns and line feeds are written as such in some files, escaped in others.
std::string escaped(const std::string& expression) {
  std::string out;
  for (const char c : expression) {
    if (c == '\r') {
      out += "\\r";
    } else if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out;
}

/// Appends what a pre-tokenizer does, part by part, in words that are equal where it is equal;
/// false where a part is not understood.
bool describe(const json& part, std::vector<std::string>& out, int depth = 0) {
  if (!part.is_object() || depth > 4) return false;
  const auto text = [&](const char* key) {
    const auto found = part.find(key);
    return found != part.end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  const auto flag = [&](const char* key, bool fallback) {
    const auto found = part.find(key);
    return found != part.end() && found->is_boolean() ? found->get<bool>() : fallback;
  };
  const std::string type = text("type");
  if (type == "Sequence") {
    const auto parts = part.find("pretokenizers");
    if (parts == part.end() || !parts->is_array()) return false;
    for (const json& each : *parts) {
      if (!describe(each, out, depth + 1)) return false;
    }
    return true;
  }
  if (type == "Split") {
    const auto pattern = part.find("pattern");
    if (pattern == part.end() || !pattern->is_object() || !pattern->contains("Regex") ||
        !(*pattern)["Regex"].is_string() || flag("invert", false)) {
      return false;
    }
    out.push_back("split " + text("behavior") + " " +
                  escaped((*pattern)["Regex"].get<std::string>()));
    return true;
  }
  if (type == "Digits") {
    out.push_back(flag("individual_digits", false) ? "digit" : "digits");
    return true;
  }
  if (type == "ByteLevel" && !flag("add_prefix_space", true)) {
    out.push_back(flag("use_regex", true) ? "bytes of words" : "bytes");
    return true;
  }
  return false;
}

}  // namespace

std::string_view gguf_pre_tokenizer_name(const json& pre_tokenizer) {
  std::vector<std::string> parts;
  if (!describe(pre_tokenizer, parts)) return {};
  for (const Kind& kind : kinds()) {
    std::vector<std::string> theirs;
    if (describe(kind.is.pre_tokenizer, theirs) && theirs == parts) return kind.names.front();
  }
  return {};
}

GgufPreTokenizer gguf_pre_tokenizer(std::string_view name) {
  for (const Kind& kind : kinds()) {
    for (const std::string_view each : kind.names) {
      if (each == name) return kind.is;
    }
  }
  return {};
}

}  // namespace tailor
