#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/file.h"
#include "data/gguf/header.h"

namespace tailor {

/// Appends the values of the tokenizer in a model's folder, chat template and special ids included;
/// without a tokenizer.json only "none", with a note. Throws as gguf_vocabulary and
/// Tokenizer::load.
void add_tokenizer_values(const fs::path& model, std::int64_t vocab,
                          std::vector<std::pair<std::string, GgufValue>>& values,
                          std::vector<std::string>& notes);

}  // namespace tailor
