#pragma once

#include <string>
#include <string_view>

namespace tailor {

/// True when `descriptor` is a terminal that takes colour: NO_COLOR is unset and TERM not "dumb".
bool takes_colour(int descriptor);

/// `text` in bold where stdout takes colour.
std::string heading(std::string_view text);

/// One line on stderr that overwrites itself, on a terminal only; elsewhere it says nothing.
class ProgressLine {
 public:
  ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  ~ProgressLine();  ///< wipes the line
  void show(const std::string& text);

 private:
  bool on_;
  double last_ = 0;
  bool shown_ = false;
};

}  // namespace tailor
