#pragma once

#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "data/text/byte_range.h"

namespace tailor {

/// A compiled regular expression of Oniguruma, the engine Hugging Face's tokenizers uses, so that
/// look-aheads and Unicode classes mean the same. Immutable; shared by threads.
class Pattern {
 public:
  /// Throws Error{bad_file} with the engine's reason and `where`.
  static Pattern regex(const std::string& expression, const std::string& where);
  /// Matches `text` itself.
  static Pattern literal(const std::string& text);

  /// Matches in text, left to right, as Rust's onig find_iter gives them. Throws Error{bad_file}
  /// when the engine gives up (a pattern that backtracks without end).
  void find_all(std::string_view text, std::vector<ByteRange>& out) const;

 private:
  std::shared_ptr<void> compiled_;
  std::string literal_;
  std::string where_;
};

/// What tokenizer.json's "pre_tokenizer" does: cuts a text into words for the merges. A Sequence of
/// Split, Digits and ByteLevel, the last being ByteLevel; anything else is refused by name.
class PreTokenizer {
 public:
  PreTokenizer(const nlohmann::json& description, const std::string& where);

  /// Cuts `text`. The words are views into it or into `scratch`.
  void split(std::string_view text, std::vector<std::string_view>& words,
             std::deque<std::string>& scratch) const;

 private:
  enum class Behaviour { removed, isolated, merged_with_previous, merged_with_next, contiguous };
  struct Stage {
    Pattern pattern;
    Behaviour behaviour = Behaviour::isolated;
    bool invert = false;
    bool prefix_space = false;  ///< ByteLevel: a word that does not start with a space gets one
    bool cuts = true;           ///< false: only the prefix space
  };
  void add(const nlohmann::json& description, const std::string& where, bool last, int depth);
  std::vector<Stage> stages_;
};

}  // namespace tailor
