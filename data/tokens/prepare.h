#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "base/json.h"
#include "data/text/chat_template.h"
#include "data/text/tokenizer.h"
#include "data/tokens/data_options.h"
#include "data/tokens/token_store.h"

namespace tailor {

/// What became of one side (train or validation) of the data.
struct SplitReport {
  fs::path store;
  std::int64_t records = 0;    ///< lines read for this side
  std::int64_t documents = 0;  ///< documents kept, with repeats by weight
  std::int64_t rows = 0;
  std::int64_t tokens = 0;
  std::int64_t trained_tokens = 0;
  double fill = 0;  ///< tokens / (rows * sequence_len)
  std::int64_t truncated = 0;
  std::int64_t split = 0;              ///< documents cut into pieces
  std::int64_t dropped_too_long = 0;   ///< data.too_long: drop
  std::int64_t dropped_untrained = 0;  ///< no token carries loss
  std::int64_t dropped_by_weight = 0;  ///< weight below 1
  std::int64_t truncated_tokens = 0;   ///< tokens lost to truncation

  Json to_json() const;
  static SplitReport from_json(const Json& json, const std::string& where);
};

struct PrepareReport {
  SplitReport train;
  std::optional<SplitReport> validation;
  std::string digest;   ///< of everything the stores depend on
  bool reused = false;  ///< both stores were there already
};

/// Told now and then: lines and bytes read so far, bytes in all.
using PrepareProgress =
    std::function<void(std::int64_t records, std::int64_t bytes, std::int64_t bytes_total)>;

/// Makes the token stores of `options`, or finds them made: the digest covers the files' contents,
/// tokenizer, template, options and the version of this code. `tokenizer` may be null when all
/// files are tokenised already. Throws Error{bad_file} for unusable data, such as a side without a
/// token to train on.
PrepareReport prepare(const DataOptions& options, const Tokenizer* tokenizer,
                      const PrepareProgress& progress = {});

/// `tailor data inspect`: writes rows [first, first + count) of a store, one line a document,
/// trained tokens between U+27E6 and U+27E7 (bold green as well where `colour`), special tokens by
/// name. Without a tokenizer, ids are shown.
void inspect_store(const TokenStore& store, const Tokenizer* tokenizer, std::int64_t first,
                   std::int64_t count, bool colour, std::ostream& out);

/// `tailor data tokenize`: for each {"text"} line of `path` one line {"input_ids": [...]}: what
/// Hugging Face's encode(add_special_tokens=False) gives. Returns the number of lines.
std::int64_t tokenize_file(const Tokenizer& tokenizer, const fs::path& path, std::ostream& out);

}  // namespace tailor
