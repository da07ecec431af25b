#include "tools/launch/slurm_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>

#include "base/error.h"
#include "base/log.h"
#include "base/text.h"
#include "tools/launch/client.h"

namespace tailor {
namespace {

constexpr double kLookSeconds = 1;  // at the log
/// The controller answers everybody: it is asked less often the longer nothing changes, and the
/// database, which costs more, only once it has forgotten the job.
constexpr double kAskAgain = 1.5, kAskSeconds_max = 10;

/// What a file got since it was looked at last.
class GrowingFile {
 public:
  ~GrowingFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  GrowingFile() = default;
  GrowingFile(const GrowingFile&) = delete;
  GrowingFile& operator=(const GrowingFile&) = delete;

  void copy_to(const std::string& path, int to) {
    if (descriptor_ < 0) descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor_ < 0) return;
    std::array<char, 16384> buffer{};
    for (ssize_t got = 1; got > 0;) {
      got = ::read(descriptor_, buffer.data(), buffer.size());
      for (ssize_t done = 0; done < got;) {
        const ssize_t wrote =
            ::write(to, buffer.data() + done, static_cast<std::size_t>(got - done));
        if (wrote <= 0) throw io_error(errno, "cannot write the log", "standard output");
        done += wrote;
      }
    }
  }

  bool found() const { return descriptor_ >= 0; }

 private:
  int descriptor_ = -1;
};

/// What the controller knows of a job; nothing where it has forgotten it or never knew. `said`: its
/// words where it answers with no job.
std::optional<SlurmState> live_state(const std::string& job, std::string& said) {
  const ClientOutcome live = run_client({"scontrol", "show", "job", "-o", job});
  if (live.code == 0) return read_scontrol(live.out);
  said = trim(live.err);
  return std::nullopt;
}

}  // namespace

SlurmState slurm_state(const std::string& job) {
  std::string said;
  std::optional<SlurmState> out = live_state(job, said);
  // Without accounting sacct is not there, or says that it is disabled.
  try {
    const ClientOutcome records =
        run_client({"sacct", "-D", "-P", "-n", "-j", job, "-o", kSacctFields});
    if (records.code == 0) {
      if (auto kept = read_sacct(records.out)) {
        if (out) {
          kept->log = out->log;
          kept->state = out->state;
          kept->reason = out->reason;
          kept->restarts = out->restarts;
        }
        return *kept;
      }
    }
  } catch (const Error&) {  // no sacct here
  }
  if (out) return *out;
  if (said.find("Invalid job id") != std::string::npos) {
    throw Error(Fault::usage, {"Slurm does not know job " + job, "scontrol show job",
                               "Check the number; without accounting Slurm forgets a job some "
                               "minutes after its end. `tailor runs ls` still knows the run."});
  }
  throw Error(Fault::device, {"Slurm does not answer: " + said, "scontrol show job",
                              "Check that the cluster is up: sinfo"});
}

int follow_slurm(const std::string& job, int descriptor) {
  GrowingFile log;
  SlurmState state;
  std::string before;
  double every_s = 1;
  for (bool answered = true;;) {
    try {
      // The state first: what is written before a job ends is then read below.
      std::string said;
      const std::string path = state.log;
      const auto live = live_state(job, said);
      state = live ? *live : slurm_state(job);
      if (state.log.empty()) state.log = path;  // accounting does not know its place
      answered = true;
    } catch (const Error& error) {
      // A controller that restarts is no reason to look away from a job of days.
      if (before.empty() || error.fault() != Fault::device) throw;
      if (answered) log_warning(error.parts().what + "; asking again");
      answered = false;
    }
    const std::string now = lower(state.state) + (state.reason.empty() ? "" : ", " + state.reason);
    if (before.empty() && !state.ended()) {
      log_info("following job " + job + "; Ctrl-C ends that, not the job: scancel " + job);
    }
    if (now != before) log_info("job " + job + ": " + now);
    every_s = now == before ? std::min(kAskAgain * every_s, kAskSeconds_max) : 1;
    before = now;
    log.copy_to(state.log, descriptor);
    if (state.ended()) break;
    for (double waited_s = 0; waited_s < every_s; waited_s += kLookSeconds) {
      ::usleep(static_cast<useconds_t>(kLookSeconds * 1e6));
      log.copy_to(state.log, descriptor);
    }
  }
  if (!log.found()) {
    log_warning(state.log.empty()
                    ? "Slurm has forgotten where the log of job " + job + " is"
                    : "the log of job " + job + " is not to be seen from here: " + state.log);
  }
  return state.result();
}

}  // namespace tailor
