#include "trainer/filled_batch.h"

#include <algorithm>
#include <bit>

#include "base/units.h"

namespace tailor {

std::int64_t filled_tokens(std::int64_t tokens) {
  if (tokens == 0) return 0;
  const auto power = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(tokens)));
  return align_up(tokens, std::max<std::int64_t>(16, power / 32));
}

FilledBatch::FilledBatch(const Batch& batch) {
  auto document = batch.document_start.begin();
  for (std::size_t m = 0; m + 1 < batch.micro_batch_start.size(); ++m) {
    const std::int32_t begin = batch.micro_batch_start[m], end = batch.micro_batch_start[m + 1];
    const auto at = static_cast<std::int32_t>(ids_.size());
    micro_batch_start_.push_back(at);
    for (; document != batch.document_start.end() && *document < end; ++document) {
      document_start_.push_back(*document - begin + at);
    }
    const auto copy = [&](const auto& from, auto& to) {
      if (!from.empty()) to.insert(to.end(), from.begin() + begin, from.begin() + end);
    };
    copy(batch.ids, ids_);
    copy(batch.position, position_);
    copy(batch.target, target_);
    copy(batch.token_id, token_id_);
    const std::int64_t tokens = end - begin, more = filled_tokens(tokens) - tokens;
    filler_.push_back(static_cast<std::int32_t>(more));
    if (more == 0) continue;
    document_start_.push_back(static_cast<std::int32_t>(ids_.size()));
    const std::int32_t known = ids_.back();  // a row of the embedding that is read anyway
    for (std::int64_t i = 0; i < more; ++i) {
      ids_.push_back(known);
      position_.push_back(static_cast<std::int32_t>(i));
      if (!batch.target.empty()) target_.push_back(-1);
      if (!batch.token_id.empty()) token_id_.push_back(0);
    }
  }
  document_start_.push_back(static_cast<std::int32_t>(ids_.size()));
  micro_batch_start_.push_back(static_cast<std::int32_t>(ids_.size()));
}

TokenInput FilledBatch::input() const {
  return {ids_, position_, target_, document_start_, micro_batch_start_, token_id_, filler_};
}

}  // namespace tailor
