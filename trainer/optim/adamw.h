#pragma once

#include <cstdint>
#include <optional>
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
/// whatever the number of threads. `arena`: that which the gradients fill, if it is to be read
/// ahead and released behind.
double gradient_norm(std::span<const float> gradients, const Arena* arena = nullptr);

/// Its square, of one piece.
double sum_of_squares(std::span<const float> values);

/// torch.nn.utils.clip_grad_norm_'s factor: min(1, max_norm / (norm + 1e-6)); 1 when max_norm is 0.
double clip_factor(double norm, double max_norm);

/// AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), as
/// torch.optim.AdamW computes it, on flat arenas of an adapter's layout. Owns the moments.
///
/// A step may be taken in parts: begin_step() fixes what it depends on beside the arenas (learning
/// rate, clipping, number of the step), finish() takes it for a range. Every factor's update stands
/// alone, so the parts, in any order and on any thread, give the bits of step().
class AdamW {
 public:
  /// `home`: where the moments' arenas are made.
  AdamW(const Adapter& adapter, AdamWOptions options, const ArenaHome& home = {});

  /// One step with `learning_rate` for A; gradients are multiplied by `gradient_factor` as they are
  /// read (clipping).
  void step(std::span<float> factors, std::span<const float> gradients, double learning_rate,
            double gradient_factor);

  /// Nothing of the step before may be pending. `count`: factors the step is for, where others keep
  /// the rest; without it all.
  void begin_step(double learning_rate, double gradient_factor,
                  std::optional<std::int64_t> count = std::nullopt);
  /// Every factor must come exactly once after begin_step(). Ranges without a common element may be
  /// finished at the same time. `parallel`: by all threads of the pool; else by the caller alone.
  void finish(std::span<float> factors, std::span<const float> gradients, FactorRange range,
              bool parallel);
  /// Factors that a step was begun for and not finished. While there are any, factors and moments
  /// are of no step and must not be saved.
  std::int64_t pending() const noexcept;

  std::int64_t steps() const noexcept { return steps_; }
  std::span<float> first_moment() noexcept { return first_.as<float>(); }
  std::span<float> second_moment() noexcept { return second_.as<float>(); }
  std::span<const float> first_moment() const noexcept { return first_.as<float>(); }
  std::span<const float> second_moment() const noexcept { return second_.as<float>(); }
  const Arena& first_arena() const noexcept { return first_; }
  const Arena& second_arena() const noexcept { return second_; }
  void set_steps(std::int64_t steps) noexcept { steps_ = steps; }

 private:
  /// What a step depends on beside the arenas.
  struct Frozen {
    double learning_rate = 0, correction1 = 1, correction2 = 1;
    float gradient_factor = 1;
  };
  struct Stretch {
    std::int64_t begin, end;
    double ratio;
  };
  AdamWOptions options_;
  std::vector<Stretch> stretches_;  ///< runs of the arena with one learning rate
  Arena first_, second_;
  Frozen frozen_;
  std::int64_t steps_ = 0;
  mutable std::int64_t pending_ = 0;  ///< by std::atomic_ref only
};

}  // namespace tailor
