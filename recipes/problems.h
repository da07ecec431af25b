#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/error.h"

namespace tailor {

/// Where text came from: a file, or one `key=value` of the command line. Shared by all its nodes.
struct TextSource {
  std::string name;  ///< path as the user gave it; for an override its whole text
  std::string text;
  bool is_override = false;
};

/// A position in a source; line 0 means the source as a whole.
struct Place {
  std::shared_ptr<const TextSource> source;
  int line = 0, column = 0;  ///< 1-based; columns count characters, not bytes
};

/// "recipes/x.yaml:12" or "override lora.rank=4".
std::string place_text(const Place& place);

/// Collects what is wrong with a file, so that the user mends everything in one go.
class Problems {
 public:
  /// `key` is the dotted name the problem is about, or empty.
  void add(std::string what, const Place& place, std::string key, std::string mend);
  bool any() const { return !problems_.empty(); }
  std::size_t count() const { return problems_.size(); }

  /// Throws one Error with everything that was added, in the order of the file; returns if nothing
  /// was. One problem prints like any error; several as a numbered list with `subject` ("recipe
  /// x.yaml") in the headline and `mend` at the end.
  void throw_if_any(Fault fault, const std::string& subject, const std::string& mend) const;

 private:
  struct Problem {
    std::string what;
    Place place;
    std::string key, mend;
  };
  static std::string where_text(const Problem& problem);
  std::vector<Problem> problems_;
};

}  // namespace tailor
