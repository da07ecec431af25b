#pragma once

#include <string>
#include <string_view>

#include "recipes/plan.h"
#include "recipes/step_cost.h"
#include "recipes/stream_model.h"

namespace tailor {

/// The working state of make_plan(): inputs, and the sums shared by its parts. plan.cpp has what
/// both kinds of machine share, plan_gpu.cpp and plan_cpu.cpp the memory and the step of each.
class Planner {
 public:
  Planner(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
          const PlanExtras& extras);
  void run(const PriceBook& prices);

  Plan plan;

 private:
  using Home = MemoryItem::Home;
  static constexpr double kHostShare = 0.95;  // of RAM: the rest is the system's

  /// A GPU step under one schedule.
  struct GpuStep {
    Geometry geometry;
    StepOptions options;
    GpuMemory device;
    HostMemory host;
    StreamEstimate time;
    bool experts_beyond_ram = false;  ///< because RAM is too small, not because of a setting
  };

  void run_gpu();
  GpuStep gpu_step(const StepSchedule& schedule) const;
  void add_gpu_memory(const GpuStep& step);
  void add_gpu_time(const GpuStep& step);
  void add_crossover(const GpuStep& step);
  void add_differences(const GpuStep& ours);

  /// What a step computes on the CPU, and how that was worked out.
  struct CpuStep {
    double forward = 0, backward = 0;  ///< seconds, the head with forward, unpacking included
    double update = 0;                 ///< beside which nothing is read
    double unpacking = 0;              ///< of forward and backward, where it was reckoned apart
    double over = 1;                   ///< what reading beside it costs, as a factor
    double forward_per_token = 0;      ///< of an evaluation
    std::string working, source;
  };

  void run_cpu();
  void add_cpu_memory(bool keep, double value_bytes);
  void add_cpu_ring();
  void add_cpu_factors(double value_bytes);
  void add_cpu_activations(bool keep, double value_bytes);
  bool add_measured_activations(bool keep, double value_bytes);
  void add_cpu_time(bool keep, double value_bytes);
  CpuStep cpu_step_of(const TokenFlops& flops, double value_bytes) const;
  CpuStep cpu_step_as_measured(const MeasuredStep& measured, const TokenFlops& flops,
                               double value_bytes) const;
  double kept_bytes(double value_bytes) const;
  /// Whether matrices in a format are turned into values before they are multiplied.
  bool dequantised(BaseFormat format) const;
  /// Of the largest piece of a layer whose matrices are unpacked together; 0 when none is packed.
  double scratch_parameters() const;
  /// Packed bytes read and values written by unpacking all weights once, as a pass does.
  double dequantise_bytes(double value_bytes) const;

  /// Traffic of what is on disk though it changes; `kept` bytes of activations are among it.
  void add_scratch(double value_bytes, double kept);
  void add_disk();

  // plan_job.cpp
  Figure evaluation(double steps) const;
  Figure job_steps() const;
  bool packs() const;
  JobPhase download() const;
  JobPhase packing() const;
  void add_job(const PriceBook& prices);
  void add_prices(const PriceBook& prices);
  void warn_of_budget();

  void item(Home home, std::string name, double bytes, std::string working);
  void items(Home home, const std::vector<MemoryPart>& parts);
  double sum(Home home) const;
  /// "weights 12.1 GB + factors 3.0 GB + ..."
  std::string sum_text(Home home) const;
  /// The largest item and the setting that governs its size.
  std::string advice(Home home) const;

  const Recipe& recipe_;
  const ModelFacts& model_;
  const Machine& machine_;
  const PlanExtras& extras_;
  LoraCounts lora_;
  BaseBytes base_;
  double ranks_, tokens_;
  double loss_share_ = 1;    ///< of the tokens, where the data is known
  double fill_ = 1;          ///< share of a step's tokens that are no padding
  double kept_on_disk_ = 0;  ///< bytes of layer inputs and activations
  double load_bytes_ = 0, forward_seconds_per_token_ = 0;
  double streamed_bytes_ = 0;         ///< a forward pass, from disk, on the CPU
  double streamed_head_bytes_ = 0;    ///< of them the head's, which a step needs once
  std::int64_t rank_ring_bytes_ = 0;  ///< of a rank's slots of experts
};

}  // namespace tailor
