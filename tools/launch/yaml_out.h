#pragma once

#include <string>

#include "base/json.h"

namespace tailor {

/// `document` as YAML, block style, keys in their order. A text that YAML could take for anything
/// else is quoted, one of several lines becomes a literal block where that is exact, so that
/// reading the YAML gives the same document.
std::string yaml_document(const Json& document);

}  // namespace tailor
