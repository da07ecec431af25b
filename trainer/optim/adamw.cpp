#include "trainer/optim/adamw.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "base/units.h"

namespace tailor {
namespace {

/// Appends the sum of squares of every block. Blocks are of fixed size, so that neither threads nor
/// windows of whole blocks change a bit of their sum.
void block_sums(std::span<const float> values, std::vector<double>& sums) {
  constexpr std::int64_t kBlock = 1 << 16;
  const auto n = static_cast<std::int64_t>(values.size());
  const std::size_t first = sums.size();
  sums.resize(first + static_cast<std::size_t>(div_ceil(n, kBlock)));
  at::parallel_for(0, div_ceil(n, kBlock), 1, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t block = from; block < to; ++block) {
      const std::int64_t end = std::min(n, (block + 1) * kBlock);
      double sum = 0;
      for (std::int64_t i = block * kBlock; i < end; ++i) {
        const double g = values[static_cast<std::size_t>(i)];
        sum += g * g;
      }
      sums[first + static_cast<std::size_t>(block)] = sum;
    }
  });
}

}  // namespace

double gradient_norm(std::span<const float> gradients, const Arena* arena) {
  constexpr std::size_t kWindow = std::size_t{1} << 22U;
  constexpr auto kWindowBytes = static_cast<std::int64_t>(kWindow * sizeof(float));
  if (arena == nullptr) return std::sqrt(sum_of_squares(gradients));
  std::vector<double> sums;
  arena->prefetch(0, kWindowBytes);
  for (std::size_t at = 0; at < gradients.size(); at += kWindow) {
    const auto at_byte = static_cast<std::int64_t>(at * sizeof(float));
    arena->prefetch(at_byte + kWindowBytes, kWindowBytes);
    block_sums(gradients.subspan(at, std::min(kWindow, gradients.size() - at)), sums);
    arena->release(at_byte, kWindowBytes);
  }
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

double sum_of_squares(std::span<const float> values) {
  std::vector<double> sums;
  block_sums(values, sums);
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

double clip_factor(double norm, double max_norm) {
  if (max_norm <= 0) return 1;
  return std::min(1.0, max_norm / (norm + 1e-6));
}

AdamW::AdamW(const Adapter& adapter, AdamWOptions options, const ArenaHome& home)
    : options_(options),
      first_(home.make(adapter.arena().size())),
      second_(home.make(adapter.arena().size())) {
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
  begin_step(learning_rate, gradient_factor);
  finish(factors, gradients, {0, static_cast<std::int64_t>(factors.size())}, true);
}

void AdamW::begin_step(double learning_rate, double gradient_factor,
                       std::optional<std::int64_t> count) {
  TAILOR_CHECK(pending() == 0, "a step is begun before the last is finished");
  ++steps_;
  frozen_.learning_rate = learning_rate;
  frozen_.correction1 = 1 - std::pow(options_.beta1, static_cast<double>(steps_));
  frozen_.correction2 = std::sqrt(1 - std::pow(options_.beta2, static_cast<double>(steps_)));
  frozen_.gradient_factor = static_cast<float>(gradient_factor);
  std::atomic_ref(pending_).store(count.value_or(static_cast<std::int64_t>(first_moment().size())));
}

void AdamW::finish(std::span<float> factors, std::span<const float> gradients, FactorRange range,
                   bool parallel) {
  TAILOR_CHECK(factors.size() == first_moment().size() && gradients.size() == factors.size() &&
               range.begin >= 0 && range.end <= static_cast<std::int64_t>(factors.size()));
  if (range.empty()) return;
  const auto beta1 = static_cast<float>(options_.beta1), beta2 = static_cast<float>(options_.beta2);
  const auto rest1 = static_cast<float>(1 - options_.beta1),
             rest2 = static_cast<float>(1 - options_.beta2);
  const auto epsilon = static_cast<float>(options_.epsilon);
  const auto root_correction = static_cast<float>(frozen_.correction2);
  const float factor = frozen_.gradient_factor;
  float* const first = first_moment().data();
  float* const second = second_moment().data();
  for (const Stretch& stretch : stretches_) {
    const std::int64_t begin = std::max(stretch.begin, range.begin),
                       end = std::min(stretch.end, range.end);
    if (begin >= end) continue;
    const double rate = frozen_.learning_rate * stretch.ratio;
    const auto step_size = static_cast<float>(rate / frozen_.correction1);
    const auto decay = static_cast<float>(1 - rate * options_.weight_decay);
    const auto update = [&](std::int64_t from, std::int64_t to) {
      for (auto i = static_cast<std::size_t>(from); i < static_cast<std::size_t>(to); ++i) {
        const float g = gradients[i] * factor;
        first[i] = first[i] * beta1 + g * rest1;
        second[i] = second[i] * beta2 + g * g * rest2;
        const float denominator = std::sqrt(second[i]) / root_correction + epsilon;
        factors[i] = factors[i] * decay - step_size * first[i] / denominator;
      }
    };
    if (parallel) {
      at::parallel_for(begin, end, 1 << 15, update);
    } else {
      update(begin, end);
    }
  }
  const std::int64_t before = std::atomic_ref(pending_).fetch_sub(range.size());
  TAILOR_CHECK(before >= range.size(), "factors are updated twice in a step");
}

std::int64_t AdamW::pending() const noexcept { return std::atomic_ref(pending_).load(); }

}  // namespace tailor
