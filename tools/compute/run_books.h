#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "data/runs/budget.h"
#include "data/runs/journaled_ledger.h"
#include "data/runs/metrics.h"
#include "data/runs/mlflow.h"
#include "data/runs/report.h"
#include "data/runs/run_folder.h"
#include "data/runs/segment_timer.h"
#include "data/runs/tensorboard.h"
#include "recipes/plan.h"
#include "recipes/recipe.h"
#include "tools/compute/progress.h"
#include "tools/compute/run_ranks.h"
#include "trainer/run_state.h"
#include "trainer/trainer.h"

namespace tailor {

/// Throws Error{budget} where the plan for the steps after `first_step` exceeds the recipe's budget
/// or its project's (refuse_over_budget). `run` may be empty: a new one. A ledger that cannot be
/// read does not count.
void refuse_plan_over_budget(const Recipe& recipe, const Plan& plan, const std::string& run,
                             std::int64_t first_step, std::int64_t steps, const Clock& clock);

/// What a run writes about itself: ledger, metrics, TensorBoard events, budget. Kept by the first
/// rank alone, for all of them.
class RunBooks {
 public:
  struct Facts {
    std::string recipe_text;  ///< resolved
    std::string dataset_sha256;
    std::string sku;
    std::int64_t first_step = 0, steps = 0;
    std::int64_t began_steady_ms = 0;  ///< when the program began
    bool over_budget = false;          ///< started although the plan exceeds the budget
    std::vector<int> moe_layers;       ///< those with routed experts
  };
  /// All but `facts` must outlive the books. Begins the attempt, in Phase::load.
  RunBooks(const Recipe& recipe, const Plan& plan, const RunFolder& folder, const RunRanks& ranks,
           const Clock& clock, const Facts& facts);

  /// Before the first line is written, once nothing can go wrong any more but training itself.
  void open_metrics();
  Phase switch_to(Phase phase) { return timer_->switch_to(phase); }
  LiveMoney money() const;

  void step(const StepRecord& record);
  void evaluation(std::int64_t step, const Evaluation& result);
  void sync() { metrics_->sync(); }
  /// `seconds`: it took, and will take again at the end.
  void checkpoint(const SavedCheckpoint& saved, double seconds);
  /// Whether what is spent, and what saving and leaving will cost, has reached the budget after
  /// `step`; warns and forecasts once on the way there.
  bool over_budget(std::int64_t step, RunProgress& progress);

  void adapter(const fs::path& file, std::int64_t step);
  RunReport finish(RunStatus status, int exit_code, const std::string& reason);
  /// The attempt failed: its time stays on the books. Does not throw.
  void fail(const Error& error);

 private:
  void scalar(const std::string& name, double value, std::int64_t step);
  void open_mlflow();
  void count_earlier_attempts();

  void write_experts(const StepRecord& record);
  const Recipe& recipe_;
  const Plan& plan_;
  const RunFolder& folder_;
  Facts facts_;
  int devices_;
  std::unique_ptr<JournaledLedger> ledger_;
  AttemptId attempt_;
  std::unique_ptr<BudgetWatch> budget_;
  std::unique_ptr<SegmentTimer> timer_;  ///< its thread uses the two above
  std::unique_ptr<MetricsWriter> metrics_;
  std::unique_ptr<TensorboardWriter> tensorboard_;
  std::unique_ptr<MlflowSink> mlflow_;
  const Clock& clock_;
  double checkpoint_seconds_ = 1;
};

}  // namespace tailor
