#include "adapters/uniform_factors.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

namespace tailor {

UniformFactors::UniformFactors(const PeftReader& reader, const std::vector<SitePart>& parts)
    : reader_(reader) {
  std::map<double, int> scales;
  std::set<const LoraSite*> sites;
  for (const SitePart& part : parts) {
    if (part.site == nullptr) continue;
    sites.insert(part.site);
    const std::shared_ptr<const LoadedFactors> factors = load(*part.site);
    for (std::int64_t e = 0; e < part.experts; ++e) {
      rank_ = std::max(rank_, static_cast<std::int64_t>(live_rows(*factors, part, e).size()));
    }
  }
  for (const LoraSite* site : sites) ++scales[site->scale];
  scale_ = std::max_element(scales.begin(), scales.end(), [](const auto& a, const auto& b) {
             return a.second < b.second;
           })->first;
  // Servers read alpha as a whole number; a common scale that is none goes into B with the rest.
  const double alpha = scale_ * static_cast<double>(rank_);
  if (alpha != std::floor(alpha) || !(alpha >= 1)) scale_ = 1;
  for (const LoraSite* site : sites) {
    if (site->scale != scale_) ++folded_;
    if (site->rank != rank_) ++padded_;
  }
}

std::shared_ptr<const LoadedFactors> UniformFactors::load(const LoraSite& site) {
  if (loaded_.first != &site) {
    loaded_ = {};  // the old ones go before the new ones come
    loaded_ = {&site, std::make_shared<const LoadedFactors>(reader_.read(site))};
  }
  return loaded_.second;
}

std::vector<std::int64_t> UniformFactors::live_rows(const LoadedFactors& factors,
                                                    const SitePart& part,
                                                    std::int64_t expert) const {
  const LoraSite& site = *part.site;
  const auto any = [](const float* x, std::int64_t count) {
    return std::any_of(x, x + count, [](float value) { return value != 0; });
  };
  std::vector<std::int64_t> out;
  for (std::int64_t r = expert * site.rank; r < (expert + 1) * site.rank; ++r) {
    if (any(factors.a.data() + r * site.in, site.in) &&
        any(factors.b.data() + r * site.out + part.first, part.width))
      out.push_back(r);
  }
  return out;
}

std::shared_ptr<const LoadedFactors> UniformFactors::of(const SitePart& part) {
  for (const Kept& kept : kept_) {
    if (kept.site == part.site && kept.first == part.first && kept.width == part.width &&
        kept.in == part.in && kept.experts == part.experts)
      return kept.factors;
  }
  auto out = std::make_shared<LoadedFactors>();
  out->a.resize(static_cast<std::size_t>(part.experts * rank_ * part.in));
  out->b.resize(static_cast<std::size_t>(part.experts * rank_ * part.width));
  if (part.site != nullptr) {
    const std::shared_ptr<const LoadedFactors> from = load(*part.site);
    const double fold = part.site->scale / scale_;
    for (std::int64_t e = 0; e < part.experts; ++e) {
      std::int64_t to = e * rank_;
      for (const std::int64_t row : live_rows(*from, part, e)) {
        std::copy_n(from->a.begin() + row * part.in, part.in, out->a.begin() + to * part.in);
        const float* b = from->b.data() + row * part.site->out + part.first;
        float* b_to = out->b.data() + to * part.width;
        for (std::int64_t o = 0; o < part.width; ++o)
          b_to[o] = fold == 1 ? b[o] : static_cast<float>(fold * static_cast<double>(b[o]));
        ++to;
      }
    }
  }
  constexpr std::size_t kKept = 3;  // gate, up and down of one layer
  kept_.push_front({part.site, part.first, part.in, part.width, part.experts, out});
  if (kept_.size() > kKept) kept_.pop_back();
  return out;
}

}  // namespace tailor
