#pragma once

#include <string>
#include <string_view>

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

}  // namespace tailor
