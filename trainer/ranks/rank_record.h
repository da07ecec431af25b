#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tailor {

/// alive; left: done, reads on until all are; gone: done and away; failed.
enum class Life { alive, left, gone, failed };

/// What a rank says of itself, over and over.
struct RankRecord {
  std::int64_t beats = 0;
  Life life = Life::alive;
  std::string phase = "start";
  std::vector<std::string> calls;  ///< of its communicators, under way
  int exit_code = 0;               ///< failed: with what, whose fault, in which words
  int cause = -1;                  ///< a rank, itself when it failed by itself; -1: not known
  std::string words;

  std::string doing() const;
  std::string dump() const;
  /// Throws Error{bad_file}.
  static RankRecord read(const std::string& text);
};

}  // namespace tailor
