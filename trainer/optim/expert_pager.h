#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "adapters/lora.h"
#include "trainer/optim/adamw.h"
#include "trainer/optim/cast_factors.h"
#include "trainer/optim/factor_pager.h"

namespace tailor {

/// The state of routed experts, layer by layer: factors, gradients, moments and cast factors that
/// need not be in memory at once, and an optimizer that follows the passes.
///
/// A step's update of them is deferred. update() takes the step at once for everything else; the
/// experts' part is taken by a thread from the first layer up, one layer ahead of the next forward
/// pass, which waits in before_layer(). It needs the same numbers as at the end of the step (the
/// norm of all gradients is known by then), so the factors are the same to the bit. flush() takes
/// what is left: before a checkpoint, an evaluation or an export, and after the last step.
class ExpertPager final : public FactorPager {
 public:
  /// All of them must outlive the pager; `gradients` has the adapter's layout, in float32. Between
  /// the first pass and the last flush only the pager may change factors and moments.
  ExpertPager(Adapter& adapter, AdamW& optimizer, CastFactors& cast, const Arena& gradients);
  /// Flushes, so that what it leaves is whole.
  ~ExpertPager() override;
  ExpertPager(const ExpertPager&) = delete;
  ExpertPager& operator=(const ExpertPager&) = delete;

  /// Sets all gradients to zero but those of routed experts, which before_layer() sees to.
  void clear_gradients();
  /// AdamW's step for this pass's gradients. Nothing may be pending.
  void update(double learning_rate, double gradient_factor);

  void first_cast(const Adapter& adapter) override { cast_.cast_all(adapter); }
  void before_layer(int layer, Way way) override;
  void after_layer(int layer, Way way) noexcept override;
  void flush() override;

 private:
  std::int64_t index_of(int layer) const;  ///< among the layers with experts; -1: none
  void wait_for(std::unique_lock<std::mutex>& lock, std::int64_t layers);
  void work();
  void update_layer(const FactorRange& experts);

  Adapter& adapter_;
  AdamW& optimizer_;
  CastFactors& cast_;
  const Arena& gradients_;
  std::vector<FactorRange> experts_;  ///< by index, from the first layer up
  std::vector<FactorRange> rest_;     ///< everything else
  std::vector<std::int64_t> index_;   ///< [layer]

  std::mutex mutex_;
  std::condition_variable changed_;
  std::int64_t done_ = 0;     ///< layers whose update is finished: the first ones
  std::int64_t allowed_ = 0;  ///< layers the thread may finish now
  std::int64_t reached_ = 0;  ///< layers that the forward pass has begun since the update
  bool stop_ = false;
  std::exception_ptr failure_;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace tailor
