#pragma once

#include <optional>

#include "data/tokens/prepare.h"
#include "recipes/plan.h"

namespace tailor {

/// What a plan needs of data that was prepared, found without reading the data again: a small file
/// beside the token stores, named by the paths, sizes and times of the data's and the tokenizer's
/// files and by everything else in `data:`. Any change of those is another name.

/// Writes it. Failures to write are left alone: the memo only saves time.
void remember_data(const Recipe& recipe, const PrepareReport& report);

/// Nothing where the data was not prepared as it is now, or its store is gone or of another size.
std::optional<DataStats> recall_data(const Recipe& recipe);

/// What a plan takes from prepared data.
DataStats stats_of(const PrepareReport& report);

}  // namespace tailor
