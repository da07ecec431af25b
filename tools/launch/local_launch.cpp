#include "tools/launch/local_launch.h"

#include <poll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "base/clock.h"
#include "base/cores.h"
#include "base/error.h"
#include "base/log.h"
#include "tools/launch/rank_environment.h"
#include "tools/launch/rank_process.h"

namespace tailor {
namespace {

constexpr int kSignals[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGCHLD};

bool left_in_order(int code) {
  return code == static_cast<int>(Fault::stopped) || code == static_cast<int>(Fault::budget);
}

bool own_fault(int signal) {
  return signal == SIGSEGV || signal == SIGABRT || signal == SIGBUS || signal == SIGILL ||
         signal == SIGFPE || signal == SIGSYS;
}

/// The exit code that `end` stands for.
int code_of(const RankEnd& end, bool asked) {
  if (!end.by_signal) return end.number;
  if (asked &&
      (end.number == SIGTERM || end.number == SIGINT || end.number == SIGHUP || end.ended_by_us)) {
    return static_cast<int>(Fault::stopped);
  }
  return static_cast<int>(own_fault(end.number) ? Fault::internal : Fault::device);
}

std::string signal_text(int number) {
  return "signal " + std::to_string(number) + " (" + strsignal(number) + ")";
}

void write_all(int descriptor, std::string_view text) {
  while (!text.empty()) {
    const ssize_t wrote = ::write(descriptor, text.data(), text.size());
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0 && errno == EAGAIN) {
      pollfd room{descriptor, POLLOUT, 0};
      ::poll(&room, 1, -1);
      continue;
    }
    if (wrote <= 0) return;
    text.remove_prefix(static_cast<std::size_t>(wrote));
  }
}

/// Signals of the launcher as a descriptor to poll; they are blocked while it lives.
class SignalQueue {
 public:
  SignalQueue() {
    sigset_t wanted;
    sigemptyset(&wanted);
    for (const int number : kSignals) sigaddset(&wanted, number);
    ::sigprocmask(SIG_BLOCK, &wanted, &before_);
    pipe_before_ = std::signal(SIGPIPE, SIG_IGN);  // a run goes on when its reader goes away
    descriptor_ = ::signalfd(-1, &wanted, SFD_NONBLOCK | SFD_CLOEXEC);
    if (descriptor_ < 0) throw io_error(errno, "cannot wait for signals", "starting the ranks");
  }
  SignalQueue(const SignalQueue&) = delete;
  SignalQueue& operator=(const SignalQueue&) = delete;
  ~SignalQueue() {
    ::close(descriptor_);
    ::sigprocmask(SIG_SETMASK, &before_, nullptr);
    std::signal(SIGPIPE, pipe_before_);
  }
  int descriptor() const { return descriptor_; }
  /// The next one, 0 when there is none.
  int next() const {
    signalfd_siginfo info{};
    return ::read(descriptor_, &info, sizeof info) == sizeof info ? static_cast<int>(info.ssi_signo)
                                                                  : 0;
  }

 private:
  sigset_t before_{};
  void (*pipe_before_)(int) = SIG_DFL;
  int descriptor_ = -1;
};

class Launch {
 public:
  explicit Launch(const LocalLaunch& launch) : launch_(launch) {}

  int run() {
    start();
    while (running() > 0) {
      wait();
      take_signals();
      for (auto& rank : ranks_) {
        write_all(STDERR_FILENO, rank->read());
        if (rank->reap()) note_end(*rank);
      }
      hasten();
    }
    return judge();
  }

 private:
  void start() {
    const std::vector<std::string> before = own_environment();
    RankPlace place;
    place.local_world_size = launch_.ranks;
    place.world_size = world_size();
    place.master_addr = launch_.master_addr;
    if (launch_.master_port == 0) port_.emplace();
    place.master_port = port_ ? port_->number() : launch_.master_port;
    place.threads = launch_.threads;
    if (place.threads == 0 && std::getenv("OMP_NUM_THREADS") == nullptr) {
      place.threads = threads_per_rank(launch_.ranks);
    }
    for (int rank = 0; rank < launch_.ranks; ++rank) {
      place.local_rank = rank;
      place.rank = launch_.node_rank * launch_.ranks + rank;
      ranks_.push_back(std::make_unique<RankProcess>(place.rank, launch_.command,
                                                     rank_environment(place, before)));
    }
  }

  int world_size() const { return launch_.nodes * launch_.ranks; }

  std::ptrdiff_t running() const {
    return std::count_if(ranks_.begin(), ranks_.end(),
                         [](const auto& rank) { return rank->running(); });
  }

  void wait() const {
    std::vector<pollfd> on = {{signals_.descriptor(), POLLIN, 0}};
    for (const auto& rank : ranks_) {
      for (const int pipe : {rank->stdout_pipe(), rank->stderr_pipe()}) {
        if (pipe >= 0) on.push_back({pipe, POLLIN, 0});
      }
    }
    std::int64_t ms = -1;
    if (deadline_ms_) ms = std::clamp<std::int64_t>(*deadline_ms_ - clock_.steady_ms(), 0, 60'000);
    ::poll(on.data(), on.size(), static_cast<int>(ms));
  }

  void take_signals() {
    for (int number = signals_.next(); number != 0; number = signals_.next()) {
      if (number == SIGCHLD) continue;
      if (number == SIGUSR1 || number == SIGUSR2) {
        signal_all(number);
      } else if (!asked_) {
        asked_ = true;
        log_info("asking " + std::to_string(running()) +
                 " ranks to stop (again: they are killed at once)");
        signal_all(number);
      } else {
        kill_all();
      }
    }
  }

  void note_end(RankProcess& rank) {
    write_all(STDERR_FILENO, rank.finish_reading());
    const ProcessEnd& how = *rank.end();
    const RankEnd end{rank.rank(), how.by_signal, how.number, terminated_ || killed_};
    ends_.push_back(end);
    if (!how.by_signal && how.number == 0) return;
    if (!end.ended_by_us) {
      write_all(STDERR_FILENO, rank.stdout_tail());
      log_warning("rank " + std::to_string(end.rank) + " of " + std::to_string(world_size()) +
                  (how.by_signal ? " was ended by " + signal_text(how.number)
                                 : " left with " + std::to_string(how.number)));
    }
    const bool orderly = !how.by_signal && left_in_order(how.number);
    const std::int64_t until =
        clock_.steady_ms() + (orderly ? launch_.orderly_leave_ms : launch_.leave_ms);
    if (!terminated_) deadline_ms_ = std::min(deadline_ms_.value_or(until), until);
  }

  /// SIGTERM, then SIGKILL for those who stay after another rank is gone.
  void hasten() {
    if (!deadline_ms_ || clock_.steady_ms() < *deadline_ms_ || running() == 0) return;
    if (!terminated_) {
      terminated_ = true;
      log_warning(std::to_string(running()) + " ranks are still there: ending them");
      signal_all(SIGTERM);
      deadline_ms_ = clock_.steady_ms() + launch_.kill_ms;
    } else {
      kill_all();
    }
  }

  void signal_all(int number) const {
    for (const auto& rank : ranks_) rank->signal(number);
  }
  void kill_all() {
    killed_ = true;
    deadline_ms_.reset();
    for (const auto& rank : ranks_) rank->kill_group();
  }

  int judge() const {
    const LaunchEnd end = end_of(ends_, asked_);
    if (!end.cause || !end.cause->by_signal) return end.code;
    const RankEnd& cause = *end.cause;
    const std::string who =
        "rank " + std::to_string(cause.rank) + " of " + std::to_string(world_size());
    const std::string what = who + " was ended by " + signal_text(cause.number);
    if (end.code == static_cast<int>(Fault::stopped)) {
      throw Error(Fault::stopped, {"stopped before the run could save: " + what, "this machine",
                                   "`tailor train --resume` goes on from the newest checkpoint."});
    }
    if (end.code == static_cast<int>(Fault::internal)) {
      throw Error(Fault::internal,
                  {what, "this machine",
                   "This is a mistake in Tailor or in a library. Please report it with what the "
                   "ranks wrote; `tailor train --resume` goes on from the newest checkpoint."});
    }
    throw Error(
        Fault::device,
        {what, "this machine",
         "Where nobody sent it, memory ran out: `dmesg` then names the process; lower "
         "base.host_memory or training.micro_batch_size. `tailor train --resume` goes on from the "
         "newest checkpoint."});
  }

  const LocalLaunch& launch_;
  RealClock clock_;
  SignalQueue signals_;
  std::optional<ReservedPort> port_;
  std::vector<std::unique_ptr<RankProcess>> ranks_;
  std::vector<RankEnd> ends_;
  std::optional<std::int64_t> deadline_ms_;  ///< of the next step of hasten()
  bool asked_ = false, terminated_ = false, killed_ = false;
};

}  // namespace

LaunchEnd end_of(const std::vector<RankEnd>& ends, bool asked) {
  constexpr int kLostAnother = static_cast<int>(Fault::device);
  // The kinds of failure from the most telling to the least; the first rank of a kind counts.
  const auto first = [&](const auto& fits) -> std::optional<RankEnd> {
    const auto found = std::find_if(ends.begin(), ends.end(), fits);
    return found == ends.end() ? std::nullopt : std::optional<RankEnd>(*found);
  };
  const auto said = [&](const RankEnd& end) {
    return !end.ended_by_us && code_of(end, asked) != 0 && code_of(end, asked) != kLostAnother;
  };
  const auto killed = [&](const RankEnd& end) { return !end.ended_by_us && end.by_signal; };
  const auto lost_another = [&](const RankEnd& end) {
    return !end.ended_by_us && code_of(end, asked) != 0;
  };
  const auto any = [&](const RankEnd& end) { return code_of(end, asked) != 0; };
  std::optional<RankEnd> cause = first(said);
  if (!cause) cause = first(killed);
  if (!cause) cause = first(lost_another);
  if (!cause) cause = first(any);
  if (!cause) return {};
  return {code_of(*cause, asked), cause};
}

int threads_per_rank(int ranks) { return std::max(1, usable_cores() / std::max(1, ranks)); }

int launch_local(const LocalLaunch& launch) {
  TAILOR_CHECK(launch.ranks >= 1 && !launch.command.empty());
  TAILOR_CHECK(launch.node_rank >= 0 && launch.node_rank < launch.nodes);
  TAILOR_CHECK(launch.nodes == 1 || launch.master_port > 0);
  return Launch(launch).run();
}

}  // namespace tailor
