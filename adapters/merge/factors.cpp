#include "adapters/merge/factors.h"

#include <algorithm>

namespace tailor {
namespace {

std::int64_t expert_bytes(const LoraSite& site) {
  return site.rank * (site.in + site.out) * static_cast<std::int64_t>(sizeof(float));
}
std::int64_t experts_in_group(const LoraSite& site) {
  return std::clamp<std::int64_t>(FactorGroups::kGroupBytes / expert_bytes(site), 1, site.experts);
}
bool all_zero(const float* values, std::int64_t count) {
  return std::all_of(values, values + count, [](float value) { return value == 0; });
}

}  // namespace

FactorGroups::FactorGroups(std::vector<const PeftReader*> adapters)
    : adapters_(std::move(adapters)), recent_(adapters_.size()) {}

std::int64_t FactorGroups::group_bytes_max(const PeftReader& adapter) {
  std::int64_t largest = 0;
  for (const LoraSite& site : adapter.sites()) {
    largest = std::max(largest, experts_in_group(site) * expert_bytes(site));
  }
  return largest;
}

std::shared_ptr<const FactorGroup> FactorGroups::get(std::size_t adapter, std::size_t site,
                                                     std::int64_t expert) {
  const LoraSite& of = adapters_[adapter]->sites()[site];
  const std::int64_t each = experts_in_group(of);
  std::shared_ptr<Entry> entry;
  {
    const std::lock_guard lock(mutex_);
    std::shared_ptr<Entry>& place = entries_[{adapter, site, expert / each}];
    if (!place) place = std::make_shared<Entry>();
    entry = place;
  }
  const std::lock_guard reading(entry->reading);
  if (auto held = entry->group.lock()) return held;
  auto group = std::make_shared<FactorGroup>();
  group->first = expert / each * each;
  group->count = std::min(each, of.experts - group->first);
  group->rank = of.rank;
  group->in = of.in;
  group->out = of.out;
  group->a_ri.resize(static_cast<std::size_t>(group->count * of.rank * of.in));
  group->b_ro.resize(static_cast<std::size_t>(group->count * of.rank * of.out));
  adapters_[adapter]->read(of, group->first, group->count, group->a_ri.data(), group->b_ro.data());
  for (std::int64_t e = group->first; e < group->first + group->count; ++e) {
    group->zero.push_back(all_zero(group->a_of(e), of.rank * of.in) ||
                          all_zero(group->b_of(e), of.rank * of.out));
  }
  entry->group = group;
  const std::lock_guard lock(mutex_);
  recent_[adapter].before = std::move(recent_[adapter].last);
  recent_[adapter].last = group;
  return group;
}

}  // namespace tailor
