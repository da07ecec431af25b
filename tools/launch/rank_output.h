#pragma once

#include <string>
#include <string_view>

namespace tailor {

/// What comes out of a pipe of rank r, as whole lines that begin with "[rank r] ".
class RankLines {
 public:
  explicit RankLines(int rank) : prefix_("[rank " + std::to_string(rank) + "] ") {}

  /// The lines that `bytes` completes, each with its prefix and newline; a line longer than 64 KiB
  /// is cut.
  std::string add(std::string_view bytes);
  /// What is left without a newline, as a line.
  std::string finish();

 private:
  std::string prefix_, rest_;
};

/// The end of a stream: its last 64 KiB, cut at a line where it was longer.
class TailText {
 public:
  void add(std::string_view bytes);
  std::string text() const;

 private:
  std::string kept_;
  bool cut_ = false;
};

}  // namespace tailor
