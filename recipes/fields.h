#pragma once

#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/text.h"
#include "recipes/scalars.h"
#include "recipes/yaml.h"

namespace tailor {

/// Typed reading of YAML scalars with messages. Every function reports to `problems` under the
/// dotted `key` and returns nothing when the value is not what is needed. Shared by recipes,
/// machine profiles and price books.

/// The values a number may take; open ends exclude the bound itself.
struct NumberRange {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  bool low_open = false, high_open = false;
  bool holds(double value) const;
  /// "at least 0", "above 0 and below 1": completes "... is needed".
  std::string text() const;
};

std::optional<std::int64_t> read_integer(const YamlNode& node, const std::string& key,
                                         std::int64_t low, std::int64_t high, Problems& problems);
std::optional<double> read_number(const YamlNode& node, const std::string& key,
                                  const NumberRange& range, Problems& problems);
std::optional<bool> read_boolean(const YamlNode& node, const std::string& key, Problems& problems);
/// Text that YAML readers agree is text, not empty.
std::optional<std::string> read_string(const YamlNode& node, const std::string& key,
                                       Problems& problems);
std::optional<std::int64_t> read_bytes(const YamlNode& node, const std::string& key,
                                       Problems& problems);
/// Dollars as micro-dollars, exactly; above 0 unless `zero_allowed`.
std::optional<std::int64_t> read_usd(const YamlNode& node, const std::string& key,
                                     bool zero_allowed, Problems& problems);
/// One of `words`; the index.
std::optional<std::size_t> read_word(const YamlNode& node, const std::string& key,
                                     const std::vector<std::string>& words, Problems& problems);
/// A list; a single value counts as a list of one where `one_is_list`.
std::optional<std::vector<const YamlNode*>> read_list(const YamlNode& node, const std::string& key,
                                                      bool one_is_list, Problems& problems);

/// True for the unquoted scalar `word` (auto, all, ...).
bool is_word(const YamlNode& node, std::string_view word);

/// Reports every key of map `node` that is not in `known`.
void refuse_unknown_keys(const YamlNode& node, const std::string& path,
                         const std::vector<std::string>& known, Problems& problems);

/// The last part of a dotted key: "rank" of "lora.rank".
std::string leaf_of(std::string_view key);

}  // namespace tailor
