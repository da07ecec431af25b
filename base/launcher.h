#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/environment.h"

namespace tailor {

/// What started this process, as the ledger records it. Of schedulers that stand inside each other
/// the outermost, whose accounting the run is compared with: torchrun below srun is "slurm".
/// TAILOR_LAUNCHER and TAILOR_LAUNCHER_JOB, as our own job files set them, go before all.
struct Launcher {
  std::string name = "local";  ///< local, torchrun, slurm, kubernetes, skypilot
  std::string job_id;          ///< as that launcher calls it; empty: it gives none
  /// Which start of that job this is, 0 the first: requeues by Slurm, restarts by torchrun.
  int restart = 0;
  /// Unix seconds (TAILOR_ALLOCATED_AT, of our own job files): since when this start of the job
  /// holds its devices, and they cost. 0: not known.
  double allocated_unix_s = 0;

  /// When what is paid for began, on the clock's steady time: at the program's own start, or with
  /// the job's devices before that. An allocation in the future or more than six hours ago is
  /// another's.
  std::int64_t paid_since_steady_ms(const Clock& clock, std::int64_t program_began_ms) const;
};
Launcher read_launcher(const EnvLookup& env = process_env());

/// The first host of a Slurm node list: "gpu[03-05,9],login" -> "gpu03". Throws Error{usage}.
std::string first_slurm_host(const std::string& node_list);
/// Tasks of each node of Slurm's short form: "2(x3),1" -> {2, 2, 2, 1}. Throws Error{usage}.
std::vector<int> slurm_tasks_per_node(const std::string& text);
/// The port at which the ranks of a job meet where nobody says another: 20000 to 31999, below those
/// that the kernel hands out, the same for all tasks, another for neighbours and after a requeue.
int slurm_port(std::int64_t job, std::int64_t restarts);

}  // namespace tailor
