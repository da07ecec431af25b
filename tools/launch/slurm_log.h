#pragma once

#include <functional>
#include <string>

#include "tools/launch/slurm.h"

namespace tailor {

/// What Slurm knows of a job: from sacct where accounting keeps records, with the state and the log
/// that scontrol knows as long as the controller remembers the job (MinJobAge). Throws Error{usage}
/// for a job neither knows, Error{device} where Slurm does not answer.
SlurmState slurm_state(const std::string& job);

/// Writes the job's log to `descriptor` as it grows, through requeues, until the job has ended;
/// returns its exit code (128 + signal where one ended it). Ctrl-C ends the watching, not the job.
int follow_slurm(const std::string& job, int descriptor);

}  // namespace tailor
