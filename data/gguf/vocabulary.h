#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"
#include "data/gguf/metadata.h"

namespace tailor {

/// What tokenizer.json does not hold of a model's tokenizer; ids below 0: none.
struct GgufSpecialTokens {
  std::int64_t bos = -1, eos = -1, pad = -1, unk = -1;
  std::int64_t end_of_turn = -1;  ///< a second id that ends an answer
  bool adds_bos = false;
  std::string chat_template;  ///< empty: none
};

/// Values of a byte-level BPE tokenizer: tokens, their kinds, merges, the name by which llama.cpp
/// knows the regular expressions that cut texts into words, special ids, chat template.
/// `tokenizer_json` is the file's text, `vocab` the model's rows: ids without a token become unused
/// ones named [PAD123], as llama.cpp's own conversion has them. `notes` gets what llama.cpp does
/// otherwise. Throws Error{usage}: a tokenizer llama.cpp has no name for, a token twice, ids past
/// `vocab`.
std::vector<std::pair<std::string, GgufValue>> gguf_vocabulary(const std::string& tokenizer_json,
                                                               const std::string& where,
                                                               std::int64_t vocab,
                                                               const GgufSpecialTokens& special,
                                                               std::vector<std::string>& notes);

/// tokenizer.json, tokenizer_config.json and generation_config.json of the tokenizer in a GGUF
/// file, by name; empty where the file has none. Throws Error{bad_file}: a tokenizer that is no
/// byte-level BPE or whose words are cut in a way not known here, lists of unequal length, ids that
/// are no tokens.
std::map<std::string, std::string> tokenizer_files_from_gguf(const GgufValues& values,
                                                             std::int64_t vocab);

}  // namespace tailor
