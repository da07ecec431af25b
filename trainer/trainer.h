#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "adapters/lora.h"
#include "data/tokens/token_source.h"
#include "trainer/models/decoder.h"
#include "trainer/optim/adamw.h"
#include "trainer/optim/expert_pager.h"
#include "trainer/optim/schedule.h"
#include "trainer/optim/sharded_factors.h"
#include "trainer/ranks/ranks.h"

namespace tailor {

struct TrainerOptions {
  Schedule schedule;
  AdamWOptions adamw;
  double max_grad_norm = 1;  ///< 0: no clipping
  double dropout = 0;
  std::uint64_t seed = 0;
  Activations keep = Activations::kept;
  /// Set: the state of routed experts is paged layer by layer (see ExpertPager), their gradients
  /// and cast factors in arenas of this home. Make adapter and optimizer with the same.
  std::optional<ArenaHome> paged_experts;
  /// The ranks of the run; must outlive the trainer. More than one: each takes its rows of every
  /// step and keeps its part of the factors' state (see ShardedFactors), gradients and cast factors
  /// in arenas of `paged_experts` where that is set. Null: one rank.
  Ranks* ranks = nullptr;
  /// The first step and every so many after it count the rows of each expert; 0: none does.
  std::int64_t count_experts_every = 0;
};

struct StepRecord {
  std::int64_t step = 0;  ///< from 1
  double loss = 0;        ///< mean over the step's trained tokens
  double learning_rate = 0;
  double grad_norm = 0;  ///< before clipping
  std::int64_t tokens = 0, trained_tokens = 0;
  double seconds = 0;
  std::int64_t stream_bytes = 0;  ///< of frozen weights, read from disk; over all ranks
  double stall_seconds = 0;       ///< waiting for them; of the rank that waited longest
  // With more ranks than one, of all ranks and of the slowest:
  std::int64_t exchange_weight_bytes = 0;    ///< payload sent between ranks: packed frozen weights
  std::int64_t exchange_factor_bytes = 0;    ///< cast factors
  std::int64_t exchange_gradient_bytes = 0;  ///< gradients
  double exchange_seconds = 0;               ///< of exchanging, beside the computing
  double exchange_exposed_seconds = 0;       ///< of it, what computing waited for
  std::int64_t exchange_bytes() const {
    return exchange_weight_bytes + exchange_factor_bytes + exchange_gradient_bytes;
  }
  /// Where the step counted them: rows that each expert of each layer was given by all ranks,
  /// [moe layers * E].
  std::vector<std::int64_t> expert_rows;
};

struct Evaluation {
  double loss = 0;            ///< mean over tokens
  double token_accuracy = 0;  ///< share of tokens whose arg max is the target
  std::int64_t tokens = 0;
  std::int64_t correct = 0;
  double seconds = 0;
};

/// The loop's body: one step, one evaluation. Every rank of a run makes the same calls. A step is a
/// function of the factors, the moments and the step number, so a run that is interrupted and
/// resumed takes the same path to the last bit.
class Trainer {
 public:
  /// All of them must outlive the trainer.
  Trainer(Decoder& decoder, Adapter& adapter, AdamW& optimizer, const TokenSource& source,
          TrainerOptions options);
  /// Flushes, so that adapter and optimizer are whole.
  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  /// Step `index` (from 0). Throws Error{internal} naming the step when the loss or the gradient is
  /// not finite; factors and moments are then as before the step.
  /// `another_follows`: the next call is step index + 1, so weights may be read ahead for it.
  StepRecord step(std::int64_t index, bool another_follows = false);
  /// Finishes what of the last step waits for the next. Before factors or moments are read or
  /// saved; evaluations with the decoder see to it themselves.
  void flush();
  /// The factors' state over the ranks; null where this rank has all of it.
  ShardedFactors* sharded() { return sharded_.get(); }

 private:
  Ranks* others() const;
  void add_over_ranks(StepRecord& record) const;

  Decoder& decoder_;
  Adapter& adapter_;
  AdamW& optimizer_;
  const TokenSource& source_;
  TrainerOptions options_;
  Arena gradients_;
  std::unique_ptr<ExpertPager> pager_;
  std::unique_ptr<ShardedFactors> sharded_;
  /// At the end of a step that another was to follow: what is gathered ahead until then is its own.
  std::optional<RingCounters> counted_;
};

/// Loss and accuracy over all of a source's steps, with the decoder's present adapter. Nothing when
/// `stop` said so between two of them. With `ranks` each takes its rows, all get the same result,
/// and `stop` must say the same on all.
std::optional<Evaluation> evaluate(Decoder& decoder, const EvaluationSource& source,
                                   const std::function<bool()>& stop, Ranks* ranks = nullptr);

}  // namespace tailor
