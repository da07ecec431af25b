#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "recipes/problems.h"

namespace tailor {

/// A YAML value with its position. Ours rather than yaml-cpp's, because that one forgets duplicate
/// keys and shares aliased nodes, and because recipes, machines and prices are read strictly.
struct YamlNode {
  enum class Kind { null, scalar, sequence, map };
  Kind kind = Kind::null;
  std::string text;     ///< of a scalar
  bool quoted = false;  ///< a scalar in quotes or a block scalar: always text
  Place place;
  std::vector<YamlNode> items;  ///< of a sequence; of a map the values
  std::vector<YamlNode> keys;   ///< of a map, scalars, as many as items

  bool is_map() const { return kind == Kind::map; }
  bool is_null() const { return kind == Kind::null; }
  /// The value under `key` of a map, or null.
  const YamlNode* find(std::string_view key) const;
  YamlNode* find(std::string_view key);
  /// What the user wrote, for messages: `8`, `"8"`, `a list`, `a section`, `nothing`.
  std::string shown() const;
};

/// Limits that no file of ours comes near; they bound what a hostile one can cost.
constexpr std::size_t kYamlBytesMax = 1U << 20U;
constexpr int kYamlDepthMax = 32;
constexpr int kYamlNodesMax = 20'000;  ///< after aliases are copied in

/// Parses one YAML document. What YAML allows and people get wrong is reported to `problems`: tabs
/// in indentation, duplicate keys, tags, several documents, text that is not UTF-8. Returns nothing
/// when the text could not be parsed at all; an empty text is a null node.
///
/// `skip` leaves that many bytes of the source's first line out (the `key=` of an override).
std::optional<YamlNode> parse_yaml(const std::shared_ptr<const TextSource>& source,
                                   Problems& problems, std::size_t skip = 0);

/// The file as a source. Throws Error{usage} naming `noun` ("recipe") when it cannot be read or is
/// larger than kYamlBytesMax.
std::shared_ptr<const TextSource> read_source(const std::string& path, const std::string& noun);

/// `text` as YAML that reads back as the same text: plain where that is safe, else in quotes.
std::string yaml_text(std::string_view text);

}  // namespace tailor
