#include "data/text/chat_template.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "base/error.h"
#include "base/text.h"

// The engine's own headers; its names stay in this file.
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"

namespace tailor {
namespace {

/// Templates may print the date; data must not depend on the day it was prepared. Noon UTC of the
/// date that Llama 3's template falls back to.
constexpr std::time_t kTemplateTime = 1721995200;  // 2024-07-26T12:00:00Z

constexpr const char* kChatml =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' "
    "}}{% endif %}";

jinja::value to_value(const Json& json, bool mark) {
  switch (json.type()) {
    case Json::value_t::boolean:
      return jinja::mk_val<jinja::value_bool>(json.get<bool>());
    case Json::value_t::number_integer:
      return jinja::mk_val<jinja::value_int>(json.get<std::int64_t>());
    case Json::value_t::number_unsigned: {
      const auto number = json.get<std::uint64_t>();
      if (number > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        return jinja::mk_val<jinja::value_float>(static_cast<double>(number));
      }
      return jinja::mk_val<jinja::value_int>(static_cast<std::int64_t>(number));
    }
    case Json::value_t::number_float:
      return jinja::mk_val<jinja::value_float>(json.get<double>());
    case Json::value_t::string: {
      auto text = jinja::mk_val<jinja::value_string>(json.get<std::string>());
      if (mark) text->mark_input();
      return text;
    }
    case Json::value_t::array: {
      auto list = jinja::mk_val<jinja::value_array>();
      for (const Json& item : json) list->push_back(to_value(item, mark));
      return list;
    }
    case Json::value_t::object: {
      auto object = jinja::mk_val<jinja::value_object>();
      for (const auto& [key, value] : json.items()) object->insert(key, to_value(value, mark));
      return object;
    }
    default:
      return jinja::mk_val<jinja::value_none>();
  }
}

/// "the reason" of the engine's many-lined messages, and the place in the template if it names one.
std::pair<std::string, std::string> reason_and_place(const std::string& message) {
  std::string reason = message;
  if (const std::size_t at = reason.rfind("\nError: "); at != std::string::npos) {
    reason = reason.substr(at + 8);
  }
  std::string place;
  if (const std::size_t at = message.rfind(" at line "); at != std::string::npos) {
    place = message.substr(at + 4, message.find(" in source", at) - at - 4);
  }
  return {std::string(trim(reason)), place};
}

/// Every string of `json`, changed by `change`.
void for_each_string(Json& json, const std::function<void(std::string&)>& change) {
  if (json.is_string()) {
    change(json.get_ref<std::string&>());
  } else if (json.is_structured()) {
    for (Json& item : json) for_each_string(item, change);
  }
}

std::string template_from_list(const Json& list, const std::string& name,
                               const std::string& where) {
  std::string names;
  for (const Json& entry : list) {
    const JsonReader reader(entry, where);
    if (reader.text("name") == name) return reader.text("template");
    names += (names.empty() ? "" : ", ") + reader.text("name");
  }
  throw Error(Fault::bad_file, {"the model has no chat template named '" + name + "'", where,
                                "Set data.chat_template to one of: " + names + "."});
}

}  // namespace

struct ChatTemplate::State {
  Tokenizer tokenizer;
  std::string source, where, digest;
  jinja::program program;
};

ChatTemplate ChatTemplate::load(const Tokenizer& tokenizer, const std::string& choice) {
  const fs::path& folder = tokenizer.folder();
  if (choice.ends_with(".jinja")) return from_text(tokenizer, read_text(choice), choice);
  const std::string name = choice == "model" ? "default" : choice;
  if (choice == "model" && fs::exists(folder / "chat_template.jinja")) {
    const fs::path path = folder / "chat_template.jinja";
    return from_text(tokenizer, read_text(path), path.string());
  }
  if (choice != "model") {
    const bool plain = std::all_of(choice.begin(), choice.end(), [](unsigned char c) {
      return std::isalnum(c) != 0 || c == '_' || c == '-';
    });
    const fs::path path = folder / "additional_chat_templates" / (choice + ".jinja");
    if (plain && fs::exists(path)) return from_text(tokenizer, read_text(path), path.string());
  }
  for (const char* file : {"tokenizer_config.json", "chat_template.json"}) {
    const fs::path path = folder / file;
    if (!fs::exists(path)) continue;
    const Json config = read_json(path);
    const std::string where = path.string() + " (chat_template)";
    const JsonReader reader(config, path.string());
    if (!reader.has("chat_template")) continue;
    const Json& entry = reader.at("chat_template");
    if (entry.is_array()) {
      return from_text(tokenizer, template_from_list(entry, name, where), where);
    }
    if (choice == "model") return from_text(tokenizer, reader.text("chat_template"), where);
  }
  if (choice == "chatml") {
    if (!tokenizer.id_of("<|im_start|>") || !tokenizer.id_of("<|im_end|>")) {
      throw Error(Fault::bad_file,
                  {"chat template chatml needs the tokens <|im_start|> and <|im_end|>",
                   (folder / "tokenizer.json").string(),
                   "Set data.chat_template: model, or the path of a .jinja file for this model."});
    }
    return from_text(tokenizer, kChatml, "chat template chatml");
  }
  throw Error(Fault::bad_file,
              {choice == "model" ? "the model has no chat template"
                                 : "there is no chat template '" + choice + "'",
               folder.string(),
               "Set data.chat_template to chatml or to the path of a .jinja file, or give data in "
               "prompt_completion, text or tokenized format."});
}

ChatTemplate ChatTemplate::from_text(const Tokenizer& tokenizer, std::string source,
                                     std::string where) {
  const auto refuse = [&](const std::string& what) {
    throw Error(Fault::bad_file,
                {what, where, "Use the chat template the model was published with."});
  };
  // The engine recurses with the template's nesting; these bounds are far above real templates.
  constexpr std::size_t kBytesMax = std::size_t{256} << 10U;
  constexpr int kBracketsMax = 200, kStatementsMax = 5000;
  if (source.size() > kBytesMax) refuse("the chat template is larger than 256 KiB");
  if (!is_utf8(source)) refuse("the chat template is not UTF-8");
  int depth = 0, statements = 0;
  for (std::size_t i = 0; i < source.size(); ++i) {
    const char c = source[i];
    if (c == '(' || c == '[' || c == '{') ++depth;
    if (c == ')' || c == ']' || c == '}') depth = std::max(0, depth - 1);
    if (c == '{' && i + 1 < source.size() && source[i + 1] == '%') ++statements;
    if (depth > kBracketsMax) refuse("the chat template's brackets are nested deeper than 200");
    if (statements > kStatementsMax) refuse("the chat template has more than 5,000 statements");
  }
  auto state = std::make_shared<State>(State{tokenizer, std::move(source), where, {}, {}});
  state->digest = sha256_hex(state->source);
  try {
    jinja::lexer lexer;
    const jinja::lexer_result tokens = lexer.tokenize(state->source);
    state->program = jinja::parse_from_tokens(tokens);
  } catch (const std::exception& error) {
    refuse("the chat template does not parse: " + reason_and_place(error.what()).first);
  }
  return ChatTemplate(std::move(state));
}

ChatTemplate::Rendered ChatTemplate::render(const Conversation& conversation,
                                            bool add_generation_prompt, std::size_t count,
                                            std::size_t marked) const {
  const std::size_t messages = std::min(count, conversation.messages.size());
  const auto run = [&](const Conversation& source) {
    Rendered out;
    try {
      jinja::context context(state_->source);
      context.current_time = kTemplateTime;
      auto list = jinja::mk_val<jinja::value_array>();
      for (std::size_t i = 0; i < messages; ++i) {
        const Message& message = source.messages[i];
        const bool mark =
            marked == kAll || marked == i || (marked == kAssistants && message.role == "assistant");
        auto object = jinja::mk_val<jinja::value_object>();
        for (const auto& [key, value] : message.fields.items()) {
          // A role is one of a few known words, and templates build control tokens from it.
          object->insert(key, to_value(value, mark && key != "role"));
        }
        list->push_back(object);
      }
      context.set_val("messages", list);
      context.set_val("tools", to_value(source.tools, marked == kAll));
      context.set_val("documents", jinja::mk_val<jinja::value_none>());
      context.set_val("add_generation_prompt",
                      jinja::mk_val<jinja::value_bool>(add_generation_prompt));
      for (const char* key : {"bos_token", "eos_token", "pad_token", "unk_token"}) {
        context.set_val(key,
                        jinja::mk_val<jinja::value_string>(state_->tokenizer.special_text(key)));
      }
      jinja::runtime runtime(context);
      const jinja::value_array results = runtime.execute(state_->program);
      const jinja::value_string text = jinja::runtime::gather_string_parts(results);
      for (const auto& part : text->val_str.parts) {
        const std::size_t begin = out.text.size();
        out.text += part.val;
        if (!part.is_input || part.val.empty()) continue;
        if (!out.contents.empty() && out.contents.back().end == begin) {
          out.contents.back().end = out.text.size();
        } else {
          out.contents.push_back({begin, out.text.size()});
        }
      }
    } catch (const std::exception& error) {
      auto [reason, place] = reason_and_place(error.what());
      constexpr std::string_view kRaised = "Jinja Exception: ";
      const std::size_t raised = reason.find(kRaised);
      const std::string what = raised != std::string::npos
                                   ? "the chat template refuses this conversation: " +
                                         reason.substr(raised + kRaised.size())
                                   : "the chat template cannot render this conversation: " + reason;
      throw Error(
          Fault::bad_file,
          {what,
           conversation.where + "\n" + state_->where + (place.empty() ? "" : " (" + place + ")"),
           "Change the messages to what the model's template takes, or set "
           "data.chat_template to the path of another .jinja file."});
    }
    if (!is_utf8(out.text)) {
      throw Error(Fault::bad_file, {"the chat template cuts a character in two",
                                    conversation.where + "\n" + state_->where,
                                    "Set data.chat_template to the path of another .jinja file."});
    }
    return out;
  };
  Rendered out = run(conversation);
  if (marked != kAll) return out;

  // Does a message spell a control token out? Then make sure that every control token outside the
  // marks is the template's own: it must be there as well when the messages' ones are blanked.
  Conversation blank;
  bool spelt = false;
  const auto blank_tokens = [&](std::string& text) {
    for (const Tokenizer::AddedMatch& match : state_->tokenizer.find_added(text, {})) {
      std::fill(text.begin() + static_cast<std::ptrdiff_t>(match.at.begin),
                text.begin() + static_cast<std::ptrdiff_t>(match.at.end), 'x');
      spelt = true;
    }
  };
  blank = conversation;
  for (Message& message : blank.messages) {
    for (auto& [key, value] : message.fields.items()) {
      if (key != "role") for_each_string(value, blank_tokens);
    }
  }
  for_each_string(blank.tools, blank_tokens);
  if (!spelt) return out;

  const auto same = [](const Tokenizer::AddedMatch& a, const Tokenizer::AddedMatch& b) {
    return a.id == b.id;
  };
  const auto found = state_->tokenizer.find_added(out.text, out.contents);
  const Rendered clean = run(blank);
  const auto wanted = state_->tokenizer.find_added(clean.text, clean.contents);
  if (std::equal(found.begin(), found.end(), wanted.begin(), wanted.end(), same)) return out;
  if (clean.text.size() != out.text.size()) {
    throw Error(
        Fault::bad_file,
        {"a message spells a control token out, and the chat template hides where it ends up",
         conversation.where + "\n" + state_->where,
         "Take the control token out of the message's text."});
  }
  std::size_t next = 0;
  for (const Tokenizer::AddedMatch& match : found) {
    while (next < wanted.size() && wanted[next].at.begin < match.at.begin) ++next;
    if (next < wanted.size() && wanted[next].at == match.at && wanted[next].id == match.id)
      continue;
    out.contents.push_back(match.at);
  }
  std::sort(out.contents.begin(), out.contents.end(),
            [](ByteRange a, ByteRange b) { return a.begin < b.begin; });
  std::vector<ByteRange> joined;
  for (const ByteRange range : out.contents) {
    if (!joined.empty() && range.begin <= joined.back().end) {
      joined.back().end = std::max(joined.back().end, range.end);
    } else {
      joined.push_back(range);
    }
  }
  out.contents = std::move(joined);
  return out;
}

const std::string& ChatTemplate::digest() const { return state_->digest; }
const std::string& ChatTemplate::source() const { return state_->source; }
const std::string& ChatTemplate::where() const { return state_->where; }
const Tokenizer& ChatTemplate::tokenizer() const { return state_->tokenizer; }

}  // namespace tailor
