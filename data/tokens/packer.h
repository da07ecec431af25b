#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tailor {

/// Documents to rows of at most `sequence_len` tokens, none of them cut.
///
/// Best fit, longest first, among `window` documents at a time: near-full rows, order kept within a
/// window's reach, and a result that depends on the lengths alone. Documents of a row stand in
/// file order and rows in the order of their first document. lengths[d] must be in 1..sequence_len.
std::vector<std::vector<std::int64_t>> pack_documents(std::span<const std::int64_t> lengths,
                                                      std::int64_t sequence_len,
                                                      std::int64_t window = 16384);

/// One document a row, in file order.
std::vector<std::vector<std::int64_t>> one_document_a_row(std::int64_t documents);

}  // namespace tailor
