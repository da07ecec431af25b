#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tools/launch/job.h"

namespace tailor {

struct SlurmJob {
  LaunchJob job;
  std::string partition;  ///< empty: the cluster's default
  std::string account;    ///< empty: the user's default
  fs::path work_folder;   ///< absolute; relative paths of the recipe start there
};

/// The batch script. One task is one rank, with torchrun's variables. What it does about ends:
///
///   a rank fails           it waits up to 10 s for the others to name it and leave, then Slurm
///                          kills them (--kill-on-bad-exit)
///   75                     the job requeues itself and goes on from its checkpoint, unless it was
///                          cancelled
///   69, 74, killed         requeues itself at most restarts_max times
///   2, 65, 66, 70, 76      the job fails with that code; as with 126 and 127, no program
///
/// The code of a rank's own failure counts, not srun's, which is the largest of all. USR1 comes 300
/// s before the time limit (a third of a shorter one). Throws Error{usage} for a partition or
/// account that no cluster can have.
std::string slurm_script(const SlurmJob& job);

/// The log's name in the folder the script is submitted from, "%j" for the job's number.
std::string slurm_log_name(const SlurmJob& job);

/// The job's number from what `sbatch --parsable` printed ("12" or "12;cluster").
std::optional<std::string> submitted_job(std::string_view printed);

/// One stretch from start to end of a job, as Slurm has it; a requeued job has several.
struct SlurmAttempt {
  std::string state;  ///< RUNNING, COMPLETED, PREEMPTED, ...
  std::string start, end;
  std::int64_t seconds = 0;  ///< the job's elapsed time, or its longest step's where that is longer
  std::int64_t gpus = 0;     ///< allocated
  int exit_code = 0, exit_signal = 0;
  double gpu_hours() const {
    return static_cast<double>(seconds) * static_cast<double>(gpus) / 3600;
  }
};

/// A job's state.
struct SlurmState {
  std::string job, name, state, reason;
  int exit_code = 0, exit_signal = 0;
  int restarts = 0;
  std::string log;          ///< StdOut
  bool accounting = false;  ///< `attempts` come from sacct and are all there were
  std::vector<SlurmAttempt> attempts;
  bool ended() const;
  /// What a job that ended is as an exit code of ours: its own, 128 + signal, and where Slurm ended
  /// it and gives neither: 66 out of memory, 69 a node failed, 75 cancelled, preempted or out of
  /// time.
  int result() const;
};

/// From the one-line output of `scontrol show job -o`.
SlurmState read_scontrol(std::string_view line);

/// Fields that sacct is asked for.
inline constexpr const char* kSacctFields =
    "JobID,JobName,State,Start,End,ElapsedRaw,AllocTRES,ExitCode";

/// From `sacct -D -P -n -j JOB -o kSacctFields`: -D, because without it a requeued attempt is not
/// shown. The lines of steps belong to the attempt above them; their end carries the time that
/// ranks took to leave after a kill. Nothing where sacct knows no such job.
std::optional<SlurmState> read_sacct(std::string_view lines);

}  // namespace tailor
