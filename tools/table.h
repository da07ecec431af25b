#pragma once

#include <string>
#include <string_view>

#include "data/runs/table.h"

namespace tailor {

/// The rows of a table whose columns need no names.
inline std::string rows_text(const TextTable& table, std::string_view indent) {
  const std::string text = table.text(indent);
  return text.substr(text.find('\n') + 1);
}

}  // namespace tailor
