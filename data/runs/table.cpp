#include "data/runs/table.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

std::size_t width_of(std::string_view text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U;
  }));
}

}  // namespace

TextTable::TextTable(std::vector<std::string> columns) {
  for (std::string& name : columns) {
    right_.push_back(name.starts_with('>'));
    if (right_.back()) name.erase(0, 1);
  }
  rows_.push_back(std::move(columns));
}

void TextTable::add(std::vector<std::string> cells) {
  TAILOR_CHECK(cells.size() == right_.size());
  for (std::string& cell : cells) cell = visible_text(cell);
  rows_.push_back(std::move(cells));
}

std::string TextTable::text(std::string_view indent) const {
  std::vector<std::size_t> widths(right_.size());
  for (const auto& row : rows_) {
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width_of(row[i]));
  }
  std::string out;
  for (const auto& row : rows_) {
    std::string line(indent);
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (i != 0) line += "  ";
      const std::string padding(widths[i] - width_of(row[i]), ' ');
      line += right_[i] ? padding + row[i] : row[i] + padding;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::string fixed_text(double value, int decimals) {
  std::array<char, 400> buffer{};
  std::snprintf(buffer.data(), buffer.size(), "%.*f", decimals, value);
  return buffer.data();
}

int decimals_for(double value) {
  const double size = std::abs(value);
  return size >= 10 ? 2 : size >= 1 ? 3 : size >= 0.1 ? 4 : size >= 0.01 ? 5 : 6;
}

std::string usd_or_unknown(const std::optional<std::int64_t>& usd_micros) {
  return usd_micros.has_value() ? usd_text(*usd_micros) : "unknown";
}

std::string minute_text(std::int64_t unix_ms) {
  std::string text = utc_text(unix_ms).substr(0, 16);
  text[10] = ' ';
  return text;
}

std::string counted(std::int64_t count, std::string_view noun) {
  return count_text(count) + " " + std::string(noun) + (count == 1 ? "" : "s");
}

}  // namespace tailor
