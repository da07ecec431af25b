#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"

namespace tailor {

/// What one step gave. Sums and the loss are over all ranks.
struct StepMetrics {
  std::int64_t step = 0;  ///< from 1
  double loss = 0;        ///< mean over the step's loss-carrying tokens
  double learning_rate = 0;
  double grad_norm = 0;  ///< before clipping
  std::int64_t tokens = 0;
  std::int64_t trained_tokens = 0;  ///< those that carry loss
  double seconds = 0;
  double tokens_per_second = 0;
  std::int64_t stream_bytes = 0;
  double stall_seconds = 0;
  /// With more ranks than one: payload sent between them by all, seconds of it on the slowest, and
  /// how much of that computing waited for. A line has it only then.
  struct Exchange {
    std::int64_t weight_bytes = 0, factor_bytes = 0, gradient_bytes = 0;
    double seconds = 0, exposed_seconds = 0;
    std::int64_t bytes() const { return weight_bytes + factor_bytes + gradient_bytes; }
  };
  std::optional<Exchange> exchange{};
  /// Most memory the first rank's process has held so far; a line has it where it was measured.
  std::optional<std::int64_t> host_bytes_peak{};
  double gpu_hours = 0;         ///< the run so far, all attempts
  std::optional<double> usd{};  ///< the run so far; null where no price is known
};

struct EvalMetrics {
  std::int64_t step = 0;  ///< after this step; 0: before the first
  double eval_loss = 0;
  std::int64_t tokens = 0;
  double seconds = 0;
  double gpu_hours = 0;
  std::optional<double> usd{};
};

/// How one step's rows fell on the routed experts; over all ranks.
struct ExpertMetrics {
  struct Layer {
    int layer = 0;                   ///< of all the model's layers, from 0
    std::vector<std::int64_t> rows;  ///< [E]
  };
  std::int64_t step = 0;
  std::vector<Layer> layers;
};

/// One line without its newline: JSON, floats with 9 significant digits, null where not finite.
std::string to_line(const StepMetrics& metrics);
std::string to_line(const EvalMetrics& metrics);
std::string to_line(const ExpertMetrics& metrics);

/// Writes metrics.jsonl: one line a step or evaluation, handed to the kernel before write()
/// returns, so that kill -9 loses none.
class MetricsWriter {
 public:
  /// A new file; one that exists is replaced.
  static MetricsWriter create(const fs::path& path);
  /// Goes on after `step`, the checkpoint's: later lines and a torn last line are cut off, in one
  /// atomic replacement. A file that does not exist is created.
  static MetricsWriter resume(const fs::path& path, std::int64_t step);

  void write(const StepMetrics& metrics);
  void write(const EvalMetrics& metrics);
  void write(const ExpertMetrics& metrics);
  /// Makes all lines survive a power cut; for checkpoints.
  void sync();

 private:
  explicit MetricsWriter(const fs::path& path);
  fs::path path_;
  std::unique_ptr<FileWriter> file_;
};

struct Metrics {
  std::vector<StepMetrics> steps;
  std::vector<EvalMetrics> evals;
  std::vector<ExpertMetrics> experts;
  int broken_lines = 0;  ///< skipped: a torn last line, or damage
};

/// Reads a metrics.jsonl; empty where there is no file.
Metrics read_metrics(const fs::path& path);

}  // namespace tailor
