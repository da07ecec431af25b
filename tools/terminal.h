#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tailor {

/// True when `descriptor` is a terminal that takes colour: NO_COLOR is unset and TERM not "dumb".
bool takes_colour(int descriptor);

/// True when `descriptor` is a terminal on which lines can be drawn over: TERM is not "dumb".
bool moves_cursor(int descriptor);

/// `text` in bold where stdout takes colour.
std::string heading(std::string_view text);

/// Progress on stderr: one line that overwrites itself on a terminal; elsewhere nothing, or with
/// `say_elsewhere` a plain line every ten seconds.
class ProgressLine {
 public:
  explicit ProgressLine(bool say_elsewhere = false);
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  ~ProgressLine();  ///< wipes the line
  void show(const std::string& text);
  /// A line of its own.
  void say(const std::string& text);

 private:
  bool terminal_, say_elsewhere_;
  double last_;
  bool shown_ = false;
};

/// "packing 12.5 % of 3.2 GB, 410 MB/s, 6.8 s to go": `done` of `bytes`, of which `before` were
/// there when this process began, `seconds` ago. Speed and time to go once they can be told.
std::string progress_text(std::string_view doing, std::int64_t done, std::int64_t before,
                          std::int64_t bytes, double seconds);

/// What a verification found, a line each: the first twenty, and how many more there are.
std::string problems_text(const std::vector<std::string>& problems);

}  // namespace tailor
