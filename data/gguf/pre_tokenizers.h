#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace tailor {

/// llama.cpp's name for what "pre_tokenizer" of a tokenizer.json does; empty where it has none.
std::string_view gguf_pre_tokenizer_name(const nlohmann::json& pre_tokenizer);

/// A pre-tokenizer that llama.cpp knows by one or more names (src/llama-vocab.cpp).
struct GgufPreTokenizer {
  nlohmann::json pre_tokenizer;  ///< of tokenizer.json; null: the name is not known here
  bool ignore_merges = false;    ///< whole words of the vocabulary are taken before merging
  bool nfc = false;              ///< what models of that name normalise, and llama.cpp does not
};
GgufPreTokenizer gguf_pre_tokenizer(std::string_view name);

}  // namespace tailor
