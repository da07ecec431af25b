#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"

namespace tailor {

/// What a job file says whoever runs the job: a recipe's ranks on nodes, and what each node gives
/// them. Nodes have the same number of ranks.
struct LaunchJob {
  std::string name;                ///< as job_name() makes it
  std::string program = "tailor";  ///< path, or a name found there
  std::string recipe;              ///< path or shipped name as the program is given it
  std::vector<std::string> overrides;
  int ranks = 1;
  int nodes = 1;
  int gpus_per_node = 0;          ///< 0: ranks compute on the CPU
  std::string gpu_type;           ///< as the cluster names it; empty: any
  int cpus_per_rank = 0;          ///< 0: as the cluster gives
  std::int64_t memory_bytes = 0;  ///< host memory of a node; 0: as the cluster gives
  std::int64_t seconds_max = 0;   ///< wall clock; 0: as the cluster gives
  int restarts_max = 3;           ///< after a device, a rank or a disk failed

  int ranks_per_node() const { return ranks / nodes; }
  /// `program train RECIPE overrides... --resume`: with --resume always, a restarted job goes on.
  std::vector<std::string> train_command() const;
};

/// Throws Error{usage} where ranks do not spread evenly over nodes, or a node has fewer GPUs than
/// ranks.
void check_places(const LaunchJob& job);

/// `name` as Slurm, Kubernetes (RFC 1123 label) and SkyPilot all take it: lower-case letters,
/// digits and single dashes, at most 50 characters; "tailor" where nothing of it is left.
std::string job_name(const std::string& name);

/// `word` so that a POSIX shell reads it back as it is. Throws Error{usage} for a NUL in it.
std::string shell_word(const std::string& word);
std::string shell_words(const std::vector<std::string>& words);

/// Seconds of "90" (minutes), "1:30:00", "30:00" (minutes and seconds), "2-12" (days and hours),
/// "2-12:30", "2-12:30:00", as Slurm writes times. Throws Error{usage} for anything else.
std::int64_t time_limit_seconds(const std::string& text);

}  // namespace tailor
