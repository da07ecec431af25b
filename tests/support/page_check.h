#pragma once

#include <algorithm>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace tailor::testing_support {

/// A strict reading of a page as XML, with no more than an element's name and its attributes
/// understood. What is not well-formed, or could load or run anything, is a problem.
class PageCheck {
 public:
  explicit PageCheck(std::string_view page) : page_(page) { read(); }

  std::vector<std::string> problems;
  std::string text;  ///< of all elements but style, entities as they are written

 private:
  void read() {
    constexpr std::string_view kDoctype = "<!DOCTYPE html>";
    if (!page_.starts_with(kDoctype)) problems.emplace_back("no doctype");
    at_ = kDoctype.size();
    while (at_ < page_.size()) {
      if (page_[at_] == '<') {
        tag();
      } else {
        characters();
      }
    }
    if (!open_.empty()) problems.push_back("not closed: " + open_.back());
  }

  void characters() {
    const std::size_t end = std::min(page_.find('<', at_), page_.size());
    const std::string part(page_.substr(at_, end - at_));
    at_ = end;
    check_characters(part, "text");
    if (open_.empty() || open_.back() == "style") {
      for (const char* bad : {"url(", "@import", "http:", "https:", "expression("}) {
        if (part.find(bad) != std::string::npos) problems.push_back(std::string("style: ") + bad);
      }
      return;
    }
    text += part;
  }

  void check_characters(const std::string& part, const std::string& where) {
    for (std::size_t i = 0; i < part.size(); ++i) {
      const auto c = static_cast<unsigned char>(part[i]);
      if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7F) {
        problems.push_back("control character in " + where);
      }
      if (c == '>' && open_.back() != "style") problems.push_back("bare > in " + where);
      if (c != '&') continue;
      const std::size_t end = part.find(';', i);
      static const std::set<std::string> kEntities = {"amp", "lt", "gt", "quot", "#39"};
      if (end == std::string::npos || !kEntities.contains(part.substr(i + 1, end - i - 1))) {
        problems.push_back("bare & in " + where);
      }
    }
  }

  void tag() {
    const std::size_t end = page_.find('>', at_);
    if (end == std::string_view::npos) {
      problems.emplace_back("a tag without end");
      at_ = page_.size();
      return;
    }
    std::string inner(page_.substr(at_ + 1, end - at_ - 1));
    at_ = end + 1;
    if (inner.starts_with("/")) {
      if (open_.empty() || open_.back() != inner.substr(1)) {
        problems.push_back("</" + inner.substr(1) + "> closes " +
                           (open_.empty() ? "" : open_.back()));
      } else {
        open_.pop_back();
      }
      return;
    }
    const bool empty = inner.ends_with("/");
    if (empty) inner.pop_back();
    const std::size_t name_end = std::min(inner.find(' '), inner.size());
    const std::string name = inner.substr(0, name_end);
    static const std::set<std::string> kElements = {
        "html",    "head", "meta", "title", "style",  "body",  "header", "footer",
        "section", "h1",   "h2",   "h3",    "p",      "span",  "dl",     "dt",
        "dd",      "div",  "i",    "b",     "ul",     "li",    "figure", "figcaption",
        "svg",     "g",    "path", "text",  "circle", "table", "thead",  "tbody",
        "tr",      "th",   "td",   "code",  "pre"};
    if (!kElements.contains(name)) problems.push_back("element <" + name + ">");
    attributes(name, inner.substr(name_end));
    if (!empty) open_.push_back(name);
  }

  void attributes(const std::string& element, std::string rest) {
    static const std::set<std::string> kAttributes = {
        "class",   "style", "lang",       "charset", "name",        "content",
        "viewBox", "role",  "aria-label", "title",   "d",           "x",
        "y",       "cx",    "cy",         "r",       "text-anchor", "transform"};
    std::set<std::string> seen;
    while (!rest.empty()) {
      const std::size_t equals = rest.find("=\"");
      const std::size_t end = equals == std::string::npos ? equals : rest.find('"', equals + 2);
      if (rest.front() != ' ' || end == std::string::npos) {
        problems.push_back("attributes of <" + element + ">:" + rest.substr(0, 40));
        return;
      }
      const std::string name = rest.substr(1, equals - 1);
      const std::string value = rest.substr(equals + 2, end - equals - 2);
      rest.erase(0, end + 1);
      if (!kAttributes.contains(name)) problems.push_back("attribute " + name);
      if (!seen.insert(name).second) problems.push_back("twice: " + name);
      if (value.find('<') != std::string::npos) problems.push_back("bare < in " + name);
      check_characters(value, name);
      if (name == "style" &&
          (value.find("url") != std::string::npos || value.find('&') != std::string::npos)) {
        problems.push_back("style: " + value);
      }
    }
  }

  std::string_view page_;
  std::size_t at_ = 0;
  std::vector<std::string> open_;
};

}  // namespace tailor::testing_support
