#include "tools/launch/client.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/text.h"
#include "tools/launch/job.h"

namespace tailor {
namespace {

std::string how_to_install(const std::string& program) {
  if (program == "kubectl") {
    return "Install kubectl (kubernetes.io/docs/tasks/tools), or use --dry-run and apply the file "
           "where it is installed.";
  }
  if (program == "sky") {
    return "Install SkyPilot: pip install skypilot, or use --dry-run and launch the file where it "
           "is installed.";
  }
  return "Run this on a node of the cluster, or install its client: apt-get install slurm-client. "
         "--dry-run writes the script without it.";
}

pid_t spawn(const std::vector<std::string>& command, int out, int error_out) {
  std::vector<std::string> words = command;
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  if (out >= 0) posix_spawn_file_actions_adddup2(&actions, out, STDOUT_FILENO);
  if (error_out >= 0) posix_spawn_file_actions_adddup2(&actions, error_out, STDERR_FILENO);
  pid_t child = 0;
  const int failed = posix_spawnp(&child, argv.front(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (failed == 0) return child;
  throw Error(Fault::device, {"cannot run " + command.front() + ": " + std::strerror(failed),
                              "this machine", how_to_install(command.front())});
}

int wait_for(pid_t child) {
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

struct Pipe {
  std::array<int, 2> ends{-1, -1};
  Pipe() {
    if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw io_error(errno, "cannot make a pipe", "");
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  ~Pipe() {
    close_one(0);
    close_one(1);
  }
  void close_one(std::size_t end) {
    if (ends[end] >= 0) ::close(ends[end]);
    ends[end] = -1;
  }
};

}  // namespace

ClientOutcome run_client(const std::vector<std::string>& command) {
  Pipe out, error_out;
  const pid_t child = spawn(command, out.ends[1], error_out.ends[1]);
  out.close_one(1);
  error_out.close_one(1);
  ClientOutcome outcome;
  const auto take = [](Pipe& pipe, std::string& into) {
    std::array<char, 4096> buffer{};
    const ssize_t got = ::read(pipe.ends[0], buffer.data(), buffer.size());
    if (got > 0) into.append(buffer.data(), static_cast<std::size_t>(got));
    if (got == 0 || (got < 0 && errno != EINTR)) pipe.close_one(0);
  };
  while (out.ends[0] >= 0 || error_out.ends[0] >= 0) {
    std::array<pollfd, 2> on = {{{out.ends[0], POLLIN, 0}, {error_out.ends[0], POLLIN, 0}}};
    if (::poll(on.data(), on.size(), -1) < 0) continue;
    if (on[0].revents != 0) take(out, outcome.out);
    if (on[1].revents != 0) take(error_out, outcome.err);
  }
  outcome.code = wait_for(child);
  return outcome;
}

std::string client_output(const std::vector<std::string>& command) {
  const ClientOutcome outcome = run_client(command);
  if (outcome.code == 0) return outcome.out;
  const std::string said(trim(outcome.err.empty() ? outcome.out : outcome.err));
  throw Error(Fault::device, {command.front() + " failed with exit code " +
                                  std::to_string(outcome.code) + (said.empty() ? "" : ": " + said),
                              shell_words(command), "Mend what " + command.front() + " says."});
}

int show_client(const std::vector<std::string>& command) {
  return wait_for(spawn(command, -1, -1));
}

}  // namespace tailor
