#pragma once

namespace tailor {

/// Prints the table of few_rows_bench.cpp, where this machine has a product of its own.
void report_few_rows();

}  // namespace tailor
