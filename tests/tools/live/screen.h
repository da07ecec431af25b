#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

namespace tailor::testing_support {

/// What a terminal that breaks its lines anew when its width changes would show: knows printable
/// characters, \r, \n, cursor up, erase below and colours; anything else is a problem.
class Screen {
 public:
  explicit Screen(std::size_t columns) : columns_(columns) {}

  void resize(std::size_t columns) { columns_ = columns; }

  /// May end inside a control sequence.
  void feed(std::string_view more) {
    const std::string text = pending_ + std::string(more);
    pending_.clear();
    for (std::size_t i = 0; i < text.size(); ++i) {
      if (text[i] == '\r') {
        // Of the row on the screen; behind a full row the cursor still belongs to it.
        column_ = (std::max<std::size_t>(column_, 1) - 1) / columns_ * columns_;
      } else if (text[i] == '\n') {
        ++line_;
        column_ = 0;
        if (line_ == lines_.size()) lines_.emplace_back();
      } else if (text[i] == '\033') {
        const std::size_t end = text.find_first_of("AJKm", i);
        if (end == std::string::npos) {
          pending_ = text.substr(i);
          return;
        }
        control(text.substr(i, end - i), text[end]);
        i = end;
      } else {
        put(text[i]);
      }
    }
  }

  /// Lines without colours, trailing empty ones left out.
  std::vector<std::string> lines() const {
    std::vector<std::string> out;
    for (const auto& line : lines_) {
      out.emplace_back();
      for (const std::string& cell : line) out.back() += cell;
    }
    while (!out.empty() && out.back().empty()) out.pop_back();
    return out;
  }
  std::string problem;
  int colours = 0;  ///< how often colour was set

 private:
  void put(char c) {
    std::vector<std::string>& line = lines_[line_];
    if ((static_cast<unsigned char>(c) & 0xC0U) == 0x80U) {
      line[column_ - 1] += c;  // the rest of a character
      return;
    }
    if (column_ < line.size()) {
      line[column_] = c;
    } else {
      line.emplace_back(1, c);
    }
    ++column_;
  }

  void control(std::string_view what, char kind) {
    const std::string number(what.substr(std::min<std::size_t>(2, what.size())));
    if (kind == 'A') {
      for (int n = std::max(1, std::atoi(number.c_str())); n > 0; --n) up();
    } else if (kind == 'J') {
      lines_.resize(line_ + 1);
      lines_[line_].resize(column_);
    } else if (kind == 'K' && number.empty()) {
      if (lines_[line_].size() > column_) lines_[line_].resize(column_);
    } else if (kind == 'm') {
      ++colours;
    } else {
      problem = "control sequence " + std::string(what.substr(1)) + kind;
    }
  }

  /// To the row above, which may be of the same line.
  void up() {
    if (column_ >= columns_) {
      column_ -= columns_;
    } else if (line_ > 0) {
      --line_;
      const std::size_t width = lines_[line_].size();
      column_ += width == 0 ? 0 : (width - 1) / columns_ * columns_;
    }
  }

  std::size_t columns_;
  std::vector<std::vector<std::string>> lines_ = std::vector<std::vector<std::string>>(1);
  std::size_t line_ = 0, column_ = 0;
  std::string pending_;
};

}  // namespace tailor::testing_support
