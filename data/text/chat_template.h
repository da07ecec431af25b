#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "data/text/byte_range.h"
#include "data/text/tokenizer.h"

namespace tailor {

/// One message of a conversation. `fields` is what the template sees: role, content, tool_calls...
struct Message {
  std::string role;
  Json fields;
  std::optional<bool> train;  ///< "train" or "weight" of the row: overrules data.train_on
};

struct Conversation {
  std::vector<Message> messages;
  Json tools;         ///< null, or the row's "tools"
  std::string where;  ///< "file:line", for messages to people
};

/// A model's chat template (Jinja), rendered by llama.cpp's engine.
///
/// The engine remembers which bytes of its output came from the messages; these are handed on as
/// `contents`, so that "<|eot|>" typed by a user never becomes the control token. Where a template
/// loses the mark (tojson, split), a second rendering with the spelt-out tokens blanked tells the
/// template's own control tokens from those of the text.
class ChatTemplate {
 public:
  /// `choice`: "model" (chat_template.jinja, tokenizer_config.json or chat_template.json of the
  /// model's folder), the name of one of the model's several templates, "chatml", or the path of a
  /// .jinja file. Throws Error{bad_file} when there is none or it does not parse.
  static ChatTemplate load(const Tokenizer& tokenizer, const std::string& choice);
  /// From the text itself; `where` names it in errors.
  static ChatTemplate from_text(const Tokenizer& tokenizer, std::string source, std::string where);

  struct Rendered {
    std::string text;
    std::vector<ByteRange> contents;  ///< bytes that came from messages: sorted, disjoint
  };
  static constexpr std::size_t kAll = static_cast<std::size_t>(-1);
  static constexpr std::size_t kAssistants = static_cast<std::size_t>(-2);

  /// The text of the first `count` messages. `marked` says which count as contents: all, the
  /// assistant's, or one by its index.
  /// Throws Error{bad_file} with the conversation's place when the template raises an exception.
  Rendered render(const Conversation& conversation, bool add_generation_prompt,
                  std::size_t count = kAll, std::size_t marked = kAll) const;

  /// SHA-256 of the template's text.
  const std::string& digest() const;
  const std::string& source() const;
  const std::string& where() const;
  const Tokenizer& tokenizer() const;

 private:
  struct State;
  explicit ChatTemplate(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

}  // namespace tailor
