#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "recipes/machine.h"
#include "recipes/measured_step.h"
#include "recipes/model_facts.h"
#include "recipes/price_book.h"
#include "recipes/recipe.h"

namespace tailor {

/// One predicted number and the sum it came from: {350155230105.6, "bytes", "2 passes x ..."}.
/// Without a value `working` is the reason.
struct Figure {
  std::optional<double> value;
  std::string unit;  ///< bytes, tokens, steps, seconds, hours, tokens/s, usd, ...
  std::string working;
};

/// What holds the step back.
enum class Bound { compute, link, disk, network };
std::string_view bound_name(Bound bound);

/// One thing that takes memory while training, on one rank's device, on the host, or on disk.
struct MemoryItem {
  enum class Home { device, host, disk };
  Home home;
  std::string name;
  double bytes = 0;
  std::string working;
};

/// A term in which the trainer's step departs from the oracle, the analytic model that the plan of
/// a GPU run is checked against: what leaving it out would change. Seconds of a step, or bytes.
struct PlanDifference {
  std::string name;
  double value = 0;
  std::string unit;  ///< seconds or bytes
  std::string working;
};

/// A part of a job that takes hours and dollars of its own.
struct JobPhase {
  std::string name;      ///< training, evaluation, loading, packing, download
  bool in_hours = true;  ///< counted in Plan::hours, gpu_hours and usd; else only with preparation
  std::optional<double> seconds;
  std::optional<double> usd;
  std::string working;  ///< or why there are none
};

/// The job at the price of a tier, whatever price the recipe chose.
struct TierCost {
  std::string tier;  ///< spot, on-demand
  PriceQuote price;
  Figure usd, usd_with_preparation;
};

/// A change of the recipe, planned again (recipes/advice.h).
struct Advice {
  std::string what;  ///< "32,768 tokens per step instead of 8,192: 2.9x faster, $5.87 saved"
  std::vector<std::string> changes;  ///< key=value
  double times_faster = 0;           ///< over the same tokens; 0 where the plan did not fit
  std::optional<double> hours_saved, usd_saved;
  std::string working;
};

/// What is known of the tokenised data.
struct DataStats {
  std::int64_t rows = 0;            ///< of sequence_len, a pass
  std::int64_t trained_tokens = 0;  ///< that carry loss, a pass
  std::int64_t store_bytes = 0;
  std::int64_t validation_rows = 0;  ///< of sequence_len, an evaluation; 0: none
  /// That are no padding, a pass and an evaluation; 0: not known, rows count as full.
  std::int64_t tokens = 0, validation_tokens = 0;
  std::int64_t documents = 0;  ///< a pass; 0: not known
};

/// A measured speed that replaces the machine profile's assumption.
struct Calibration {
  double gflops = 0;       ///< what a training step reaches on the CPU, over all cores
  std::string source;      ///< "measured on this machine on 2026-11-23"
  bool disturbed = false;  ///< others used the machine meanwhile
  /// The recipe's own layers, where they were measured: takes the place of `gflops`.
  std::optional<MeasuredStep> step{};
};

/// What a run needs and costs, before anything loads.
struct Plan {
  bool fits = true;
  std::string fits_working;
  /// Each: what is too large, by how much, and the setting to change. Empty when it fits.
  struct Misfit {
    std::string what, mend;
  };
  std::vector<Misfit> misfits;

  Figure device_bytes_peak, host_bytes_peak, disk_bytes;
  Figure stream_bytes_per_step;  ///< frozen weights over the slowest link they cross, all ranks
  /// What a step writes to and reads from scratch files, all ranks: state of routed experts, kept
  /// layer inputs. Less where the page cache has room.
  Figure scratch_bytes_per_step;
  Figure tokens_per_step;
  Figure flops_per_token;
  Figure trainable_parameters;
  Figure seconds_per_step, tokens_per_second;
  Figure crossover_tokens_per_step;  ///< from here on compute hides the stream
  Figure steps;
  Figure hours, gpu_hours, usd;                         ///< the run: loading, steps and evaluations
  Figure hours_with_preparation, usd_with_preparation;  ///< download and packing as well
  std::vector<JobPhase> phases;
  std::vector<TierCost> tiers;
  std::vector<Advice> advice;  ///< of advise(); make_plan() gives none
  Bound bound = Bound::compute;
  std::string bound_working;
  std::vector<MemoryItem> items;
  std::vector<std::string> warnings;
  std::vector<PlanDifference> differences;  ///< on the CPU none: the oracle knows GPUs only

  // What the trainer follows.
  double resident_fraction = 1;        ///< of the routed experts, on the device (RAM on the CPU)
  std::int64_t device_tile_bytes = 0;  ///< frozen weights kept there, one rank
  std::int64_t host_tile_bytes = 0;    ///< frozen weights kept in RAM behind the device, all ranks
  std::int64_t ring_bytes = 0;         ///< of slots of whole tiles, beside those kept resident
  ActivationHome activations = ActivationHome::host;  ///< never automatic
  StateHome expert_state = StateHome::memory;         ///< never automatic
  bool stream_head = false;       ///< the vocabulary head waits on the host and crosses in runs
  bool keep_activations = false;  ///< everything the backward pass needs, no recompute
  PriceQuote price;
};

struct PlanExtras {
  std::optional<DataStats> data;
  std::optional<Calibration> calibration;
  std::int64_t at_unix_ms = 0;  ///< the day whose prices hold
  bool weights_here = false;    ///< the published model is on the machine: nothing to download
  bool store_here = false;      ///< so is the packed store: nothing to download or to pack
  /// Every term in which our step departs from the oracle is left out: Plan::differences is empty.
  /// For GPUs only; Error{usage} otherwise.
  bool oracle_assumptions = false;
};

/// A pure function: reads no file, asks no clock, touches no device. `recipe` must be resolved for
/// `model`. Does not throw when something does not fit: see Plan::fits. Throws Error{usage} when
/// the recipe and the machine contradict each other (more ranks than devices; a price that is not
/// in the book).
///
/// GPUs: the arithmetic of recipes/stream_model.h: a step passes every layer once forward and once
/// backward over all its tokens; each pass takes the longest of computing, copying and reading.
/// CPU: the same with disk to RAM as the only link.
Plan make_plan(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
               const PriceBook& prices, const PlanExtras& extras = {});

/// The document of `tailor plan --json`: every figure as {value, unit, working}.
Json plan_json(const Plan& plan);

/// Error{does_not_fit} from a plan that does not fit.
Error does_not_fit(const Plan& plan);

}  // namespace tailor
