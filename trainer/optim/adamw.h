#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "adapters/lora.h"

namespace tailor {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;
  double weight_decay = 0;  ///< decoupled, on every factor
  double learning_rate_ratio_b =
      1;  ///< LoRA+ (arXiv 2402.12354): learning rate of B over that of A
};

/// Square root of the sum of squares, in double, blocks of fixed size in order: the same number
/// whatever the number of threads.
double gradient_norm(std::span<const float> gradients);

/// torch.nn.utils.clip_grad_norm_'s factor: min(1, max_norm / (norm + 1e-6)); 1 when max_norm is 0.
double clip_factor(double norm, double max_norm);

/// AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), as
/// torch.optim.AdamW computes it, on flat arenas of an adapter's layout. Owns the moments.
class AdamW {
 public:
  AdamW(const Adapter& adapter, AdamWOptions options);

  /// One step with `learning_rate` for A; gradients are multiplied by `gradient_factor` as they are
  /// read (clipping).
  void step(std::span<float> factors, std::span<const float> gradients, double learning_rate,
            double gradient_factor);

  std::int64_t steps() const noexcept { return steps_; }
  std::span<float> first_moment() noexcept { return first_; }
  std::span<float> second_moment() noexcept { return second_; }
  std::span<const float> first_moment() const noexcept { return first_; }
  std::span<const float> second_moment() const noexcept { return second_; }
  void set_steps(std::int64_t steps) noexcept { steps_ = steps; }

 private:
  struct Stretch {
    std::int64_t begin, end;
    double ratio;
  };
  AdamWOptions options_;
  std::vector<Stretch> stretches_;  ///< runs of the arena with one learning rate
  std::vector<float> first_, second_;
  std::int64_t steps_ = 0;
};

}  // namespace tailor
