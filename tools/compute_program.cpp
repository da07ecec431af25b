#include "tools/compute_program.h"

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "base/error.h"
#include "tools/paths.h"

namespace tailor {

void prepare_compute_environment() {
  // OpenMP threads spin at the end of every parallel loop, and where another process wants a core
  // that takes it from the thread they wait for. Sleeping at once is slow on a quiet machine.
  // Tokens/s of the dense demo model, two cores, alone and beside one busy process:
  //   1,000 spins 1,679 and 931;  5,000 1,787 and 820;  20,000 1,825 and 588;  60,000 1,841 and 423
  // (libgomp's own 300,000: 1,834 alone.) It reads this when it is loaded, so it is set here; a
  // value the user gave stands.
  ::setenv("GOMP_SPINCOUNT", "5000", 0);
}

int run_compute(std::vector<std::string> arguments) {
  const std::string program = sibling_program("tailor-compute").string();
  prepare_compute_environment();
  arguments.insert(arguments.begin(), program);
  std::vector<char*> argv;
  for (std::string& word : arguments) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
  pid_t child = 0;
  const int failed = posix_spawn(&child, program.c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (failed != 0) throw io_error(failed, "cannot start tailor-compute", program);
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) throw io_error(errno, "cannot wait for tailor-compute", program);
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace tailor
