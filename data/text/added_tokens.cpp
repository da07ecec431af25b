#include "data/text/added_tokens.h"

#include <algorithm>

#include "base/error.h"

namespace tailor {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& where) {
  throw Error(Fault::bad_file,
              {what, where, "Use the tokenizer.json the model was published with."});
}

/// Rust's \w, which the flag single_word is defined by.
const std::string kWord = R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}])";

std::vector<ByteRange> matches_of(const Pattern& pattern, std::string_view text) {
  std::vector<ByteRange> out;
  pattern.find_all(text, out);
  return out;
}

}  // namespace

void AddedTokens::Trie::add(std::string_view text, std::int32_t token) {
  std::uint32_t node = 0;
  first[static_cast<unsigned char>(text[0])] = true;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    std::uint32_t child = 0;
    for (const auto& [key, to] : nodes[node].children) {
      if (key == byte) child = to;
    }
    if (child == 0) {
      child = static_cast<std::uint32_t>(nodes.size());
      nodes.emplace_back();
      nodes[node].children.emplace_back(byte, child);
    }
    node = child;
  }
  nodes[node].token = token;
}

const AddedTokens::Trie::Node* AddedTokens::Trie::next(const Node& node, unsigned char byte) const {
  for (const auto& [key, to] : node.children) {
    if (key == byte) return &nodes[to];
  }
  return nullptr;
}

AddedTokens::AddedTokens(const nlohmann::json& list, const BytePairModel& model,
                         const std::string& where) {
  if (list.is_null()) return;
  if (!list.is_array()) refuse("'added_tokens' must be a list", where);
  std::int32_t next_id = model.size();
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::string here = where + " (added_tokens[" + std::to_string(i) + "])";
    const nlohmann::json& entry = list[i];
    if (!entry.is_object()) refuse("an added token must be an object", here);
    AddedToken token;
    bool has_id = false;
    for (const auto& [key, value] : entry.items()) {
      bool* flag = key == "special"       ? &token.special
                   : key == "normalized"  ? &token.normalized
                   : key == "lstrip"      ? &token.lstrip
                   : key == "rstrip"      ? &token.rstrip
                   : key == "single_word" ? &token.single_word
                                          : nullptr;
      if (flag != nullptr) {
        if (!value.is_boolean()) refuse("'" + key + "' must be true or false", here);
        *flag = value.get<bool>();
      } else if (key == "content") {
        if (!value.is_string()) refuse("'content' must be text", here);
        token.content = value.get<std::string>();
      } else if (key == "id") {
        if (!value.is_number_integer() || value < 0 || value > (1 << 30)) {
          refuse("'id' must be an integer from 0 to 1073741824", here);
        }
        token.id = value.get<std::int32_t>();
        has_id = true;
      } else {
        refuse("unknown key '" + key + "'", here);
      }
    }
    if (token.content.empty() || !has_id) refuse("an added token needs 'id' and 'content'", here);
    // Hugging Face numbers added tokens itself when it reads the file: by the vocabulary, else on
    // from the last id. A file that says otherwise would mean other ids there than here.
    const auto known = model.ids().find(token.content);
    const std::int32_t expected = known != model.ids().end() ? known->second : next_id;
    if (token.id != expected) {
      refuse("added token '" + token.content + "' has id " + std::to_string(token.id) +
                 ", Hugging Face would number it " + std::to_string(expected),
             here);
    }
    if (known == model.ids().end()) ++next_id;
    const auto index = tokens_.size();
    if (!by_id_.emplace(token.id, index).second ||
        !by_content_.emplace(token.content, index).second) {
      refuse("added token '" + token.content + "' is there twice", here);
    }
    if (token.single_word && !word_at_end_) {
      word_at_end_ = std::make_shared<Pattern>(Pattern::regex(kWord + R"(\z)", here));
      word_at_start_ = std::make_shared<Pattern>(Pattern::regex(R"(\A)" + kWord, here));
    }
    if ((token.lstrip || token.rstrip) && !space_at_end_) {
      space_at_end_ = std::make_shared<Pattern>(Pattern::regex(R"(\s+\z)", here));
      space_at_start_ = std::make_shared<Pattern>(Pattern::regex(R"(\A\s+)", here));
    }
    (token.normalized ? normalized_ : raw_).add(token.content, static_cast<std::int32_t>(index));
    tokens_.push_back(std::move(token));
  }
}

void AddedTokens::normalize(std::string (*normalizer)(std::string_view)) {
  normalized_ = Trie{};
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    if (!tokens_[i].normalized) continue;
    normalized_.add(normalizer(tokens_[i].content), static_cast<std::int32_t>(i));
  }
}

const AddedToken* AddedTokens::by_id(std::int32_t id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : &tokens_[found->second];
}

const AddedToken* AddedTokens::by_content(std::string_view content) const {
  const auto found = by_content_.find(std::string(content));
  return found == by_content_.end() ? nullptr : &tokens_[found->second];
}

std::vector<AddedTokens::Match> AddedTokens::find(std::string_view text,
                                                  std::span<const ByteRange> protected_ranges,
                                                  bool normalized) const {
  const Trie& trie = normalized ? normalized_ : raw_;
  std::vector<Match> out;
  if (trie.nodes.size() == 1) return out;
  std::size_t taken = 0;  // everything before is part of a match
  for (std::size_t at = 0; at < text.size();) {
    if (!trie.first[static_cast<unsigned char>(text[at])]) {
      ++at;
      continue;
    }
    const Trie::Node* node = trie.nodes.data();
    std::int32_t best = -1;
    std::size_t best_end = at;
    for (std::size_t end = at; end < text.size();) {
      node = trie.next(*node, static_cast<unsigned char>(text[end]));
      if (node == nullptr) break;
      ++end;
      if (node->token >= 0 && !overlaps(protected_ranges, {at, end})) {
        best = node->token;
        best_end = end;
      }
    }
    if (best < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<std::size_t>(best)];
    ByteRange range{at, best_end};
    at = best_end;
    if (token.single_word) {
      if (!matches_of(*word_at_end_, text.substr(0, range.begin)).empty()) continue;
      if (!matches_of(*word_at_start_, text.substr(range.end)).empty()) continue;
    }
    if (token.lstrip) {
      const auto space = matches_of(*space_at_end_, text.substr(0, range.begin));
      if (!space.empty()) range.begin = std::max(space.front().begin, taken);
    }
    if (token.rstrip) {
      const auto space = matches_of(*space_at_start_, text.substr(range.end));
      if (!space.empty()) range.end += space.front().end;
    }
    taken = range.end;
    out.push_back({range, token.id});
  }
  return out;
}

}  // namespace tailor
