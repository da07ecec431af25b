#include "data/text/pre_tokenizer.h"

#include <oniguruma.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "data/text/unicode.h"

namespace tailor {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& where) {
  throw Error(Fault::bad_file,
              {what, where,
               "Tailor reads Split, Digits and ByteLevel pre-tokenizers exactly as Hugging Face's "
               "tokenizers does, and refuses the rest. Use the tokenizer.json the model was "
               "published with."});
}

const OnigUChar* bytes_of(std::string_view text) {
  return reinterpret_cast<const OnigUChar*>(text.data());
}

std::string onig_message(int code, OnigErrorInfo* info) {
  OnigUChar buffer[ONIG_MAX_ERROR_MESSAGE_LEN] = {};
  const int length = info != nullptr ? onig_error_code_to_str(buffer, code, info)
                                     : onig_error_code_to_str(buffer, code);
  return {reinterpret_cast<const char*>(buffer), static_cast<std::size_t>(std::max(0, length))};
}

void start_onig() {
  static std::once_flag once;
  std::call_once(once, [] {
    OnigEncoding encodings[] = {ONIG_ENCODING_UTF8};
    onig_initialize(encodings, 1);
  });
}

/// Keys that `object` has beyond `known` are refused.
void only_keys(const nlohmann::json& object, std::initializer_list<std::string_view> known,
               const std::string& where) {
  for (const auto& [key, value] : object.items()) {
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      refuse("unknown key '" + key + "'", where);
    }
  }
}

bool flag(const nlohmann::json& object, const char* key, bool fallback, const std::string& where) {
  const auto found = object.find(key);
  if (found == object.end()) return fallback;
  if (!found->is_boolean()) refuse(std::string("'") + key + "' must be true or false", where);
  return found->get<bool>();
}

/// GPT-2's pattern, built into ByteLevel (tokenizers, pre_tokenizers/byte_level.rs).
constexpr const char* kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

}  // namespace

Pattern Pattern::regex(const std::string& expression, const std::string& where) {
  start_onig();
  regex_t* compiled = nullptr;
  OnigErrorInfo info{};
  const int code =
      onig_new(&compiled, bytes_of(expression), bytes_of(expression) + expression.size(),
               ONIG_OPTION_NONE, ONIG_ENCODING_UTF8, ONIG_SYNTAX_ONIGURUMA, &info);
  if (code != ONIG_NORMAL) {
    refuse("the regular expression does not compile: " + onig_message(code, &info),
           where + ": " + expression.substr(0, 200));
  }
  Pattern pattern;
  pattern.compiled_ =
      std::shared_ptr<void>(compiled, [](void* p) { onig_free(static_cast<regex_t*>(p)); });
  pattern.where_ = where;
  return pattern;
}

Pattern Pattern::literal(const std::string& text) {
  Pattern pattern;
  pattern.literal_ = text;
  return pattern;
}

void Pattern::find_all(std::string_view text, std::vector<ByteRange>& out) const {
  if (!compiled_) {
    if (literal_.empty()) return;
    for (std::size_t at = text.find(literal_); at != std::string_view::npos;
         at = text.find(literal_, at + literal_.size())) {
      out.push_back({at, at + literal_.size()});
    }
    return;
  }
  const OnigUChar* begin = bytes_of(text);
  const OnigUChar* end = begin + text.size();
  const std::unique_ptr<OnigRegion, void (*)(OnigRegion*)> region(
      onig_region_new(), [](OnigRegion* r) { onig_region_free(r, 1); });
  TAILOR_CHECK(region != nullptr);
  std::size_t from = 0;
  std::size_t last_end = std::string_view::npos;
  while (from <= text.size()) {
    const int code = onig_search(static_cast<regex_t*>(compiled_.get()), begin, end, begin + from,
                                 end, region.get(), ONIG_OPTION_NONE);
    if (code == ONIG_MISMATCH) return;
    if (code < 0) {
      throw Error(
          Fault::bad_file,
          {"a pre-tokenizer pattern cannot be matched: " + onig_message(code, nullptr), where_,
           "The text makes this pattern backtrack without end. Look for very long runs of one "
           "character in the data."});
    }
    const auto match_begin = static_cast<std::size_t>(region->beg[0]);
    const auto match_end = static_cast<std::size_t>(region->end[0]);
    if (match_begin == match_end && match_end == last_end) {
      // An empty match right behind the last one: step over a character, or it would never end.
      from += from < text.size() ? code_point_at(text, from).bytes : 1;
      continue;
    }
    out.push_back({match_begin, match_end});
    from = last_end = match_end;
  }
}

PreTokenizer::PreTokenizer(const nlohmann::json& description, const std::string& where) {
  if (description.is_null()) {
    refuse("there is no pre-tokenizer: this is not a byte-level tokenizer (sentencepiece?)",
           where + " (pre_tokenizer)");
  }
  add(description, where + " (pre_tokenizer)", true, 0);
}

void PreTokenizer::add(const nlohmann::json& description, const std::string& where, bool last,
                       int depth) {
  if (depth > 8) refuse("pre-tokenizers are nested deeper than 8", where);
  if (!description.is_object() || !description.contains("type") ||
      !description["type"].is_string()) {
    refuse("a pre-tokenizer must be an object with a 'type'", where);
  }
  const auto type = description["type"].get<std::string>();
  const std::string here = where + " " + type;
  if (type != "ByteLevel" && type != "Sequence" && last) {
    refuse(type == "Metaspace"
               ? "this is a sentencepiece tokenizer (Metaspace), which Tailor does not read"
               : "the last pre-tokenizer must be ByteLevel, found " + type,
           here);
  }
  if (type == "Sequence") {
    only_keys(description, {"type", "pretokenizers"}, here);
    const auto list = description.find("pretokenizers");
    if (list == description.end() || !list->is_array() || list->empty()) {
      refuse("'pretokenizers' must be a list that is not empty", here);
    }
    for (std::size_t i = 0; i < list->size(); ++i) {
      add((*list)[i], here + "[" + std::to_string(i) + "]", last && i + 1 == list->size(),
          depth + 1);
    }
    return;
  }
  Stage stage;
  if (type == "Split") {
    only_keys(description, {"type", "pattern", "behavior", "invert"}, here);
    const auto pattern = description.find("pattern");
    if (pattern == description.end() || !pattern->is_object() || pattern->size() != 1 ||
        !pattern->begin()->is_string()) {
      refuse(R"('pattern' must be {"Regex": text} or {"String": text})", here);
    }
    const auto text = pattern->begin()->get<std::string>();
    if (pattern->begin().key() == "Regex") {
      stage.pattern = Pattern::regex(text, here);
    } else if (pattern->begin().key() == "String") {
      stage.pattern = Pattern::literal(text);
    } else {
      refuse("unknown pattern '" + pattern->begin().key() + "'", here);
    }
    static const std::pair<const char*, Behaviour> kBehaviours[] = {
        {"Removed", Behaviour::removed},
        {"Isolated", Behaviour::isolated},
        {"MergedWithPrevious", Behaviour::merged_with_previous},
        {"MergedWithNext", Behaviour::merged_with_next},
        {"Contiguous", Behaviour::contiguous}};
    const std::string name = description.value("behavior", nlohmann::json()).is_string()
                                 ? description["behavior"].get<std::string>()
                                 : std::string();
    const auto* const found = std::find_if(std::begin(kBehaviours), std::end(kBehaviours),
                                           [&](const auto& entry) { return entry.first == name; });
    if (found == std::end(kBehaviours)) refuse("unknown behavior '" + name + "'", here);
    stage.behaviour = found->second;
    stage.invert = flag(description, "invert", false, here);
  } else if (type == "Digits") {
    only_keys(description, {"type", "individual_digits"}, here);
    stage.pattern = Pattern::regex(R"(\p{N})", here);
    stage.behaviour = flag(description, "individual_digits", false, here) ? Behaviour::isolated
                                                                          : Behaviour::contiguous;
  } else if (type == "ByteLevel") {
    only_keys(description, {"type", "add_prefix_space", "trim_offsets", "use_regex"}, here);
    if (!last) refuse("ByteLevel must be the last pre-tokenizer", here);
    stage.prefix_space = flag(description, "add_prefix_space", true, here);
    stage.cuts = flag(description, "use_regex", true, here);
    if (stage.cuts) stage.pattern = Pattern::regex(kByteLevelPattern, here);
    if (!stage.cuts && !stage.prefix_space) return;
  } else {
    refuse("pre-tokenizer '" + type + "' is not supported", here);
  }
  stages_.push_back(std::move(stage));
}

void PreTokenizer::split(std::string_view text, std::vector<std::string_view>& words,
                         std::deque<std::string>& scratch) const {
  words.clear();
  if (!text.empty()) words.push_back(text);
  thread_local std::vector<std::string_view> next;
  thread_local std::vector<ByteRange> matches;
  struct Piece {
    ByteRange at;
    bool match;
  };
  thread_local std::vector<Piece> pieces;
  for (const Stage& stage : stages_) {
    if (stage.prefix_space) {
      for (std::string_view& word : words) {
        if (word.front() != ' ') word = scratch.emplace_back(" " + std::string(word));
      }
    }
    if (!stage.cuts) continue;
    next.clear();
    for (const std::string_view word : words) {
      matches.clear();
      stage.pattern.find_all(word, matches);
      pieces.clear();
      std::size_t at = 0;
      for (const ByteRange match : matches) {
        if (at != match.begin) pieces.push_back({{at, match.begin}, stage.invert});
        pieces.push_back({match, !stage.invert});
        at = match.end;
      }
      if (at != word.size()) pieces.push_back({{at, word.size()}, stage.invert});

      // As NormalizedString::split of tokenizers folds them.
      const std::size_t first = next.size();
      const auto cut = [&](ByteRange range) {
        if (range.end > range.begin)
          next.push_back(word.substr(range.begin, range.end - range.begin));
      };
      bool previous = false;
      ByteRange open{};
      bool is_open = false;
      switch (stage.behaviour) {
        case Behaviour::removed:
          for (const Piece& piece : pieces) {
            if (!piece.match) cut(piece.at);
          }
          break;
        case Behaviour::isolated:
          for (const Piece& piece : pieces) cut(piece.at);
          break;
        case Behaviour::merged_with_previous:
        case Behaviour::contiguous:
          for (const Piece& piece : pieces) {
            const bool joins = stage.behaviour == Behaviour::contiguous ? piece.match == previous
                                                                        : piece.match && !previous;
            if (joins && is_open) {
              open.end = piece.at.end;
            } else {
              if (is_open) cut(open);
              open = piece.at;
              is_open = true;
            }
            previous = piece.match;
          }
          if (is_open) cut(open);
          break;
        case Behaviour::merged_with_next:
          for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
            if (piece->match && !previous && is_open) {
              open.begin = piece->at.begin;
            } else {
              if (is_open) cut(open);
              open = piece->at;
              is_open = true;
            }
            previous = piece->match;
          }
          if (is_open) cut(open);
          std::reverse(next.begin() + static_cast<std::ptrdiff_t>(first), next.end());
          break;
      }
    }
    std::swap(words, next);
  }
}

}  // namespace tailor
