#include "recipes/yaml.h"

#include <yaml-cpp/anchor.h>
#include <yaml-cpp/emitterstyle.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <map>
#include <sstream>
#include <utility>

#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "recipes/scalars.h"

namespace tailor {
namespace {

/// Thrown inside this file to leave yaml-cpp's parser after a problem was reported.
struct GiveUp {};

int characters(std::string_view text) {
  return static_cast<int>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U;
  }));
}

/// Builds the tree from yaml-cpp's events.
class Builder final : public YAML::EventHandler {
 public:
  Builder(std::shared_ptr<const TextSource> source, std::size_t skip, Problems& problems)
      : source_(std::move(source)), skip_(skip), problems_(problems) {
    std::size_t begin = 0;
    for (;;) {  // line starts, so that a byte column becomes a character column
      line_starts_.push_back(begin);
      begin = source_->text.find('\n', begin);
      if (begin == std::string::npos) break;
      ++begin;
    }
  }

  std::optional<YamlNode> root;

  Place place_of(const YAML::Mark& mark) const {
    if (mark.is_null()) return {source_, 0, 0};
    const auto line = static_cast<std::size_t>(std::max(0, mark.line));
    if (line >= line_starts_.size()) return {source_, 0, 0};
    const std::size_t begin = line_starts_[line];
    const std::size_t end = std::min(source_->text.find('\n', begin), source_->text.size());
    const std::size_t offset =
        static_cast<std::size_t>(std::max(0, mark.column)) + (line == 0 ? skip_ : 0);
    const std::string_view text = std::string_view(source_->text).substr(begin, end - begin);
    return {source_, mark.line + 1, characters(text.substr(0, std::min(offset, text.size()))) + 1};
  }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    YamlNode node;
    node.place = place_of(mark);
    add(std::move(node), anchor);
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto found = anchored_.find(anchor);
    if (found == anchored_.end()) {
      stop("an alias stands inside the value it names", mark, "Write the value out.");
    }
    count(size_of(found->second), mark);
    YamlNode copy = found->second;
    copy.place = place_of(mark);
    add(std::move(copy), 0);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    check_tag(mark, tag);
    YamlNode node;
    node.kind = YamlNode::Kind::scalar;
    node.text = value;
    node.quoted = tag == "!";
    node.place = place_of(mark);
    add(std::move(node), anchor);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, YamlNode::Kind::sequence);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, YamlNode::Kind::map);
  }
  void OnMapEnd() override { close(); }

 private:
  struct Open {
    YamlNode node;
    YAML::anchor_t anchor = 0;
    bool has_key = false;  ///< a key waits for its value
  };

  [[noreturn]] void stop(const std::string& what, const YAML::Mark& mark, const std::string& mend) {
    problems_.add(what, place_of(mark), "", mend);
    throw GiveUp{};
  }
  void check_tag(const YAML::Mark& mark, const std::string& tag) {
    if (tag.empty() || tag == "?" || tag == "!") return;
    problems_.add("a YAML tag, which is not used here: " + tag, place_of(mark), "",
                  "Leave the tag out; quotes make a value text.");
  }
  static int size_of(const YamlNode& node) {
    int size = 1 + static_cast<int>(node.keys.size());
    for (const YamlNode& item : node.items) size += size_of(item);
    return size;
  }
  void count(int nodes, const YAML::Mark& mark) {
    nodes_ += nodes;
    if (nodes_ > kYamlNodesMax) {
      stop("more than " + count_text(kYamlNodesMax) + " values, aliases counted as often as used",
           mark, "Write a smaller file; no value needs an alias.");
    }
  }
  void open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
            YamlNode::Kind kind) {
    check_tag(mark, tag);
    if (open_.size() >= static_cast<std::size_t>(kYamlDepthMax)) {
      stop("nested deeper than " + std::to_string(kYamlDepthMax) + " levels", mark,
           "Check the brackets and the indentation.");
    }
    Open opened;
    opened.node.kind = kind;
    opened.node.place = place_of(mark);
    opened.anchor = anchor;
    count(1, mark);
    open_.push_back(std::move(opened));
  }
  void close() {
    Open closed = std::move(open_.back());
    open_.pop_back();
    add(std::move(closed.node), closed.anchor, true);
  }
  void add(YamlNode node, YAML::anchor_t anchor, bool counted = false) {
    if (!counted && ++nodes_ > kYamlNodesMax) {
      problems_.add("more than " + count_text(kYamlNodesMax) + " values", node.place, "",
                    "Write a smaller file.");
      throw GiveUp{};
    }
    if (anchor != 0) anchored_[anchor] = node;
    if (open_.empty()) {
      root = std::move(node);
      return;
    }
    Open& parent = open_.back();
    if (parent.node.kind == YamlNode::Kind::sequence) {
      parent.node.items.push_back(std::move(node));
    } else if (!parent.has_key) {
      add_key(parent, std::move(node));
    } else {
      const YamlNode& key = parent.node.keys.back();
      // An empty value's mark is the next token, maybe lines below: the key is what to look at.
      if (node.is_null() && node.place.line != key.place.line) node.place = key.place;
      parent.node.items.push_back(std::move(node));
      parent.has_key = false;
    }
  }
  void add_key(Open& parent, YamlNode key) {
    if (key.kind != YamlNode::Kind::scalar) {
      problems_.add("a key must be a name, found " + key.shown(), key.place, "",
                    "Write the key as one word, or put it in quotes.");
      key.kind = YamlNode::Kind::scalar;
      key.items.clear();
      key.keys.clear();
    } else if (const YamlNode* first = first_of(parent.node, key.text)) {
      problems_.add("duplicate key '" + key.text + "'", key.place, path_of(key.text),
                    "It stands on line " + std::to_string(first->place.line) +
                        " already; keep one of the two.");
    }
    parent.node.keys.push_back(std::move(key));
    parent.has_key = true;
  }
  /// Dotted name of a key of the innermost open map.
  std::string path_of(const std::string& key) const {
    std::string path;
    for (std::size_t i = 0; i + 1 < open_.size(); ++i) {
      if (open_[i].has_key) path += open_[i].node.keys.back().text + ".";
    }
    return path + key;
  }
  static const YamlNode* first_of(const YamlNode& map, const std::string& key) {
    for (const YamlNode& known : map.keys) {
      if (known.text == key) return &known;
    }
    return nullptr;
  }

  std::shared_ptr<const TextSource> source_;
  std::size_t skip_;
  Problems& problems_;
  std::vector<std::size_t> line_starts_;
  std::vector<Open> open_;
  std::map<YAML::anchor_t, YamlNode> anchored_;
  int nodes_ = 0;
};

/// What must hold before a YAML parser sees the text. False: do not parse.
bool check_characters(const std::shared_ptr<const TextSource>& source, Problems& problems) {
  const std::string& text = source->text;
  const bool utf8 = is_utf8(text);
  bool good = true;
  int line = 1;
  std::size_t line_begin = 0;
  bool in_indentation = true, tab_seen = false;
  for (std::size_t at = 0; at < text.size(); ++at) {
    const char c = text[at];
    const auto column = [&] {
      return characters(std::string_view(text).substr(line_begin, at - line_begin)) + 1;
    };
    if (c == '\n') {
      ++line;
      line_begin = at + 1;
      in_indentation = true;
      tab_seen = false;
      continue;
    }
    if (in_indentation && c == '\t' && !tab_seen) {
      const std::size_t content = text.find_first_not_of(" \t\r", at);
      tab_seen = true;
      if (content != std::string::npos && text[content] != '\n' && text[content] != '#') {
        problems.add("a tab in the indentation", {source, line, column()}, "",
                     "Indent with spaces; YAML does not allow tabs there.");
        good = false;
      }
    }
    if (c != ' ' && c != '\t') in_indentation = false;
    const bool control = static_cast<unsigned char>(c) < 0x20 && c != '\t' && c != '\r';
    if (control || c == 0x7F) {
      problems.add(
          "a control character (byte " + std::to_string(static_cast<unsigned char>(c)) + ")",
          {source, line, column()}, "", "Remove it; recipes are plain text.");
      return false;
    }
    if (!utf8 && static_cast<unsigned char>(c) >= 0x80) {
      std::size_t length = 1;
      while (length < 4 && at + length < text.size() &&
             (static_cast<unsigned char>(text[at + length]) & 0xC0U) == 0x80U) {
        ++length;
      }
      if (!is_utf8(std::string_view(text).substr(at, length))) {
        problems.add("not UTF-8 text (byte " + std::to_string(static_cast<unsigned char>(c)) + ")",
                     {source, line, column()}, "", "Save the file as UTF-8.");
        return false;
      }
      at += length - 1;
    }
  }
  return good;
}

}  // namespace

const YamlNode* YamlNode::find(std::string_view key) const {
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (keys[i].text == key) return &items[i];
  }
  return nullptr;
}

YamlNode* YamlNode::find(std::string_view key) {
  return const_cast<YamlNode*>(std::as_const(*this).find(key));
}

std::string YamlNode::shown() const {
  switch (kind) {
    case Kind::null:
      return "nothing";
    case Kind::sequence:
      return "a list";
    case Kind::map:
      return "a section";
    case Kind::scalar:
      break;
  }
  std::string cut = text.substr(0, 60);
  while (!is_utf8(cut) && !cut.empty()) cut.pop_back();
  if (cut.size() < text.size()) cut += "...";
  return quoted ? "\"" + cut + "\"" : cut;
}

std::optional<YamlNode> parse_yaml(const std::shared_ptr<const TextSource>& source,
                                   Problems& problems, std::size_t skip) {
  if (source->text.size() > kYamlBytesMax) {
    problems.add("the text has " + bytes_text(static_cast<std::int64_t>(source->text.size())) +
                     ", at most 1 MiB is read",
                 {source, 0, 0}, "", "Name a smaller file.");
    return std::nullopt;
  }
  if (!check_characters(source, problems)) return std::nullopt;
  std::istringstream stream(source->text.substr(skip));
  Builder builder(source, skip, problems);
  try {
    YAML::Parser parser(stream);
    if (!parser.HandleNextDocument(builder)) {
      YamlNode nothing;
      nothing.place = {source, 0, 0};
      return nothing;
    }
    std::optional<YamlNode> root = std::move(builder.root);
    builder.root.reset();
    if (parser.HandleNextDocument(builder)) {
      problems.add("a second YAML document starts",
                   builder.root ? builder.root->place : Place{source, 0, 0}, "",
                   "Keep one document a file: remove the line `---`.");
    }
    return root;
  } catch (const GiveUp&) {
  } catch (const YAML::Exception& e) {
    problems.add("not valid YAML: " + e.msg, builder.place_of(e.mark), "",
                 "Check indentation, colons, quotes and brackets up to the mark.");
  }
  return std::nullopt;
}

std::shared_ptr<const TextSource> read_source(const std::string& path, const std::string& noun) {
  std::error_code error;
  const auto status = fs::status(path, error);
  const auto fail = [&](const std::string& what) -> Error {
    return {Fault::usage,
            {what, path, "Check the path; relative paths start at the working directory."}};
  };
  if (!fs::exists(status)) throw fail("there is no " + noun + " at this path");
  if (!fs::is_regular_file(status)) throw fail("this " + noun + " is not a file");
  const auto size = fs::file_size(path, error);
  if (!error && size > kYamlBytesMax) {
    throw Error(Fault::usage,
                {"this " + noun + " has " + bytes_text(static_cast<std::int64_t>(size)) +
                     ", at most 1 MiB is read",
                 path, "Name the " + noun + " itself; is this a data file?"});
  }
  auto source = std::make_shared<TextSource>();
  source->name = path;
  source->text = read_text(path);
  return source;
}

std::string yaml_text(std::string_view text) {
  constexpr std::string_view kSafe =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./+-@:";
  const bool plain = !text.empty() && text.find_first_not_of(kSafe) == std::string_view::npos &&
                     text.front() != '-' && text.front() != ':' && text.front() != '@' &&
                     text.back() != ':' && scalar_meaning(text) == ScalarMeaning::text;
  return plain ? std::string(text) : Json(text).dump();
}

}  // namespace tailor
