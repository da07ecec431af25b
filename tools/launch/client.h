#pragma once

#include <string>
#include <vector>

namespace tailor {

/// What an outside program such as sbatch said.
struct ClientOutcome {
  int code = 0;  ///< exit code; 128 + signal where one ended it
  std::string out, err;
};

/// Runs a client of a cluster, its stdin empty. Throws Error{device} where it is not installed,
/// with what to install.
ClientOutcome run_client(const std::vector<std::string>& command);

/// run_client(), and Error{device} with the client's own words where it fails.
std::string client_output(const std::vector<std::string>& command);

/// Runs it with our stdout and stderr, so that a log is seen as it comes; its exit code.
int show_client(const std::vector<std::string>& command);

}  // namespace tailor
