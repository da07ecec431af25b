#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/text/chat_template.h"

namespace tailor {

/// Which messages carry loss (data.train_on).
struct TrainOn {
  enum class Kind { assistant, last_assistant, all, roles };
  Kind kind = Kind::assistant;
  std::vector<std::string> roles;  ///< of Kind::roles

  /// "assistant", "last_assistant", "all", or the names of roles.
  static TrainOn from_name(const std::string& name);
  std::string text() const;
  bool operator==(const TrainOn&) const = default;
};

/// Token ids with, for each, whether it is a target of the loss. Same lengths.
struct TokenDocument {
  std::vector<std::int32_t> ids;
  std::vector<std::uint8_t> trained;
  std::int64_t trained_tokens() const;
};

/// A conversation as text, ready for the tokenizer.
struct ConversationText {
  std::string text;                 ///< ends at the last trained byte
  std::vector<ByteRange> contents;  ///< protected from control tokens
  std::vector<ByteRange> trained;   ///< sorted, disjoint
  std::vector<std::size_t> cuts;    ///< where prompt and answer are tokenised apart, ascending
};

/// What an assistant message i teaches: the bytes that follow render(messages[:i], prompt) in
/// render(messages[:i+1]), up to and including the last control token of that turn, so that the
/// end-of-turn token carries loss and the line break after it does not. Text after the last
/// trained byte is dropped. Where a template does not extend its own prompt (it rewrites earlier
/// turns, or the prompt opens a <think>), the message's content is found by its marks instead, and
/// the turn ends with the first control token behind it. Throws Error{bad_file} when neither works.
///
/// Inside assistant messages, added tokens that are not special and look like a plain tag
/// ("<think>", "</think>", "<tool_call>") stay tokens: they are the model's own words.
ConversationText render_for_training(const ChatTemplate& chat, const Conversation& conversation,
                                     const TrainOn& train_on);

/// render_for_training, tokenised: prompt and answer apart, as they meet at inference.
TokenDocument encode_conversation(const ChatTemplate& chat, const Conversation& conversation,
                                  const TrainOn& train_on);

/// The prompt that generation starts from, control tokens in the messages' contents disarmed.
std::vector<std::int32_t> encode_prompt(const ChatTemplate& chat, const Conversation& conversation);

}  // namespace tailor
