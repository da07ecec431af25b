#include "data/gguf/vocabulary.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_set>

#include "base/error.h"
#include "base/text.h"
#include "data/gguf/pre_tokenizers.h"

namespace tailor {
namespace {

using nlohmann::json;

/// Kinds of tokens (llama.h, enum llama_token_type).
enum : std::int64_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5 };

[[noreturn]] void refuse(const std::string& what, const std::string& where) {
  throw Error(Fault::usage, {what, where,
                             "llama.cpp would read texts differently with this tokenizer. Serve "
                             "the checkpoint with vLLM, SGLang or transformers instead."});
}

/// llama.cpp's conversion takes tokens written like this for control tokens whatever the file says.
bool looks_special(const std::string& token) {
  const auto between = [&](std::string_view begin, std::string_view end) {
    return token.size() > begin.size() + end.size() && token.starts_with(begin) &&
           token.ends_with(end);
  };
  return between("<|", "|>") || between("<\uff5c", "\uff5c>");
}

std::string merge_text(const json& merge, const std::string& where) {
  if (merge.is_string()) return merge.get<std::string>();
  const bool pair =
      merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string();
  if (!pair || merge[0].get<std::string>().find(' ') != std::string::npos ||
      merge[1].get<std::string>().find(' ') != std::string::npos) {
    refuse("a merge is not a pair of tokens without spaces: " + merge.dump().substr(0, 60), where);
  }
  return merge[0].get<std::string>() + " " + merge[1].get<std::string>();
}

struct TokenList {
  std::vector<std::string> tokens;
  std::vector<std::int64_t> kinds;

  TokenList(std::int64_t vocab, const std::string& where)
      : tokens(static_cast<std::size_t>(vocab)),
        kinds(static_cast<std::size_t>(vocab), kUnused),
        where_(where) {}
  void set(const std::string& token, const json& id, std::int64_t kind) {
    if (!id.is_number_integer() || id.get<std::int64_t>() < 0 ||
        id.get<std::int64_t>() >= static_cast<std::int64_t>(tokens.size())) {
      refuse("token '" + token.substr(0, 60) + "' has the id " + id.dump().substr(0, 30) +
                 ", the model's vocabulary has " + std::to_string(tokens.size()) + " rows",
             where_);
    }
    const auto at = id.get<std::size_t>();
    tokens[at] = token;
    kinds[at] = kind;
  }
  /// Names the gaps, and refuses what llama.cpp stops at.
  void finish() {
    std::unordered_set<std::string_view> seen;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i].empty()) tokens[i] = "[PAD" + std::to_string(i) + "]";
    }
    for (const std::string& token : tokens) {
      if (!seen.insert(token).second) {
        refuse("token '" + token.substr(0, 60) + "' has two ids, which llama.cpp stops at", where_);
      }
    }
  }

 private:
  const std::string& where_;
};

}  // namespace

std::vector<std::pair<std::string, GgufValue>> gguf_vocabulary(const std::string& tokenizer_json,
                                                               const std::string& where,
                                                               std::int64_t vocab,
                                                               const GgufSpecialTokens& special,
                                                               std::vector<std::string>& notes) {
  const json file = json::parse(tokenizer_json, nullptr, false);
  if (!file.is_object() || !file.contains("model") || !file["model"].is_object()) {
    refuse("tokenizer.json holds no model", where);
  }
  const json& model = file["model"];
  const std::string_view name = gguf_pre_tokenizer_name(file.value("pre_tokenizer", json()));
  if (name.empty()) {
    refuse("llama.cpp has no name for the way this tokenizer cuts texts into words (pre_tokenizer)",
           where);
  }
  if (!model.contains("vocab") || !model["vocab"].is_object() || !model.contains("merges") ||
      !model["merges"].is_array()) {
    refuse("the tokenizer is no byte-level BPE", where);
  }
  const GgufPreTokenizer theirs = gguf_pre_tokenizer(name);
  const bool ignore_merges = model.value("ignore_merges", json(false)) == true;
  if (ignore_merges != theirs.ignore_merges) {
    notes.push_back(
        "tokenizer.json has ignore_merges: " + std::string(ignore_merges ? "true" : "false") +
        ", and llama.cpp " + (ignore_merges ? "merges every word" : "looks whole words up first") +
        " for tokenizers of kind " + std::string(name) +
        ": words that merges do not lead to are read differently");
  }
  if (!file.value("normalizer", json()).is_null()) {
    notes.push_back("the tokenizer normalises texts (" +
                    file["normalizer"].value("type", std::string("?")) +
                    "), which llama.cpp does not: give it texts that are in NFC already");
  }
  TokenList list(vocab, where);
  for (const auto& [token, id] : model["vocab"].items()) list.set(token, id, kNormal);
  if (const json added = file.value("added_tokens", json::array()); added.is_array()) {
    for (const json& token : added) {
      if (!token.is_object() || !token.contains("content") || !token["content"].is_string()) {
        refuse("an added token without content", where);
      }
      const auto content = token["content"].get<std::string>();
      const bool control = token.value("special", json(false)) == true || looks_special(content);
      list.set(content, token.value("id", json()), control ? kControl : kUserDefined);
    }
  }
  list.finish();
  std::vector<std::string> merges;
  merges.reserve(model["merges"].size());
  for (const json& merge : model["merges"]) merges.push_back(merge_text(merge, where));

  const std::string prefix = "tokenizer.ggml.";
  std::vector<std::pair<std::string, GgufValue>> out;
  out.emplace_back(prefix + "model", GgufValue::of_text("gpt2"));
  out.emplace_back(prefix + "pre", GgufValue::of_text(std::string(name)));
  out.emplace_back(prefix + "tokens", GgufValue::of_texts(std::move(list.tokens)));
  out.emplace_back(prefix + "token_type", GgufValue::of_i32s(std::move(list.kinds)));
  out.emplace_back(prefix + "merges", GgufValue::of_texts(std::move(merges)));
  for (const auto& [key, id] :
       {std::pair{"bos_token_id", special.bos}, std::pair{"eos_token_id", special.eos},
        std::pair{"eot_token_id", special.end_of_turn}, std::pair{"padding_token_id", special.pad},
        std::pair{"unknown_token_id", special.unk}}) {
    if (id >= 0) out.emplace_back(prefix + key, GgufValue::of_u32(id));
  }
  out.emplace_back(prefix + "add_bos_token", GgufValue::of_bool(special.adds_bos));
  if (!special.chat_template.empty()) {
    out.emplace_back("tokenizer.chat_template", GgufValue::of_text(special.chat_template));
  }
  return out;
}

std::map<std::string, std::string> tokenizer_files_from_gguf(const GgufValues& values,
                                                             std::int64_t vocab) {
  const std::string prefix = "tokenizer.ggml.";
  const std::string model = values.text(prefix + "model", "none");
  if (model == "none") return {};
  if (model != "gpt2") {
    values.refuse(prefix + "model", "tokenizer '" + model.substr(0, 60) + "' is not supported",
                  "Byte-level BPE (gpt2) is. Sentencepiece tokenizers (llama) are not read.");
  }
  const std::string name = values.text(prefix + "pre", "");
  const GgufPreTokenizer kind = gguf_pre_tokenizer(name);
  if (kind.pre_tokenizer.is_null()) {
    values.refuse(prefix + "pre", "words cut as '" + name.substr(0, 60) + "' does are not known",
                  "Known: llama-bpe, qwen2, deepseek-r1-qwen, llama4, gpt-4o, deepseek-v3, smollm, "
                  "gpt-2.");
  }
  const std::vector<std::string>& tokens = values.texts(prefix + "tokens");
  if (tokens.size() > static_cast<std::size_t>(vocab)) {
    values.refuse(prefix + "tokens",
                  std::to_string(tokens.size()) + " tokens, the embedding has " +
                      std::to_string(vocab) + " rows",
                  "Fetch the file again.");
  }
  std::vector<std::int64_t> kinds(tokens.size(), kNormal);
  if (values.has(prefix + "token_type")) kinds = values.integers(prefix + "token_type");
  if (kinds.size() != tokens.size()) {
    values.refuse(
        prefix + "token_type",
        std::to_string(kinds.size()) + " kinds of " + std::to_string(tokens.size()) + " tokens",
        "Fetch the file again.");
  }
  json vocabulary = json::object(), added = json::array();
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (!is_utf8(tokens[i])) {
      values.refuse(prefix + "tokens", "token " + std::to_string(i) + " is not UTF-8",
                    "Fetch the file again.");
    }
    if (kinds[i] == kUnused) continue;
    const bool special = kinds[i] == kControl || kinds[i] == kUnknown;
    if (special || kinds[i] == kUserDefined) {
      added.push_back({{"id", i},
                       {"content", tokens[i]},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", special}});
    }
    if (!vocabulary.emplace(tokens[i], i).second) {
      values.refuse(prefix + "tokens", "token '" + tokens[i].substr(0, 60) + "' has two ids",
                    "Fetch the file again.");
    }
  }
  json merges = json::array();
  for (const std::string& merge : values.texts(prefix + "merges")) {
    const auto space = merge.find(' ', 1);
    if (!is_utf8(merge) || space == std::string::npos || space + 1 == merge.size()) {
      values.refuse(prefix + "merges", "a merge is not two tokens with a space between them",
                    "Fetch the file again.");
    }
    merges.push_back({merge.substr(0, space), merge.substr(space + 1)});
  }
  json tokenizer = {{"version", "1.0"},
                    {"truncation", nullptr},
                    {"padding", nullptr},
                    {"added_tokens", added},
                    {"normalizer", kind.nfc ? json{{"type", "NFC"}} : json()},
                    {"pre_tokenizer", kind.pre_tokenizer},
                    {"post_processor", nullptr},
                    {"decoder",
                     {{"type", "ByteLevel"},
                      {"add_prefix_space", true},
                      {"trim_offsets", true},
                      {"use_regex", true}}},
                    {"model",
                     {{"type", "BPE"},
                      {"dropout", nullptr},
                      {"unk_token", nullptr},
                      {"continuing_subword_prefix", nullptr},
                      {"end_of_word_suffix", nullptr},
                      {"fuse_unk", false},
                      {"byte_fallback", false},
                      {"ignore_merges", kind.ignore_merges},
                      {"vocab", std::move(vocabulary)},
                      {"merges", std::move(merges)}}}};

  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}}, generation = Json::object();
  const auto id_of = [&](const std::string& key) -> std::optional<std::int64_t> {
    if (!values.has(prefix + key)) return std::nullopt;
    const std::int64_t id = values.integer(prefix + key);
    if (id >= 0 && id < static_cast<std::int64_t>(tokens.size()) &&
        kinds[static_cast<std::size_t>(id)] != kUnused)
      return id;
    values.refuse(prefix + key, std::to_string(id) + " is the id of no token",
                  "Fetch the file again.");
  };
  for (const auto& [to, from] :
       {std::pair{"bos", "bos_token_id"}, std::pair{"eos", "eos_token_id"},
        std::pair{"pad", "padding_token_id"}, std::pair{"unk", "unknown_token_id"}}) {
    const auto id = id_of(from);
    if (!id) continue;
    config[to + std::string("_token")] = tokens[static_cast<std::size_t>(*id)];
    if (to != std::string("unk")) generation[to + std::string("_token_id")] = *id;
  }
  if (const auto second = id_of("eot_token_id")) {
    const Json eos = generation.value("eos_token_id", Json());
    if (eos.is_null() || eos == *second) {
      generation["eos_token_id"] = *second;
    } else {
      generation["eos_token_id"] = {eos, *second};
    }
  }
  const bool llama3 = kind.ignore_merges;  // llama.cpp's default, where the file says nothing
  config["add_bos_token"] = values.boolean(prefix + "add_bos_token", llama3);
  config["clean_up_tokenization_spaces"] = false;
  if (values.has("tokenizer.chat_template")) {
    config["chat_template"] = values.text("tokenizer.chat_template");
  }
  return {{"tokenizer.json", tokenizer.dump()},
          {"tokenizer_config.json", config.dump(2) + "\n"},
          {"generation_config.json", generation.dump(2) + "\n"}};
}

}  // namespace tailor
