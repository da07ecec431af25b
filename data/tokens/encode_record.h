#pragma once

#include <optional>

#include "data/text/chat_template.h"
#include "data/text/conversation.h"
#include "data/text/records.h"
#include "data/text/tokenizer.h"

namespace tailor {

/// Turns records into token ids with their loss mask. Thread-safe.
class RecordEncoder {
 public:
  /// `tokenizer` may be null when every record is tokenised. The chat template is loaded with the
  /// first conversation, so that data without conversations need none.
  RecordEncoder(const Tokenizer* tokenizer, std::string chat_template, TrainOn train_on);

  /// A conversation: encode_conversation. A text: all of it teaches. A prompt and completion: the
  /// completion teaches; the two are tokenised apart. Plain texts begin with the bos token where
  /// Hugging Face puts one, and end with the eos token. Errors name the record's file and line.
  TokenDocument encode(const Record& record) const;

  /// Loads the chat template now.
  void load_template();
  const std::optional<ChatTemplate>& chat_template() const { return chat_; }

 private:
  const Tokenizer& need_tokenizer(const Record& record) const;

  const Tokenizer* tokenizer_;
  std::string template_choice_;
  TrainOn train_on_;
  std::optional<ChatTemplate> chat_;
};

}  // namespace tailor
