#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "data/text/byte_range.h"

namespace tailor {

/// Unicode Normalization Form C (UAX #15) of well-formed UTF-8.
std::string to_nfc(std::string_view text);

/// The same, with `ranges` of `text` (sorted, disjoint) carried over to the result. Where several
/// characters become others together, the range covers all that came of them if it touched one.
std::string to_nfc(std::string_view text, std::vector<ByteRange>& ranges);

}  // namespace tailor
