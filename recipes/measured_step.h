#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"

namespace tailor {

/// What steps of some of a recipe's layers took on this machine, part by part. `tailor calibrate
/// RECIPE` measures it with the trainer's own step, on random weights in the recipe's formats; the
/// plan works a step of the whole model out of it.
struct MeasuredStep {
  /// Layers of one kind.
  struct Layers {
    std::string kind;  ///< "dense", "mixture of experts, chunked attention"
    std::int64_t measured = 0, in_model = 0;
    double forward_seconds = 0, backward_seconds = 0;  ///< of one of them
  };
  /// The same layers once more, read from disk as the recipe's budgets make the run read them.
  struct Stream {
    double passes_seconds = 0;  ///< both passes of a step, from disk
    double longer_seconds = 0;  ///< of computing and reading alone, pass by pass, the longer
    /// What a step takes beyond the longer of the two: waiting at the beginning of a pass, slower
    /// arithmetic while the disk writes to the same memory.
    double over() const { return longer_seconds > 0 ? passes_seconds / longer_seconds : 1; }
  };

  std::string date;  ///< when, UTC
  int threads = 0;
  double busy_share = 0;                  ///< of the machine's cores that others used meanwhile
  double tokens = 0, trained_tokens = 0;  ///< of a step, mean; trained ones carry loss
  double layer_flops_per_token = 0;       ///< of the recipe's layers, as token_flops() has it
  double parameters = 0;                  ///< trained, of the layers that were measured
  bool dequantising = false;              ///< packed weights were unpacked: the times have it in
  std::vector<Layers> layers;
  double head_seconds = 0;           ///< embedding, head and loss, forward and backward
  double update_seconds = 0;         ///< casting the factors, the gradient's norm, AdamW
  double disk_bytes_per_second = 0;  ///< of reading alone, by the trainer's reader
  std::optional<Stream> stream;      ///< where the recipe's weights come from disk
  /// Most bytes of activations and scratch at once, of the measured layers for `tokens_max` tokens.
  double pass_bytes = 0, tokens_max = 0;
  bool kept = true;       ///< every layer's activations were; else recomputed
  bool in_memory = true;  ///< and they waited there, not on disk
  /// Memory of the process beyond weights, activations and factors after the first steps: program,
  /// LibTorch, its buffers.
  double process_bytes = 0;
  /// What it grows by with every number of rows in a micro-batch that it had not met before:
  /// LibTorch's matrix library compiles kernels for each, and keeps them.
  double kernel_bytes = 0;
  /// How many numbers there are in the recipe's first 1, 2, 4, 8, ... steps, and beside those of
  /// training in an evaluation. Empty: not known, always the same.
  std::vector<std::int64_t> row_counts;
  std::int64_t evaluation_row_counts = 0;

  double forward_seconds() const;   ///< of all of the model's layers
  double backward_seconds() const;  ///< likewise
  /// Of kernels for numbers of rows, beside those that process_bytes has, after so many steps and
  /// an evaluation; of the latter half, it has no backward pass.
  double kernels_after(double steps) const;
  std::int64_t measured_layers() const;
  std::int64_t model_layers() const;
  /// "30 of 30 layers measured on this machine on 2026-11-29T..., 930 tokens a step".
  std::string source() const;
};

Json to_json(const MeasuredStep& step);
/// Throws Error{bad_file} for a document that is not one of to_json().
MeasuredStep read_measured_step(const Json& json, const std::string& where);

}  // namespace tailor
