#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "adapters/lora.h"
#include "trainer/optim/adamw.h"
#include "trainer/optim/cast_factors.h"
#include "trainer/optim/factor_pager.h"
#include "trainer/optim/factor_shards.h"
#include "trainer/ranks/ranks.h"

namespace tailor {

/// The state of LoRA factors over the ranks of a run, as FSDP has it: a rank keeps its part of
/// every layer's factors, moments and gradients. A layer's cast factors are gathered just ahead of
/// its pass and let go behind it; its gradients are summed over the ranks, each getting its part,
/// while the pass goes on in the next layer. The exchanges run on a thread of their own, in the
/// order in which the pass asks for them, which is the same on every rank.
///
/// Arenas have the whole adapter's layout on every rank; what is other ranks' takes no memory but
/// while its layer is in use.
class ShardedFactors final : public FactorPager {
 public:
  /// All of them must outlive the pager; `gradients` has the adapter's layout, in float32. Lets go
  /// of other ranks' factors and moments; until it ends only the pager may change the others.
  /// Collective.
  ShardedFactors(Adapter& adapter, AdamW& optimizer, CastFactors& cast, const Arena& gradients,
                 Ranks& ranks);
  ~ShardedFactors() override;
  ShardedFactors(const ShardedFactors&) = delete;
  ShardedFactors& operator=(const ShardedFactors&) = delete;

  const FactorShards& shards() const { return shards_; }
  /// Norm of the step's summed gradients. Waits for the sums. Collective.
  double gradient_norm();
  /// AdamW's step on this rank's part, and its new cast factors.
  void update(double learning_rate, double gradient_factor);

  /// Brings all factors to rank 0's arena; elsewhere only its own stay. Collective. For what is
  /// written whole; drop_gathered() lets go of them again.
  void gather_to_first();
  void drop_gathered();

  void first_cast(const Adapter& adapter) override;
  void before_layer(int layer, Way way) override;
  void after_layer(int layer, Way way) noexcept override;
  /// Returns once no exchange is under way.
  void flush() override;

  struct Times {
    double waited_seconds = 0;    ///< that a pass waited for exchanges
    double exchange_seconds = 0;  ///< of exchanging
  };
  Times times() const;
  RankTraffic traffic() const;  ///< of the thread's exchanges

 private:
  enum class Kind { gather, reduce };
  struct Task {
    Kind kind;
    int layer;
  };
  /// Of a layer's cast factors.
  enum class Cast { own, asked, whole };

  void ask_for(int layer);
  void wait(std::unique_lock<std::mutex>& lock, int layer);
  void work();
  void gather(int layer);
  void reduce(int layer);
  void update_range(FactorRange range);
  int next(int layer, Way way) const;

  Adapter& adapter_;
  AdamW& optimizer_;
  CastFactors& cast_;
  const Arena& gradients_;
  Ranks& ranks_;
  FactorShards shards_;
  std::unique_ptr<Ranks> channel_;

  mutable std::mutex mutex_;
  std::condition_variable to_thread_, to_user_;
  std::deque<Task> tasks_;
  std::vector<Cast> state_;  ///< [layer]
  bool busy_ = false, stop_ = false;
  std::exception_ptr failure_;
  Times times_;
  RankTraffic traffic_;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace tailor
