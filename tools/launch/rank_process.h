#pragma once

#include <sys/types.h>

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tools/launch/rank_output.h"

namespace tailor {

/// How a process ended, as waitid tells it.
struct ProcessEnd {
  bool by_signal = false;
  int number = 0;  ///< exit code, or the signal
};

/// One rank: a child in a process group of its own, so that a terminal's Ctrl-C reaches only the
/// launcher, which passes it on once. The kernel kills it when the launcher dies in any way. Its
/// stdin is empty.
class RankProcess {
 public:
  /// Starts `command` (its first word a path, or a name found in PATH) with `environment`. Rank 0
  /// keeps our stdout and stderr; of the others stderr comes out of read() line by line, and the
  /// end of stdout is kept. Throws Error{usage} when the program cannot be started.
  RankProcess(int rank, std::span<const std::string> command,
              std::span<const std::string> environment);
  RankProcess(const RankProcess&) = delete;
  RankProcess& operator=(const RankProcess&) = delete;
  /// Kills what still runs of the group, and waits for it.
  ~RankProcess();

  int rank() const noexcept { return rank_; }
  pid_t pid() const noexcept { return pid_; }
  bool running() const noexcept { return !end_; }
  const std::optional<ProcessEnd>& end() const noexcept { return end_; }

  /// A signal to the process itself, not to its children, which are its own to end. Nothing once it
  /// has ended.
  void signal(int number) const;
  /// SIGKILL to all of its group.
  void kill_group() const;
  /// Takes note when the process has ended: then what is left of its group is killed, before the
  /// number can belong to somebody else. True when it ended just now.
  bool reap();

  /// Descriptors to poll for input; -1 where there is none (any more).
  int stdout_pipe() const noexcept { return stdout_; }
  int stderr_pipe() const noexcept { return stderr_; }
  /// Takes what the pipes hold without waiting; the lines of stderr that became whole.
  std::string read();
  /// The last line of stderr without a newline; then the pipes are closed.
  std::string finish_reading();
  /// The end of stdout with the rank before each line.
  std::string stdout_tail() const;

 private:
  int rank_;
  pid_t pid_ = -1;
  int stdout_ = -1, stderr_ = -1;
  RankLines lines_;
  TailText tail_;
  std::optional<ProcessEnd> end_;
};

}  // namespace tailor
