#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"

namespace tailor {

/// Reads one environment variable; nullptr when it is not set.
using EnvLookup = std::function<const char*(const char* name)>;
/// getenv().
EnvLookup process_env();

/// What started this process, as the ledger records it. Of schedulers that stand inside each other
/// the outermost, whose accounting the run is compared with: torchrun below srun is "slurm".
struct Launcher {
  std::string name = "local";  ///< local, torchrun, slurm, kubernetes, skypilot
  std::string job_id;          ///< as that launcher calls it; empty: it gives none
  /// Which start of that job this is, 0 the first: requeues by Slurm, restarts by torchrun.
  int restart = 0;
};
Launcher read_launcher(const EnvLookup& env = process_env());

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

/// The first host of a Slurm node list: "gpu[03-05,9],login" -> "gpu03". Throws Error{usage}.
std::string first_slurm_host(const std::string& node_list);
/// Tasks of each node of Slurm's short form: "2(x3),1" -> {2, 2, 2, 1}. Throws Error{usage}.
std::vector<int> slurm_tasks_per_node(const std::string& text);

/// Where torchrun's agent looks for the reason of a failure (TORCHELASTIC_ERROR_FILE): writes it
/// there, in the agent's format. Does nothing when the variable is not set; never throws.
void write_error_file(const Error& error, const EnvLookup& env = process_env()) noexcept;

}  // namespace tailor
