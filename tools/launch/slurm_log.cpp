#include "tools/launch/slurm_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>

#include "base/error.h"
#include "base/log.h"
#include "base/text.h"
#include "tools/launch/client.h"

namespace tailor {
namespace {

constexpr useconds_t kPollMicros = 1'000'000;

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

 private:
  int descriptor_ = -1;
};

}  // namespace

SlurmState slurm_state(const std::string& job) {
  const ClientOutcome live = run_client({"scontrol", "show", "job", "-o", job});
  std::optional<SlurmState> out;
  if (live.code == 0) out = read_scontrol(live.out);
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
  const std::string said(trim(live.err));
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
  std::string before;
  for (;;) {
    // The state first: what is written before a job ends is then read below.
    const SlurmState state = slurm_state(job);
    const std::string said = state.state + (state.reason.empty() ? "" : " (" + state.reason + ")");
    if (said != before)
      log_info("job " + job + ": " + lower(state.state) +
               (state.reason.empty() ? "" : ", " + state.reason));
    before = said;
    log.copy_to(state.log, descriptor);
    if (state.ended()) {
      return state.exit_signal > 0 ? 128 + state.exit_signal : state.exit_code;
    }
    ::usleep(kPollMicros);
  }
}

}  // namespace tailor
