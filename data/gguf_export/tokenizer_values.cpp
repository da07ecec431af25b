#include "data/gguf_export/tokenizer_values.h"

#include "base/error.h"
#include "data/gguf/vocabulary.h"
#include "data/text/conversation.h"
#include "data/text/tokenizer.h"

namespace tailor {
namespace {

/// A model's folder has a template or not; one that is broken says so.
std::string chat_template_of(const Tokenizer& tokenizer, const fs::path& model) {
  std::error_code error;
  bool there = fs::exists(model / "chat_template.jinja", error);
  for (const char* name : {"tokenizer_config.json", "chat_template.json"}) {
    if (there || !fs::exists(model / name, error)) continue;
    const Json config = read_json(model / name);
    there = config.is_object() && config.contains("chat_template") &&
            !config["chat_template"].is_null();
  }
  return there ? ChatTemplate::load(tokenizer, "model").source() : std::string();
}

}  // namespace

void add_tokenizer_values(const fs::path& model, std::int64_t vocab,
                          std::vector<std::pair<std::string, GgufValue>>& values,
                          std::vector<std::string>& notes) {
  std::error_code error;
  const fs::path path = model / "tokenizer.json";
  if (!fs::exists(path, error) && !fs::exists(model / "tokenizer.model", error)) {
    values.emplace_back("tokenizer.ggml.model", GgufValue::of_text("none"));
    notes.push_back("the model has no tokenizer.json: llama.cpp can be given token ids only");
    return;
  }
  const Tokenizer tokenizer = Tokenizer::load(model);
  GgufSpecialTokens special;
  special.bos = tokenizer.bos().value_or(-1);
  special.eos = tokenizer.eos().value_or(-1);
  special.pad = tokenizer.pad().value_or(-1);
  if (const std::string unknown = tokenizer.special_text("unk_token"); !unknown.empty()) {
    special.unk = tokenizer.id_of(unknown).value_or(-1);
  }
  for (const std::int32_t id : tokenizer.eos_ids()) {
    if (id != special.eos) special.end_of_turn = id;
  }
  if (tokenizer.eos_ids().size() > 2) {
    notes.push_back("the model has " + std::to_string(tokenizer.eos_ids().size()) +
                    " tokens that end an answer; the file names two, and llama.cpp knows others by "
                    "their text only (<|eot_id|>, <|end_of_text|>, <|im_end|> and their like)");
  }
  special.adds_bos = tokenizer.adds_bos();
  special.chat_template = chat_template_of(tokenizer, model);
  for (auto& value : gguf_vocabulary(read_text(path), path.string(), vocab, special, notes)) {
    values.push_back(std::move(value));
  }
}

}  // namespace tailor
