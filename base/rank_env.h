#pragma once

#include <optional>
#include <string>

#include "base/environment.h"
#include "base/launcher.h"

namespace tailor {

/// One process's place among the ranks of a run, and where they meet, as its environment says.
///
/// torchrun's contract (PyTorch, "Environment Variables" of torchrun): RANK, WORLD_SIZE,
/// LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Without RANK: srun's own variables
/// inside a step of more than one task, or a Kubernetes Indexed Job's JOB_COMPLETION_INDEX beside
/// WORLD_SIZE and MASTER_ADDR.
struct RankEnv {
  int rank = 0;
  int world_size = 1;
  int local_rank = -1;       ///< among the ranks of its node; -1: not said
  int local_world_size = 0;  ///< ranks of its node; 0: not said
  std::string master_addr;   ///< host name or address of rank 0's node
  int master_port = 0;
  /// torchrun's agent keeps the meeting point itself (TORCHELASTIC_USE_AGENT_STORE): rank 0 too
  /// comes to it as a client.
  bool agent_store = false;
  /// Tells this start of this job from others that may use the same address; empty: nothing does.
  std::string job;
  Launcher launcher;
};

/// Nothing when no variable speaks of ranks. Throws Error{usage} when they contradict each other or
/// are no numbers, naming the variable and its value.
std::optional<RankEnv> read_rank_env(const EnvLookup& env = process_env());

/// Where torchrun's agent looks for the reason of a failure (TORCHELASTIC_ERROR_FILE): writes it
/// there, in the agent's format. Does nothing when the variable is not set; never throws.
void write_error_file(const Error& error, const EnvLookup& env = process_env()) noexcept;

}  // namespace tailor
