#include "tools/launch/rank_process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "base/error.h"

namespace tailor {
namespace {

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (std::string& text : texts) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

struct Pipe {
  int from = -1, to = -1;
  explicit Pipe(bool wanted) {
    std::array<int, 2> ends{};
    if (!wanted) return;
    if (::pipe2(ends.data(), O_CLOEXEC) != 0) {
      throw io_error(errno, "cannot make a pipe", "starting the ranks");
    }
    from = ends[0];
    to = ends[1];
  }
};

/// Everything between fork and exec: only calls that are allowed there. Never returns; an errno
/// goes into `failed`.
[[noreturn]] void become(const std::vector<char*>& argv, const std::vector<char*>& environment,
                         pid_t launcher, int out, int error_out, int failed) {
  ::setpgid(0, 0);
  // The parent may have died before this line; then nobody sends the signal any more.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != launcher) ::_exit(1);
  const int nothing = ::open("/dev/null", O_RDONLY);
  if (nothing >= 0) ::dup2(nothing, STDIN_FILENO);
  if (out >= 0) ::dup2(out, STDOUT_FILENO);
  if (error_out >= 0) ::dup2(error_out, STDERR_FILENO);
  ::signal(SIGTTOU, SIG_IGN);  // a background group may write to the terminal, whatever stty says
  ::signal(SIGPIPE, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  ::execvpe(argv.front(), argv.data(), environment.data());
  const int number = errno;
  if (::write(failed, &number, sizeof number) < 0) ::_exit(126);
  ::_exit(127);
}

void close_one(int& descriptor) {
  if (descriptor >= 0) ::close(descriptor);
  descriptor = -1;
}

}  // namespace

RankProcess::RankProcess(int rank, std::span<const std::string> command,
                         std::span<const std::string> environment)
    : rank_(rank), lines_(rank) {
  std::vector<std::string> words(command.begin(), command.end());
  std::vector<std::string> settings(environment.begin(), environment.end());
  const std::vector<char*> argv = pointers(words), env = pointers(settings);
  Pipe out(rank != 0), error_out(rank != 0), failed(true);
  const pid_t launcher = ::getpid();
  pid_ = ::fork();
  if (pid_ == 0) become(argv, env, launcher, out.to, error_out.to, failed.to);
  const int fork_errno = errno;
  if (pid_ > 0) ::setpgid(pid_, pid_);  // whoever comes first; a signal to the group must find it
  close_one(out.to);
  close_one(error_out.to);
  close_one(failed.to);
  stdout_ = out.from;
  stderr_ = error_out.from;
  int number = fork_errno;
  const bool cannot = pid_ < 0 || ::read(failed.from, &number, sizeof number) > 0;
  close_one(failed.from);
  if (cannot) {
    if (pid_ > 0) ::waitpid(pid_, nullptr, 0);
    close_one(stdout_);
    close_one(stderr_);
    if (pid_ < 0) throw io_error(number, "cannot start rank " + std::to_string(rank), words[0]);
    throw Error(Fault::usage, {"cannot start " + words[0] + ": " + std::strerror(number),
                               "rank " + std::to_string(rank),
                               "Check that the program is there and may be run."});
  }
  for (const int pipe : {stdout_, stderr_}) {
    if (pipe >= 0) ::fcntl(pipe, F_SETFL, ::fcntl(pipe, F_GETFL) | O_NONBLOCK);
  }
}

RankProcess::~RankProcess() {
  if (running()) {
    kill_group();
    ::waitpid(pid_, nullptr, 0);
  }
  close_one(stdout_);
  close_one(stderr_);
}

void RankProcess::signal(int number) const {
  if (running()) ::kill(pid_, number);
}

void RankProcess::kill_group() const {
  if (running()) ::kill(-pid_, SIGKILL);
}

bool RankProcess::reap() {
  if (!running()) return false;
  siginfo_t info{};
  if (::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
      info.si_pid == 0) {
    return false;
  }
  ::kill(-pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  end_ = ProcessEnd{info.si_code != CLD_EXITED, info.si_status};
  return true;
}

std::string RankProcess::read() {
  std::string out;
  std::array<char, 16384> buffer{};
  const auto drain = [&](int& pipe, const auto& take) {
    while (pipe >= 0) {
      const ssize_t got = ::read(pipe, buffer.data(), buffer.size());
      if (got > 0) {
        take(std::string_view(buffer.data(), static_cast<std::size_t>(got)));
      } else if (got == 0) {
        close_one(pipe);
      } else if (errno != EINTR) {
        break;
      }
    }
  };
  drain(stdout_, [&](std::string_view bytes) { tail_.add(bytes); });
  drain(stderr_, [&](std::string_view bytes) { out += lines_.add(bytes); });
  return out;
}

std::string RankProcess::finish_reading() {
  std::string out = read() + lines_.finish();
  close_one(stdout_);
  close_one(stderr_);
  return out;
}

std::string RankProcess::stdout_tail() const {
  RankLines lines(rank_);
  const std::string whole = lines.add(tail_.text());
  return whole + lines.finish();
}

}  // namespace tailor
