#include "trainer/optim/adamw.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

namespace tailor {

double gradient_norm(std::span<const float> gradients) {
  constexpr std::int64_t kBlock = 1 << 16;
  const auto n = static_cast<std::int64_t>(gradients.size());
  std::vector<double> sums(static_cast<std::size_t>((n + kBlock - 1) / kBlock));
  at::parallel_for(0, static_cast<std::int64_t>(sums.size()), 1,
                   [&](std::int64_t from, std::int64_t to) {
                     for (std::int64_t block = from; block < to; ++block) {
                       const std::int64_t end = std::min(n, (block + 1) * kBlock);
                       double sum = 0;
                       for (std::int64_t i = block * kBlock; i < end; ++i) {
                         const double g = gradients[static_cast<std::size_t>(i)];
                         sum += g * g;
                       }
                       sums[static_cast<std::size_t>(block)] = sum;
                     }
                   });
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

double clip_factor(double norm, double max_norm) {
  if (max_norm <= 0) return 1;
  return std::min(1.0, max_norm / (norm + 1e-6));
}

AdamW::AdamW(const Adapter& adapter, AdamWOptions options) : options_(options) {
  first_.assign(adapter.factors().size(), 0.0F);
  second_.assign(adapter.factors().size(), 0.0F);
  for (const LoraSite& site : adapter.sites()) {
    stretches_.push_back({site.a_offset, site.a_offset + site.a_size(), 1.0});
    stretches_.push_back(
        {site.b_offset, site.b_offset + site.b_size(), options.learning_rate_ratio_b});
  }
  // Neighbours with one learning rate are one stretch: long ones are shared among threads.
  std::sort(stretches_.begin(), stretches_.end(),
            [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; });
  std::vector<Stretch> merged;
  for (const Stretch& next : stretches_) {
    const bool goes_on =
        !merged.empty() && merged.back().end == next.begin && merged.back().ratio == next.ratio;
    if (goes_on) {
      merged.back().end = next.end;
    } else {
      merged.push_back(next);
    }
  }
  stretches_ = std::move(merged);
}

void AdamW::step(std::span<float> factors, std::span<const float> gradients, double learning_rate,
                 double gradient_factor) {
  ++steps_;
  const double correction1 = 1 - std::pow(options_.beta1, static_cast<double>(steps_));
  const double correction2 = std::sqrt(1 - std::pow(options_.beta2, static_cast<double>(steps_)));
  const auto beta1 = static_cast<float>(options_.beta1), beta2 = static_cast<float>(options_.beta2);
  const auto rest1 = static_cast<float>(1 - options_.beta1),
             rest2 = static_cast<float>(1 - options_.beta2);
  const auto epsilon = static_cast<float>(options_.epsilon);
  const auto root_correction = static_cast<float>(correction2);
  const auto factor = static_cast<float>(gradient_factor);
  for (const Stretch& stretch : stretches_) {
    const double rate = learning_rate * stretch.ratio;
    const auto step_size = static_cast<float>(rate / correction1);
    const auto decay = static_cast<float>(1 - rate * options_.weight_decay);
    at::parallel_for(stretch.begin, stretch.end, 1 << 15, [&](std::int64_t from, std::int64_t to) {
      for (auto i = static_cast<std::size_t>(from); i < static_cast<std::size_t>(to); ++i) {
        const float g = gradients[i] * factor;
        first_[i] = first_[i] * beta1 + g * rest1;
        second_[i] = second_[i] * beta2 + g * g * rest2;
        const float denominator = std::sqrt(second_[i]) / root_correction + epsilon;
        factors[i] = factors[i] * decay - step_size * first_[i] / denominator;
      }
    });
  }
}

}  // namespace tailor
