#include "base/rank_env.h"

#include <ctime>

#include "base/file.h"
#include "base/json.h"
#include "base/text.h"

namespace tailor {
namespace {

constexpr const char* kContract =
    "Start every rank with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as torchrun and "
    "`tailor launch` do; unset them all for a run of one rank.";

class Variables : public Environment {
 public:
  using Environment::Environment;
  std::optional<int> number(const char* name) const { return Environment::number(name, kContract); }
  int number(const char* name, const char* because) const {
    const auto found = number(name);
    if (!found) {
      throw wrong(std::string(name) + " is not set, although " + because, name, kContract);
    }
    return *found;
  }
};

int checked_port(int port, const char* from) {
  if (port < 1 || port > 65535) {
    throw Variables::wrong(
        std::string(from) + "=" + std::to_string(port) + " is not a port: needed is 1 to 65535",
        from, "Choose a free port above 1023, such as 29500.");
  }
  return port;
}

void check_ranges(const RankEnv& out, const char* rank_from, const char* size_from) {
  if (out.world_size < 1) {
    throw Variables::wrong(std::string(size_from) + "=0: a run has at least one rank", size_from,
                           kContract);
  }
  if (out.rank >= out.world_size) {
    throw Variables::wrong(std::string(rank_from) + "=" + std::to_string(out.rank) +
                               " is not below " + size_from + "=" + std::to_string(out.world_size),
                           std::string(rank_from) + ", " + size_from,
                           "Ranks count from 0 to WORLD_SIZE - 1.");
  }
  if (out.local_world_size > out.world_size) {
    throw Variables::wrong("LOCAL_WORLD_SIZE=" + std::to_string(out.local_world_size) +
                               " is more than WORLD_SIZE=" + std::to_string(out.world_size),
                           "LOCAL_WORLD_SIZE, WORLD_SIZE",
                           "LOCAL_WORLD_SIZE counts the ranks of this node only.");
  }
  const int local_limit = out.local_world_size > 0 ? out.local_world_size : out.world_size;
  if (out.local_rank >= local_limit) {
    throw Variables::wrong("LOCAL_RANK=" + std::to_string(out.local_rank) + " is not below " +
                               (out.local_world_size > 0 ? "LOCAL_WORLD_SIZE=" : "WORLD_SIZE=") +
                               std::to_string(local_limit),
                           "LOCAL_RANK, LOCAL_WORLD_SIZE",
                           "LOCAL_RANK counts from 0 within this node.");
  }
}

void read_torchrun(const Variables& env, RankEnv& out) {
  const bool indexed = !env.has("RANK") && env.has("JOB_COMPLETION_INDEX");
  const char* rank_from = indexed ? "JOB_COMPLETION_INDEX" : "RANK";
  if (env.has("WORLD_SIZE") && !env.has(rank_from)) {
    const bool slurm = env.has("SLURM_PROCID");
    throw Variables::wrong(
        "WORLD_SIZE=" + *env.text("WORLD_SIZE") + " is set and RANK is not", "WORLD_SIZE, RANK",
        slurm
            ? "Unset WORLD_SIZE to go by srun's own variables, or set RANK=$SLURM_PROCID in every "
              "task."
            : kContract);
  }
  out.rank = env.number(rank_from, "WORLD_SIZE is");
  out.world_size = env.number("WORLD_SIZE", "RANK is");
  out.local_rank = env.number("LOCAL_RANK").value_or(-1);
  const auto local_size = env.number("LOCAL_WORLD_SIZE");
  if (local_size == 0) {
    throw Variables::wrong("LOCAL_WORLD_SIZE=0: this rank itself is one", "LOCAL_WORLD_SIZE",
                           kContract);
  }
  out.local_world_size = local_size.value_or(0);
  check_ranges(out, rank_from, "WORLD_SIZE");
  if (!env.has("MASTER_ADDR") && out.world_size > 1) {
    throw Variables::wrong(
        "MASTER_ADDR is not set, although WORLD_SIZE=" + std::to_string(out.world_size),
        "MASTER_ADDR",
        "Set MASTER_ADDR to the host name or address of rank 0's node, and "
        "MASTER_PORT to a free port there.");
  }
  out.master_addr = env.text_or("MASTER_ADDR", "127.0.0.1");
  // The default of torch.distributed.
  out.master_port = checked_port(env.number("MASTER_PORT").value_or(29500), "MASTER_PORT");
}

/// A job step of srun with more than one task. (A batch script has SLURM_PROCID too, but no step.)
bool in_slurm_step(const Variables& env) {
  if (!env.has("SLURM_STEP_ID") || !env.has("SLURM_PROCID")) return false;
  const auto tasks = env.number("SLURM_STEP_NUM_TASKS");
  return tasks.value_or(env.number("SLURM_NTASKS").value_or(1)) > 1;
}

void read_slurm(const Variables& env, RankEnv& out) {
  const char* tasks_from =
      env.has("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
  out.rank = env.number("SLURM_PROCID", "this is a step of srun");
  out.world_size = env.number(tasks_from, "SLURM_PROCID is");
  out.local_rank = env.number("SLURM_LOCALID").value_or(-1);
  const auto node = env.number("SLURM_NODEID");
  if (env.has("SLURM_STEP_TASKS_PER_NODE") && node) {
    const auto tasks = slurm_tasks_per_node(*env.text("SLURM_STEP_TASKS_PER_NODE"));
    if (static_cast<std::size_t>(*node) < tasks.size()) {
      out.local_world_size = tasks[static_cast<std::size_t>(*node)];
    }
  } else if (const auto per_node = env.number("SLURM_NTASKS_PER_NODE");
             per_node && *per_node * env.number("SLURM_NNODES").value_or(0) == out.world_size) {
    out.local_world_size = *per_node;
  }
  check_ranges(out, "SLURM_PROCID", tasks_from);
  if (const auto addr = env.text("MASTER_ADDR")) {
    out.master_addr = *addr;
  } else {
    const auto nodes = env.has("SLURM_STEP_NODELIST") ? env.text("SLURM_STEP_NODELIST")
                                                      : env.text("SLURM_JOB_NODELIST");
    if (!nodes) {
      throw Variables::wrong("neither SLURM_JOB_NODELIST nor MASTER_ADDR is set",
                             "SLURM_JOB_NODELIST",
                             "Set MASTER_ADDR to the first host of the job: `scontrol show "
                             "hostnames | head -1`.");
    }
    out.master_addr = first_slurm_host(*nodes);
  }
  if (const auto port = env.number("MASTER_PORT")) {
    out.master_port = checked_port(*port, "MASTER_PORT");
  } else {
    // Neighbours on shared nodes, and the attempt before this one, have other ports.
    const int job = env.number("SLURM_JOB_ID", "SLURM_PROCID is");
    out.master_port = slurm_port(job, env.number("SLURM_RESTART_COUNT").value_or(0));
  }
}

}  // namespace

std::optional<RankEnv> read_rank_env(const EnvLookup& lookup) {
  const Variables env(lookup);
  RankEnv out;
  if (env.has("RANK") || env.has("WORLD_SIZE")) {
    read_torchrun(env, out);
  } else if (in_slurm_step(env)) {
    read_slurm(env, out);
  } else if (env.has("JOB_COMPLETION_INDEX") && env.has("MASTER_ADDR")) {
    throw Variables::wrong("MASTER_ADDR and JOB_COMPLETION_INDEX are set and WORLD_SIZE is not",
                           "WORLD_SIZE", "Set WORLD_SIZE to the Job's completions.");
  } else {
    return std::nullopt;
  }
  out.agent_store = lower(env.text_or("TORCHELASTIC_USE_AGENT_STORE", "")) == "true";
  out.launcher = read_launcher(lookup);
  for (const char* name : {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SKYPILOT_TASK_ID"}) {
    if (const auto id = env.text(name)) out.job += (out.job.empty() ? "" : " ") + *id;
  }
  if (!out.job.empty()) out.job += " start " + std::to_string(out.launcher.restart);
  return out;
}

void write_error_file(const Error& error, const EnvLookup& lookup) noexcept {
  try {
    const auto path = Variables(lookup).text("TORCHELASTIC_ERROR_FILE");
    if (!path) return;
    // Read by torch.distributed.elastic (ProcessFailure, ChildFailedError): the second it was
    // written tells the agent which failure was first; of extraInfo's py_callstack it prints all,
    // so the text of ours stands there.
    const Json document = {
        {"message",
         {{"message", to_text(error)},
          {"extraInfo",
           {{"py_callstack", to_text(error)}, {"timestamp", std::to_string(std::time(nullptr))}}},
          {"errorCode", error.exit_code()}}}};
    write_atomically(*path, document.dump());
  } catch (const std::exception&) {
    // The failure itself is on stderr and in the exit code; it must not be hidden by this.
  }
}

}  // namespace tailor
