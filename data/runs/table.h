#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tailor {

/// Rows of cells as aligned text, columns two spaces apart. A column whose name begins with '>' is
/// aligned to the right. Widths count characters, not bytes.
class TextTable {
 public:
  explicit TextTable(std::vector<std::string> columns);
  /// Cells are shown as visible_text().
  void add(std::vector<std::string> cells);
  /// Every line begins with `indent` and ends with a newline.
  std::string text(std::string_view indent = "") const;

 private:
  std::vector<bool> right_;
  std::vector<std::vector<std::string>> rows_;  ///< the first one is the heading
};

/// `text` as one line for a terminal: line ends and tabs as spaces; other control characters, those
/// that turn the direction of writing, and what is not UTF-8 as U+FFFD.
std::string visible_text(std::string_view text);

/// `value` with a fixed number of decimals.
std::string fixed_text(double value, int decimals);
/// Decimals that show three to five digits of sums of this size.
int decimals_for(double value);
/// usd_text, or "unknown".
std::string usd_or_unknown(const std::optional<std::int64_t>& usd_micros);
/// "2026-11-23 22:37" in UTC.
std::string minute_text(std::int64_t unix_ms);
/// "3 attempts", "1 attempt".
std::string counted(std::int64_t count, std::string_view noun);

}  // namespace tailor
