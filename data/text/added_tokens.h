#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/json.h"
#include "data/text/bpe.h"
#include "data/text/byte_range.h"
#include "data/text/pre_tokenizer.h"

namespace tailor {

/// One entry of tokenizer.json's "added_tokens".
struct AddedToken {
  std::int32_t id = 0;
  std::string content;
  bool special = false;
  bool normalized = false;   ///< looked for after the normalizer, not before
  bool lstrip = false;       ///< takes the white space before it along
  bool rstrip = false;       ///< and behind it
  bool single_word = false;  ///< not inside a word
};

/// Finds added tokens in texts: the leftmost first, and of those the longest, as Hugging Face does.
/// Immutable.
class AddedTokens {
 public:
  /// `list` is "added_tokens". Throws Error{bad_file}; an id must be the one Hugging Face gives.
  AddedTokens(const nlohmann::json& list, const BytePairModel& model, const std::string& where);

  struct Match {
    ByteRange at;  ///< with the white space that lstrip and rstrip take
    std::int32_t id = 0;
  };
  /// Tokens of one kind (`normalized` or not) in `text`, none sharing a byte with
  /// `protected_ranges`.
  std::vector<Match> find(std::string_view text, std::span<const ByteRange> protected_ranges,
                          bool normalized) const;

  const std::vector<AddedToken>& all() const { return tokens_; }
  const AddedToken* by_id(std::int32_t id) const;
  const AddedToken* by_content(std::string_view content) const;
  /// Normalized tokens are looked for by their normalized text.
  void normalize(std::string (*normalizer)(std::string_view));

 private:
  struct Trie {
    struct Node {
      std::vector<std::pair<unsigned char, std::uint32_t>> children;
      std::int32_t token = -1;  ///< index into tokens_
    };
    std::vector<Node> nodes{Node{}};
    std::array<bool, 256> first{};
    void add(std::string_view text, std::int32_t token);
    const Node* next(const Node& node, unsigned char byte) const;
  };
  std::vector<AddedToken> tokens_;
  std::unordered_map<std::int32_t, std::size_t> by_id_;
  std::unordered_map<std::string, std::size_t> by_content_;
  Trie raw_, normalized_;
  std::shared_ptr<const Pattern> word_at_end_, word_at_start_, space_at_end_, space_at_start_;
};

}  // namespace tailor
