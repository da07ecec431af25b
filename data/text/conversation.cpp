#include "data/text/conversation.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

/// `ranges` without `hole`, both sorted.
std::vector<ByteRange> without(std::span<const ByteRange> ranges, ByteRange hole) {
  std::vector<ByteRange> out;
  for (const ByteRange range : ranges) {
    const ByteRange before{range.begin, std::min(range.end, hole.begin)};
    const ByteRange after{std::max(range.begin, hole.end), range.end};
    if (before.begin < before.end) out.push_back(before);
    if (after.begin < after.end) out.push_back(after);
  }
  return out;
}

std::vector<ByteRange> sorted_union(std::vector<ByteRange> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](ByteRange a, ByteRange b) { return a.begin < b.begin; });
  std::vector<ByteRange> out;
  for (const ByteRange range : ranges) {
    if (!out.empty() && range.begin <= out.back().end) {
      out.back().end = std::max(out.back().end, range.end);
    } else {
      out.push_back(range);
    }
  }
  return out;
}

/// "<think>", "</tool_call>": what models write themselves, unlike "<|eot|>".
bool is_plain_tag(std::string_view text) {
  if (text.size() < 3 || text.front() != '<' || text.back() != '>') return false;
  text = text.substr(1, text.size() - 2);
  if (text.front() == '/') text.remove_prefix(1);
  return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalpha(c) != 0 || c == '_';
  });
}

/// Lets plain tags inside the assistant's words be tokens: takes them out of `contents`.
void free_tags(const ChatTemplate& chat, const Conversation& conversation, bool prompt,
               const std::string& text, std::vector<ByteRange>& contents) {
  const Tokenizer& tokenizer = chat.tokenizer();
  bool any = false;
  for (const Message& message : conversation.messages) {
    if (message.role != "assistant" || any) continue;
    const std::string words = message.fields.dump();
    for (const auto& match : tokenizer.find_added(words, {})) {
      any = any || (!tokenizer.is_special(match.id) && is_plain_tag(tokenizer.bytes_of(match.id)));
    }
  }
  if (!any) return;
  const auto theirs =
      chat.render(conversation, prompt, ChatTemplate::kAll, ChatTemplate::kAssistants);
  if (theirs.text != text) return;
  for (const ByteRange range : theirs.contents) {
    const std::string_view words =
        std::string_view(text).substr(range.begin, range.end - range.begin);
    for (const auto& match : tokenizer.find_added(words, {})) {
      if (tokenizer.is_special(match.id) || !is_plain_tag(tokenizer.bytes_of(match.id))) continue;
      contents = without(contents, {range.begin + match.at.begin, range.begin + match.at.end});
    }
  }
}

/// Finds the messages' turns in the rendered conversation.
class Turns {
 public:
  Turns(const ChatTemplate& chat, const Conversation& conversation)
      : chat_(chat),
        conversation_(conversation),
        full_(chat.render(conversation, false)),
        controls_(chat.tokenizer().find_added(full_.text, full_.contents)) {}

  const ChatTemplate::Rendered& full() const { return full_; }
  const std::vector<Tokenizer::AddedMatch>& controls() const { return controls_; }

  /// Assistant message i as generation would write it: behind its prompt, up to the last control
  /// token of its turn. Nothing when the template does not extend its own prompt.
  std::optional<ByteRange> answer(std::size_t i) const {
    std::string prompt, turn;
    try {
      prompt = chat_.render(conversation_, true, i).text;
      turn = i + 1 == conversation_.messages.size()
                 ? full_.text
                 : chat_.render(conversation_, false, i + 1).text;
    } catch (const Error&) {  // a template may refuse a conversation that stops early
      return std::nullopt;
    }
    if (!full_.text.starts_with(turn) || !turn.starts_with(prompt) ||
        turn.size() == prompt.size()) {
      return std::nullopt;
    }
    ByteRange out{prompt.size(), turn.size()};
    for (const auto& control : controls_) {
      if (control.at.begin >= prompt.size() && control.at.end <= turn.size())
        out.end = control.at.end;
    }
    return out;
  }

  /// Message i by the marks of its content, and the first control token behind it.
  ByteRange content(std::size_t i) const {
    const auto marked = chat_.render(conversation_, false, ChatTemplate::kAll, i);
    if (marked.text != full_.text || marked.contents.empty()) {
      throw Error(
          Fault::bad_file,
          {"cannot find message " + std::to_string(i + 1) + " (" + conversation_.messages[i].role +
               ") in the text the chat template makes of it",
           conversation_.where + "\n" + chat_.where(),
           "The template drops or rewrites this message, so its loss cannot be placed. Set "
           "data.train_on: last_assistant, set \"train\": false on the message, or set "
           "data.chat_template to the path of a template that keeps it."});
    }
    ByteRange out{marked.contents.front().begin, marked.contents.back().end};
    std::size_t next_content = full_.text.size();
    for (const ByteRange range : full_.contents) {
      if (range.begin >= out.end) {
        next_content = range.begin;
        break;
      }
    }
    for (const auto& control : controls_) {
      if (control.at.begin < out.end) continue;
      if (control.at.begin < next_content) out.end = control.at.end;
      break;
    }
    return out;
  }

 private:
  const ChatTemplate& chat_;
  const Conversation& conversation_;
  ChatTemplate::Rendered full_;
  std::vector<Tokenizer::AddedMatch> controls_;
};

bool wanted(const TrainOn& train_on, const Conversation& conversation, std::size_t i) {
  const Message& message = conversation.messages[i];
  if (message.train) return *message.train;
  switch (train_on.kind) {
    case TrainOn::Kind::all:
      return true;
    case TrainOn::Kind::assistant:
      return message.role == "assistant";
    case TrainOn::Kind::roles:
      return std::find(train_on.roles.begin(), train_on.roles.end(), message.role) !=
             train_on.roles.end();
    case TrainOn::Kind::last_assistant:
      if (message.role != "assistant") return false;
      for (std::size_t k = i + 1; k < conversation.messages.size(); ++k) {
        if (conversation.messages[k].role == "assistant") return false;
      }
      return true;
  }
  return false;
}

}  // namespace

TrainOn TrainOn::from_name(const std::string& name) {
  if (name == "assistant") return {Kind::assistant, {}};
  if (name == "last_assistant") return {Kind::last_assistant, {}};
  if (name == "all") return {Kind::all, {}};
  return {Kind::roles, {name}};
}

std::string TrainOn::text() const {
  switch (kind) {
    case Kind::assistant:
      return "assistant";
    case Kind::last_assistant:
      return "last_assistant";
    case Kind::all:
      return "all";
    case Kind::roles:
      return "[" + join(roles, ", ") + "]";
  }
  return {};
}

std::int64_t TokenDocument::trained_tokens() const {
  return std::accumulate(trained.begin(), trained.end(), std::int64_t{0});
}

ConversationText render_for_training(const ChatTemplate& chat, const Conversation& conversation,
                                     const TrainOn& train_on) {
  const Turns turns(chat, conversation);
  ConversationText out;
  out.text = turns.full().text;
  const bool all = train_on.kind == TrainOn::Kind::all;
  if (all) {
    std::size_t end = out.text.size();
    if (!turns.controls().empty()) {
      const std::size_t last = turns.controls().back().at.end;
      if (trim(std::string_view(out.text).substr(last)).empty()) end = last;
    }
    out.trained = {{0, end}};
  }
  for (std::size_t i = 0; i < conversation.messages.size(); ++i) {
    const bool train = wanted(train_on, conversation, i);
    if (train == all && !(all && conversation.messages[i].role == "assistant")) continue;
    std::optional<ByteRange> turn;
    if (conversation.messages[i].role == "assistant") turn = turns.answer(i);
    if (train && turn) out.cuts.push_back(turn->begin);
    if (train && all) continue;
    if (!turn) turn = turns.content(i);
    if (train) {
      out.trained.push_back(*turn);
    } else {
      out.trained = without(out.trained, *turn);
    }
  }
  out.trained = sorted_union(std::move(out.trained));
  std::sort(out.cuts.begin(), out.cuts.end());
  out.text.resize(out.trained.empty() ? 0 : out.trained.back().end);
  out.contents = turns.full().contents;
  free_tags(chat, conversation, false, turns.full().text, out.contents);
  std::vector<ByteRange> inside;
  for (const ByteRange range : out.contents) {
    const ByteRange kept{range.begin, std::min(range.end, out.text.size())};
    if (kept.begin < kept.end) inside.push_back(kept);
  }
  out.contents = std::move(inside);
  return out;
}

TokenDocument encode_conversation(const ChatTemplate& chat, const Conversation& conversation,
                                  const TrainOn& train_on) {
  const ConversationText text = render_for_training(chat, conversation, train_on);
  std::vector<std::size_t> borders = text.cuts;
  for (const ByteRange range : text.trained) {
    borders.push_back(range.begin);
    borders.push_back(range.end);
  }
  borders.push_back(0);
  borders.push_back(text.text.size());
  std::sort(borders.begin(), borders.end());
  borders.erase(std::unique(borders.begin(), borders.end()), borders.end());

  TokenDocument out;
  for (std::size_t k = 0; k + 1 < borders.size(); ++k) {
    const ByteRange piece{borders[k], borders[k + 1]};
    std::vector<ByteRange> inside;
    for (const ByteRange range : text.contents) {
      const std::size_t begin = std::max(range.begin, piece.begin);
      const std::size_t end = std::min(range.end, piece.end);
      if (begin < end) inside.push_back({begin - piece.begin, end - piece.begin});
    }
    const std::vector<std::int32_t> ids = chat.tokenizer().encode(
        std::string_view(text.text).substr(piece.begin, piece.end - piece.begin), inside);
    out.ids.insert(out.ids.end(), ids.begin(), ids.end());
    out.trained.resize(out.ids.size(), overlaps(text.trained, piece) ? 1 : 0);
  }
  return out;
}

std::vector<std::int32_t> encode_prompt(const ChatTemplate& chat,
                                        const Conversation& conversation) {
  ChatTemplate::Rendered prompt = chat.render(conversation, true);
  free_tags(chat, conversation, true, prompt.text, prompt.contents);
  return chat.tokenizer().encode(prompt.text, prompt.contents);
}

}  // namespace tailor
