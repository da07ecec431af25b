#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "data/text/byte_range.h"

namespace tailor {

/// A byte-level BPE tokenizer as Hugging Face's tokenizer.json describes it: text <-> token ids.
///
///   added tokens cut out -> normalizer -> pre-tokenizer (regular expressions) -> merges of bytes
///
/// Ids equal those of the Python package `tokenizers` with add_special_tokens=False for Llama 3
/// and 4, DeepSeek V3 and R1, Qwen 2, SmolLM 2 and their kin. A file that asks for anything else
/// (sentencepiece models, other normalizers or pre-tokenizers) is refused by the name of the part;
/// nothing in it is skipped silently, except what transformers overrules itself: `truncation` and
/// `padding`, and `post_processor`, which only adds special tokens around a text.
/// Copies share one immutable state; every const member may be called from many threads.
class Tokenizer {
 public:
  /// Reads tokenizer.json and, where they are there, tokenizer_config.json and
  /// generation_config.json of a model's folder. Throws Error{bad_file}.
  static Tokenizer load(const fs::path& model_folder);

  /// Token ids of `text` (UTF-8); the text of an added token becomes that token.
  /// Throws Error{bad_file} when `text` is not UTF-8.
  std::vector<std::int32_t> encode(std::string_view text) const;

  /// The same, but an added token is never recognised where it shares a byte with one of
  /// `protected_ranges` (sorted, disjoint): what people typed stays text. Everything else, the
  /// pre-tokenizer and the merges, runs across the ranges' borders, so that ids differ from the
  /// plain encode only where a control token was spelt out.
  std::vector<std::int32_t> encode(std::string_view text,
                                   std::span<const ByteRange> protected_ranges) const;

  /// Bytes of the ids with ill-formed UTF-8 replaced by U+FFFD. `skip_special` leaves out tokens
  /// marked special. Ids without a token (a model's vocabulary is often padded) give nothing.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special) const;
  /// The bytes of one token; a token may end inside a UTF-8 character.
  std::string_view bytes_of(std::int32_t id) const;

  struct AddedMatch {
    ByteRange at;
    std::int32_t id = 0;
  };
  /// Where encode(text, protected_ranges) sees added tokens, left to right.
  std::vector<AddedMatch> find_added(std::string_view text,
                                     std::span<const ByteRange> protected_ranges) const;

  /// One more than the largest id.
  std::int32_t vocab_size() const;
  /// Id of a token by its name in tokenizer.json ("<|eot|>", or "\u0120the" for " the").
  std::optional<std::int32_t> id_of(std::string_view token) const;
  bool is_added(std::int32_t id) const;
  bool is_special(std::int32_t id) const;

  /// From tokenizer_config.json, else generation_config.json; empty where neither names one.
  std::optional<std::int32_t> bos() const;
  std::optional<std::int32_t> pad() const;
  /// The token that ends a text, from tokenizer_config.json, else the first of eos_ids().
  std::optional<std::int32_t> eos() const;
  /// Every id that ends generation: generation_config.json's eos_token_id (one or a list) and
  /// eos(), ascending.
  const std::vector<std::int32_t>& eos_ids() const;
  /// Name of a token of tokenizer_config.json as chat templates see it: bos_token, eos_token,
  /// pad_token, unk_token; empty where it is not set.
  std::string special_text(std::string_view key) const;
  /// Whether Hugging Face puts the bos token before a plain text (post_processor or add_bos_token).
  bool adds_bos() const;

  /// SHA-256 of tokenizer.json.
  const std::string& digest() const;
  const fs::path& folder() const;

 private:
  struct State;
  explicit Tokenizer(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

/// Turns ids into text as they come, never cutting a UTF-8 character in two: bytes of an
/// unfinished character wait for the next token. For one stream, one thread.
class StreamDecoder {
 public:
  StreamDecoder(Tokenizer tokenizer, bool skip_special)
      : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}
  /// What can be shown after this id; may be empty.
  std::string push(std::int32_t id);
  /// What is left at the end, an unfinished character as U+FFFD.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  bool skip_special_;
  std::string waiting_;
};

}  // namespace tailor
