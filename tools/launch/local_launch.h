#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tailor {

/// The ranks of one run on this machine, as processes. With several nodes rank r of this one is
/// rank node_rank * ranks + r of the run.
struct LocalLaunch {
  std::vector<std::string> command;  ///< the same for every rank
  int ranks = 1;                     ///< here

  // Where the run has other machines, each of which starts as many ranks in the same way.
  int nodes = 1, node_rank = 0;
  std::string master_addr = "127.0.0.1";  ///< of node 0
  int master_port = 0;                    ///< 0, on one node only: a free one, which stays ours
  /// Threads a rank: OMP_NUM_THREADS. 0: the cores this process may use over the ranks, at least 1,
  /// unless the environment says.
  int threads = 0;

  /// From the first rank that failed until the others are asked to leave (SIGTERM). They leave by
  /// themselves when a collective fails, and name the dead rank; that takes a moment.
  std::int64_t leave_ms = 10'000;
  /// The same where a rank left in order before its end (75, 76): the others may still be writing.
  std::int64_t orderly_leave_ms = 300'000;
  /// From SIGTERM until SIGKILL.
  std::int64_t kill_ms = 5'000;
};

/// How one rank ended.
struct RankEnd {
  int rank = 0;
  bool by_signal = false;
  int number = 0;            ///< exit code, or the signal
  bool ended_by_us = false;  ///< after SIGTERM or SIGKILL of the launcher's own
};

/// What a run's end says about all: `ends` in the order they came. 0 when every rank gave 0; the
/// code of the first that failed for a reason of its own; 69 where ranks only lost another one.
/// A rank killed by a signal from outside is 69, by a fault of its own (SIGSEGV, ...) 70, by a
/// signal that was `asked` of the launcher 75.
struct LaunchEnd {
  int code = 0;
  std::optional<RankEnd> cause{};
};
LaunchEnd end_of(const std::vector<RankEnd>& ends, bool asked);

/// Starts the ranks and stays until all have ended; returns the exit code as end_of() says. Rank 0
/// writes to our stdout and stderr; what the others write to stderr appears there as lines that
/// begin with "[rank 2] ", and the end of their stdout when they fail.
///
/// SIGTERM, SIGINT and SIGHUP are passed to every rank once, a second one kills them; SIGUSR1 and
/// SIGUSR2 are passed on each time. No process is left behind however this one ends. Throws
/// Error{usage} when the program cannot be started, Error{device} or Error{internal} when a signal
/// ended the rank that made the run fail.
int launch_local(const LocalLaunch& launch);

/// Cores this process may use over `ranks`, at least 1.
int threads_per_rank(int ranks);

}  // namespace tailor
