#include "recipes/fields.h"

#include <algorithm>
#include <cmath>

namespace tailor {
namespace {

/// "lora.rank is 8.5, a whole number is needed"
void wrong_value(const YamlNode& node, const std::string& key, const std::string& needed,
                 const std::string& mend, Problems& problems) {
  problems.add(key + " is " + node.shown() + ", " + needed + " is needed", node.place, key, mend);
}

/// Reports what no type accepts: nothing, lists, sections, words with two meanings. True: go on.
bool is_clear_scalar(const YamlNode& node, const std::string& key, const std::string& needed,
                     Problems& problems) {
  const std::string name = leaf_of(key);
  if (node.is_null()) {
    problems.add(key + " has no value, " + needed + " is needed", node.place, key,
                 "Write a value, or leave the line out for the default.");
    return false;
  }
  if (node.kind != YamlNode::Kind::scalar) {
    wrong_value(node, key, needed, "Write one value after `" + name + ":`.", problems);
    return false;
  }
  if (node.quoted || scalar_meaning(node.text) != ScalarMeaning::ambiguous) return true;
  const bool number = node.text.find_first_of("0123456789") != std::string::npos;
  std::string mend;
  if (number) {
    std::string plain = node.text;
    plain.erase(0, std::min(plain.find_first_not_of('0'), plain.size() - 1));
    mend = scalar_meaning(plain) == ScalarMeaning::integer
               ? "Write " + plain + " if that is what you mean; for text put it in quotes."
               : "Write the number in plain decimal digits; for text put it in quotes.";
  } else {
    mend = "Write true or false; for text put it in quotes.";
  }
  problems.add(key + " is " + node.text + ", which YAML readers take in different ways", node.place,
               key, mend);
  return false;
}

/// As is_clear_scalar, and quotes around what should be a number or a truth value are named.
bool is_unquoted(const YamlNode& node, const std::string& key, const std::string& needed,
                 Problems& problems) {
  if (!is_clear_scalar(node, key, needed, problems)) return false;
  if (!node.quoted) return true;
  wrong_value(node, key, needed,
              "Quotes make it text: write " + leaf_of(key) + ": " + node.text + ".", problems);
  return false;
}

std::string bound_text(double value) {
  return std::abs(value) < 1e15 && std::trunc(value) == value
             ? count_text(static_cast<std::int64_t>(value))
             : exact_text(value);
}

}  // namespace

bool NumberRange::holds(double value) const {
  if (!std::isfinite(value)) return false;
  return (low_open ? value > low : value >= low) && (high_open ? value < high : value <= high);
}

std::string NumberRange::text() const {
  std::string out;
  if (std::isfinite(low)) out = (low_open ? "above " : "at least ") + bound_text(low);
  if (std::isfinite(high)) {
    if (!out.empty()) out += " and ";
    out += (high_open ? "below " : "at most ") + bound_text(high);
  }
  return out.empty() ? "a finite number" : out;
}

std::string leaf_of(std::string_view key) {
  const std::size_t dot = key.rfind('.');
  return std::string(dot == std::string_view::npos ? key : key.substr(dot + 1));
}

bool is_word(const YamlNode& node, std::string_view word) {
  return node.kind == YamlNode::Kind::scalar && !node.quoted && node.text == word;
}

std::optional<std::int64_t> read_integer(const YamlNode& node, const std::string& key,
                                         std::int64_t low, std::int64_t high, Problems& problems) {
  const std::string needed = "a whole number";
  if (!is_unquoted(node, key, needed, problems)) return std::nullopt;
  const NumberRange range{static_cast<double>(low), static_cast<double>(high), false, false};
  const std::optional<std::int64_t> value = parse_integer(node.text);
  if (!value) {
    const std::optional<double> number = parse_number(node.text);
    const bool whole = number && std::trunc(*number) == *number && std::abs(*number) < 1e15;
    wrong_value(node, key, needed,
                whole ? "Write " + std::to_string(static_cast<std::int64_t>(*number)) + "."
                      : "Write a whole number, " + range.text() + ".",
                problems);
    return std::nullopt;
  }
  if (*value < low || *value > high) {
    const bool below = *value < low;
    problems.add(key + " is " + node.text + ", at " +
                     (below ? "least " + count_text(low) : "most " + count_text(high)) +
                     " is needed",
                 node.place, key, "Write a whole number, " + range.text() + ".");
    return std::nullopt;
  }
  return value;
}

std::optional<double> read_number(const YamlNode& node, const std::string& key,
                                  const NumberRange& range, Problems& problems) {
  const std::string needed = "a number";
  if (!is_unquoted(node, key, needed, problems)) return std::nullopt;
  if (scalar_meaning(node.text) == ScalarMeaning::not_finite) {
    wrong_value(node, key, "a finite number", "Write a number, " + range.text() + ".", problems);
    return std::nullopt;
  }
  const std::optional<double> value = parse_number(node.text);
  if (!value) {
    wrong_value(node, key, needed, "Write a number, " + range.text() + ".", problems);
    return std::nullopt;
  }
  if (!range.holds(*value)) {
    problems.add(key + " is " + node.text + ", it must be " + range.text(), node.place, key,
                 "Write a number " + range.text() + ".");
    return std::nullopt;
  }
  return value;
}

std::optional<bool> read_boolean(const YamlNode& node, const std::string& key, Problems& problems) {
  if (!is_unquoted(node, key, "true or false", problems)) return std::nullopt;
  if (scalar_meaning(node.text) != ScalarMeaning::boolean) {
    wrong_value(node, key, "true or false", "Write true or false.", problems);
    return std::nullopt;
  }
  return lower(node.text) == "true";
}

std::optional<std::string> read_string(const YamlNode& node, const std::string& key,
                                       Problems& problems) {
  if (!is_clear_scalar(node, key, "text", problems)) return std::nullopt;
  if (!node.quoted && scalar_meaning(node.text) != ScalarMeaning::text) {
    wrong_value(node, key, "text", "Put it in quotes: \"" + node.text + "\".", problems);
    return std::nullopt;
  }
  if (trim(node.text).empty() || node.text.find('\0') != std::string::npos) {
    wrong_value(node, key, "text that is not empty", "Write a value, or leave the line out.",
                problems);
    return std::nullopt;
  }
  return node.text;
}

std::optional<std::int64_t> read_bytes(const YamlNode& node, const std::string& key,
                                       Problems& problems) {
  const std::string needed = "a size such as 24GiB, 24GB or 24000000";
  if (!is_clear_scalar(node, key, needed, problems)) return std::nullopt;
  const std::optional<std::int64_t> value = parse_bytes(node.text);
  if (value) return value;
  std::string mend = "Write a size with its unit, such as 24GiB (2^30 bytes each) or 24GB (10^9).";
  const std::string word = lower(node.text);
  const std::size_t digits = word.find_last_of("0123456789");
  if (digits != std::string::npos) {
    const std::string unit(trim(std::string_view(word).substr(digits + 1)));
    const std::string number(node.text.substr(0, digits + 1));
    for (const char c : {'k', 'm', 'g', 't'}) {
      const std::string letter(1, c);
      const std::string upper(1, c == 'k' ? 'K' : static_cast<char>(c - 'a' + 'A'));
      if (unit != letter && unit != letter + "b" && unit != letter + "ib") continue;
      if (!parse_number(number).has_value()) continue;
      mend = "Write " + number + upper + "iB (powers of 1024) or " + number + upper +
             "B (powers of 1000).";
    }
  }
  wrong_value(node, key, needed, mend, problems);
  return std::nullopt;
}

std::optional<std::int64_t> read_usd(const YamlNode& node, const std::string& key,
                                     bool zero_allowed, Problems& problems) {
  const std::string needed = "an amount in dollars such as 1.19";
  if (!is_clear_scalar(node, key, needed, problems)) return std::nullopt;
  const std::optional<std::int64_t> micros = parse_micros(node.text);
  if (!micros) {
    wrong_value(node, key, needed, "Write digits with at most six behind the point, and no sign.",
                problems);
    return std::nullopt;
  }
  if (*micros == 0 && !zero_allowed) {
    problems.add(key + " is " + node.text + ", it must be above 0", node.place, key,
                 "Write an amount above 0.");
    return std::nullopt;
  }
  return micros;
}

std::optional<std::size_t> read_word(const YamlNode& node, const std::string& key,
                                     const std::vector<std::string>& words, Problems& problems) {
  const std::string needed = words.size() == 1 ? words.front() : "one of " + join(words, ", ");
  if (!is_clear_scalar(node, key, needed, problems)) return std::nullopt;
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (words[i] == node.text) return i;
  }
  const std::string near = nearest_name(node.text, words);
  wrong_value(node, key, needed,
              near.empty() ? "Write " + needed + "." : "Did you mean " + near + "?", problems);
  return std::nullopt;
}

std::optional<std::vector<const YamlNode*>> read_list(const YamlNode& node, const std::string& key,
                                                      bool one_is_list, Problems& problems) {
  std::vector<const YamlNode*> items;
  if (node.kind == YamlNode::Kind::sequence) {
    for (const YamlNode& item : node.items) items.push_back(&item);
  } else if (one_is_list && !node.is_null()) {
    items.push_back(&node);
  } else {
    problems.add(
        key + (node.is_null() ? " has no value" : " is " + node.shown()) + ", a list is needed",
        node.place, key, "Write a list: " + leaf_of(key) + ": [first, second].");
    return std::nullopt;
  }
  if (items.empty()) {
    problems.add(key + " is an empty list", node.place, key, "Name at least one.");
    return std::nullopt;
  }
  return items;
}

void refuse_unknown_keys(const YamlNode& node, const std::string& path,
                         const std::vector<std::string>& known, Problems& problems) {
  for (const YamlNode& key : node.keys) {
    if (std::find(known.begin(), known.end(), key.text) != known.end()) continue;
    const std::string near = nearest_name(key.text, known);
    problems.add(
        "unknown key '" + key.text + "'", key.place,
        path.empty() ? key.text : path + "." + key.text,
        near.empty() ? "Known here: " + join(known, ", ") + "." : "Did you mean " + near + "?");
  }
}

}  // namespace tailor
