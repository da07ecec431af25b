#pragma once

#include <string>
#include <vector>

namespace tailor {

/// How `tailor` starts tailor-compute, the program that is linked to LibTorch.

/// Sets what tailor-compute must find in its environment, where the user has not. Every start of it
/// comes after this: what is measured in one process and run in another computes alike in both.
void prepare_compute_environment();

/// Runs tailor-compute with these arguments to its end, its stdout on our stderr. Its exit code; of
/// one that was killed 128 + signal. Throws Error{usage} where it is not installed, Error{io} where
/// it cannot be started.
int run_compute(std::vector<std::string> arguments);

}  // namespace tailor
