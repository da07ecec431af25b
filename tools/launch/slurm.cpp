#include "tools/launch/slurm.h"

#include <algorithm>
#include <array>
#include <charconv>

#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

constexpr std::int64_t kWarningSeconds = 300;

/// A name in a #SBATCH line, where quoting is Slurm's own and best not needed.
std::string plain_name(const std::string& text, const std::string& flag) {
  const bool ok = !text.empty() && std::all_of(text.begin(), text.end(), [](char letter) {
    return (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z') ||
           (letter >= '0' && letter <= '9') ||
           std::string_view("_.,-:").find(letter) != std::string_view::npos;
  });
  if (ok && text.front() != '-') return text;
  throw Error(Fault::usage, {"'" + text + "' is no value of " + flag, "the command line",
                             "Names have letters, digits and any of _ . , - only."});
}

std::string time_text(std::int64_t seconds) {
  const auto two = [](std::int64_t value) {
    return (value < 10 ? "0" : "") + std::to_string(value);
  };
  return std::to_string(seconds / 86'400) + "-" + two(seconds / 3600 % 24) + ":" +
         two(seconds / 60 % 60) + ":" + two(seconds % 60);
}

std::string header(const SlurmJob& slurm) {
  const LaunchJob& job = slurm.job;
  std::string out = "#!/bin/bash\n";
  const auto line = [&](const std::string& name, const std::string& value) {
    out += "#SBATCH --" + name + (value.empty() ? "" : "=" + value) + "\n";
  };
  line("job-name", job.name);
  line("nodes", std::to_string(job.nodes));
  line("ntasks-per-node", std::to_string(job.ranks_per_node()));
  if (job.cpus_per_rank > 0) line("cpus-per-task", std::to_string(job.cpus_per_rank));
  if (job.gpus_per_node > 0) {
    const std::string type =
        job.gpu_type.empty() ? "" : plain_name(job.gpu_type, "--gpu-type") + ":";
    line("gres", "gpu:" + type + std::to_string(job.gpus_per_node));
  }
  if (job.memory_bytes > 0) {
    line("mem", std::to_string((job.memory_bytes + (1 << 20) - 1) >> 20) + "M");
  }
  if (!slurm.partition.empty()) line("partition", plain_name(slurm.partition, "--partition"));
  if (!slurm.account.empty()) line("account", plain_name(slurm.account, "--account"));
  if (job.seconds_max > 0) line("time", time_text(job.seconds_max));
  line("requeue", "");
  line("open-mode", "append");
  line("signal",
       "USR1@" + std::to_string(job.seconds_max > 0 ? std::min(kWarningSeconds, job.seconds_max / 3)
                                                    : kWarningSeconds));
  line("output", slurm_log_name(slurm));
  return out;
}

// Single quotes around it in the script: no single quote in here.
constexpr const char* kRank = R"(trap : TERM USR1 INT
RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID "$@"
code=$?
: >"$TAILOR_CODES/$code.$SLURM_PROCID"
# Left in order: the others may still be writing, and a code would have Slurm kill them.
case $code in 0 | 75 | 76) exit 0 ;; esac
# The others notice, name this rank and leave; then Slurm ends those that do not.
for ((i = 0; i < 100; i++)); do
  left=("$TAILOR_CODES"/*)
  [ ${#left[@]} -ge "$WORLD_SIZE" ] && break
  sleep 0.1
done
exit $code)";

constexpr const char* kEnd = R"(code=$?
# srun gives the largest code of all. A rank says first why it failed by itself, last that it was
# asked to stop (75) or lost another one (69).
for telling in 2 65 66 76 70 74 75 69; do
  set -- "$codes/$telling".*
  if [ -e "$1" ]; then code=$telling; break; fi
done
rm -rf "$codes"

# A job that was cancelled, or that Slurm requeues by itself, is no longer RUNNING here. One that is
# preempted is, as long as it leaves within the grace time, and then has to requeue itself.
state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p')
again=no
case $code in
  0 | 2 | 65 | 66 | 70 | 76 | 126 | 127) ;;
  75) again=yes ;;
  *) [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts_max" ] && again=yes ;;
esac
echo "tailor: the ranks left with $code; requeue: $again, the job is $state" >&2
if [ "$again" = yes ] && [ "$state" = RUNNING ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
)";

/// "A=b" fields of a line, separated by spaces; a value runs to the next " Name=".
std::map<std::string, std::string> fields_of(std::string_view line) {
  std::map<std::string, std::string> out;
  std::string last;
  for (const std::string& word : split(trim(line), ' ')) {
    const std::size_t equals = word.find('=');
    const bool name = equals != std::string::npos && equals > 0 &&
                      std::all_of(word.begin(), word.begin() + static_cast<std::ptrdiff_t>(equals),
                                  [](char letter) {
                                    return std::isalnum(static_cast<unsigned char>(letter)) != 0 ||
                                           letter == ':' || letter == '/' || letter == '_';
                                  });
    if (name) {
      last = word.substr(0, equals);
      out[last] = word.substr(equals + 1);
    } else if (!last.empty()) {
      out[last] += " " + word;
    }
  }
  return out;
}

std::int64_t number_of(std::string_view text) {
  std::int64_t out = 0;
  std::from_chars(text.data(), text.data() + text.size(), out);
  return out;
}

/// "1:15" is code 1 and signal 15.
void set_exit(const std::string& text, int& code, int& signal) {
  const std::size_t colon = text.find(':');
  code = static_cast<int>(number_of(text));
  signal = colon == std::string::npos
               ? 0
               : static_cast<int>(number_of(std::string_view(text).substr(colon + 1)));
}

/// GPUs of "billing=4,cpu=4,gres/gpu=8,mem=8000M,node=2"; of "gres:gpu:2" nothing: that is a
/// node's.
std::int64_t gpus_of(const std::string& tres) {
  for (const std::string& part : split(tres, ',')) {
    constexpr std::string_view kGpu = "gres/gpu=";
    if (part.starts_with(kGpu)) return number_of(std::string_view(part).substr(kGpu.size()));
  }
  return 0;
}

/// Seconds of "1-02:03:04".
std::int64_t elapsed_seconds(const std::string& text) {
  const std::size_t dash = text.find('-');
  std::int64_t seconds = dash == std::string::npos ? 0 : number_of(text) * 86'400;
  std::int64_t clock = 0;
  for (const std::string& part :
       split(dash == std::string::npos ? text : text.substr(dash + 1), ':')) {
    clock = clock * 60 + number_of(part);
  }
  return seconds + clock;
}

}  // namespace

std::string slurm_log_name(const SlurmJob& job) { return job.job.name + ".%j.log"; }

std::string slurm_script(const SlurmJob& slurm) {
  const LaunchJob& job = slurm.job;
  check_places(job);
  std::string out = header(slurm);
  out += "\n# Written by tailor launch slurm. One task is one rank; submit it with: sbatch FILE\n";
  out += "# Since when the devices are held, for the run's books.\n";
  out += "export TAILOR_ALLOCATED_AT=${SLURM_JOB_START_TIME:-$(date +%s)}\n";
  out += "cd " + shell_word(slurm.work_folder.string()) + " || exit 74\n";
  out += "command=(" + shell_words(job.train_command()) + ")\n";
  out += "restarts_max=" + std::to_string(job.restarts_max) + "\n";
  out +=
      "\necho \"tailor: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart "
      "${SLURM_RESTART_COUNT:-0}\" >&2\n";
  out += "first=$(scontrol show hostnames \"$SLURM_JOB_NODELIST\" | head -n 1)\n";
  out += "address=$(scontrol show node \"$first\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')\n";
  out += "export MASTER_ADDR=${address:-$first}\n";
  out += "export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0}) % 12000))\n";
  out += "export WORLD_SIZE=" + std::to_string(job.ranks) +
         " LOCAL_WORLD_SIZE=" + std::to_string(job.ranks_per_node()) + "\n";
  out += "export TAILOR_LAUNCHER=slurm TAILOR_LAUNCHER_JOB=$SLURM_JOB_ID\n";
  out += "if [ -n \"${SLURM_CPUS_PER_TASK:-}\" ]; then\n";
  out += "  export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n";
  out += "fi\n";
  out += "codes=$(mktemp -d \"$PWD/.tailor-$SLURM_JOB_ID.XXXXXX\") || exit 74\n";
  out += "export TAILOR_CODES=$codes\n";
  out += "\n# Signals reach every rank by themselves; this shell only has to outlive them.\n";
  out += "trap : TERM USR1 INT\n";
  out += std::string("rank='") + kRank + "'\n";
  out += "srun --kill-on-bad-exit=1 bash -c \"$rank\" rank \"${command[@]}\"\n";
  out += kEnd;
  return out;
}

std::optional<std::string> submitted_job(std::string_view printed) {
  const std::string_view text = trim(printed);
  const std::string_view number = text.substr(0, text.find(';'));
  const bool ok = !number.empty() && std::all_of(number.begin(), number.end(), [](char digit) {
    return digit >= '0' && digit <= '9';
  });
  return ok ? std::optional<std::string>(number) : std::nullopt;
}

bool SlurmState::ended() const {
  constexpr std::array<std::string_view, 9> kEnded = {"COMPLETED", "FAILED",        "CANCELLED",
                                                      "TIMEOUT",   "NODE_FAIL",     "BOOT_FAIL",
                                                      "DEADLINE",  "OUT_OF_MEMORY", "PREEMPTED"};
  return std::any_of(kEnded.begin(), kEnded.end(),
                     [&](std::string_view word) { return state.starts_with(word); });
}

int SlurmState::result() const {
  if (exit_code != 0) return exit_code;
  if (state.starts_with("OUT_OF_MEMORY")) return static_cast<int>(Fault::does_not_fit);
  if (exit_signal > 0) return 128 + exit_signal;
  if (state.starts_with("COMPLETED")) return 0;
  const bool broken = state.starts_with("NODE_FAIL") || state.starts_with("BOOT_FAIL") ||
                      state.starts_with("FAILED");
  return static_cast<int>(broken ? Fault::device : Fault::stopped);
}

SlurmState read_scontrol(std::string_view line) {
  auto fields = fields_of(line.substr(0, line.find('\n')));
  SlurmState out;
  out.job = fields["JobId"];
  out.name = fields["JobName"];
  out.state = fields["JobState"];
  out.reason = fields["Reason"] == "None" ? "" : fields["Reason"];
  out.restarts = static_cast<int>(number_of(fields["Restarts"]));
  set_exit(fields["ExitCode"], out.exit_code, out.exit_signal);
  out.log = fields["StdOut"];
  SlurmAttempt attempt;
  attempt.state = out.state;
  attempt.start = fields["StartTime"];
  attempt.end = fields["EndTime"];
  attempt.seconds = elapsed_seconds(fields["RunTime"]);
  attempt.gpus = gpus_of(fields["TRES"]);
  if (attempt.gpus == 0) {
    // Without accounting GPUs are not among the TRES; a node's are in
    // "TresPerNode=gres:gpu:h100:2".
    const std::string& node = fields["TresPerNode"];
    const std::size_t colon = node.rfind(':');
    if (node.find("gpu") != std::string::npos && colon != std::string::npos) {
      attempt.gpus = number_of(std::string_view(node).substr(colon + 1)) *
                     std::max<std::int64_t>(1, number_of(fields["NumNodes"]));
    }
  }
  attempt.exit_code = out.exit_code;
  attempt.exit_signal = out.exit_signal;
  out.attempts.push_back(attempt);
  return out;
}

std::optional<SlurmState> read_sacct(std::string_view lines) {
  SlurmState out;
  for (const std::string& line : split(lines, '\n')) {
    const std::vector<std::string> parts = split(line, '|');
    if (parts.size() < 8) continue;
    const std::int64_t seconds = number_of(parts[5]);
    if (parts[0].find('.') != std::string::npos) {
      // Steps come below their attempt. One may end after it, by the time its tasks took to leave.
      if (!out.attempts.empty()) {
        out.attempts.back().seconds = std::max(out.attempts.back().seconds, seconds);
      }
      continue;
    }
    SlurmAttempt attempt;
    attempt.state = parts[2];
    attempt.start = parts[3];
    attempt.end = parts[4];
    attempt.seconds = seconds;
    attempt.gpus = gpus_of(parts[6]);
    set_exit(parts[7], attempt.exit_code, attempt.exit_signal);
    out.job = parts[0];
    out.name = parts[1];
    out.state = attempt.state;
    out.exit_code = attempt.exit_code;
    out.exit_signal = attempt.exit_signal;
    out.attempts.push_back(attempt);
  }
  if (out.attempts.empty()) return std::nullopt;
  out.restarts = static_cast<int>(out.attempts.size()) - 1;
  out.accounting = true;
  return out;
}

}  // namespace tailor
