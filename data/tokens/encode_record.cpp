#include "data/tokens/encode_record.h"

#include <utility>

#include "base/error.h"

namespace tailor {
namespace {

void append(TokenDocument& document, const std::vector<std::int32_t>& ids, bool trained) {
  document.ids.insert(document.ids.end(), ids.begin(), ids.end());
  document.trained.resize(document.ids.size(), trained ? 1 : 0);
}

/// What stands before a plain text, unless the text begins with it already.
std::vector<std::int32_t> with_bos(const Tokenizer& tokenizer, std::vector<std::int32_t> ids) {
  const auto bos = tokenizer.bos();
  if (tokenizer.adds_bos() && bos && (ids.empty() || ids.front() != *bos))
    ids.insert(ids.begin(), *bos);
  return ids;
}

std::vector<std::int32_t> with_eos(const Tokenizer& tokenizer, std::vector<std::int32_t> ids) {
  const auto eos = tokenizer.eos();
  if (eos && (ids.empty() || ids.back() != *eos)) ids.push_back(*eos);
  return ids;
}

}  // namespace

RecordEncoder::RecordEncoder(const Tokenizer* tokenizer, std::string chat_template,
                             TrainOn train_on)
    : tokenizer_(tokenizer),
      template_choice_(std::move(chat_template)),
      train_on_(std::move(train_on)) {}

void RecordEncoder::load_template() {
  if (!chat_ && tokenizer_ != nullptr) chat_ = ChatTemplate::load(*tokenizer_, template_choice_);
}

const Tokenizer& RecordEncoder::need_tokenizer(const Record& record) const {
  if (tokenizer_ != nullptr) return *tokenizer_;
  throw Error(Fault::bad_file,
              {"this record is text, and there is no tokenizer", record.where,
               "Put the model's tokenizer.json into its folder, or give tokenized data."});
}

TokenDocument RecordEncoder::encode(const Record& record) const {
  TokenDocument out;
  if (const auto* tokens = std::get_if<TokenDocument>(&record.content)) return *tokens;
  const Tokenizer& tokenizer = need_tokenizer(record);
  if (const auto* conversation = std::get_if<Conversation>(&record.content)) {
    TAILOR_CHECK(chat_.has_value(), "load_template() comes first");
    return encode_conversation(*chat_, *conversation, train_on_);
  }
  if (const auto* plain = std::get_if<PlainText>(&record.content)) {
    append(out, with_eos(tokenizer, with_bos(tokenizer, tokenizer.encode(plain->text))), true);
  } else {
    const auto& pair = std::get<PromptCompletion>(record.content);
    append(out, with_bos(tokenizer, tokenizer.encode(pair.prompt)),
           train_on_.kind == TrainOn::Kind::all);
    append(out, with_eos(tokenizer, tokenizer.encode(pair.completion)), true);
  }
  return out;
}

}  // namespace tailor
