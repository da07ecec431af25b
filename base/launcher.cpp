#include "base/launcher.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/text.h"

namespace tailor {
namespace {

Error bad_node_list(const std::string& list) {
  return Environment::wrong(
      "the node list '" + list + "' is not of the form host,name[1-3,7]", "SLURM_JOB_NODELIST",
      "Set MASTER_ADDR to the first host of the job: `scontrol show hostnames "
      "| head -1`.");
}

double unix_seconds(const Environment& env, const char* name) {
  const auto text = env.text(name);
  if (!text) return 0;
  double value = 0;
  const auto [end, fault] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (fault == std::errc() && end == text->data() + text->size() && value > 0 && value < 1e11) {
    return value;
  }
  throw Environment::wrong(std::string(name) + "='" + *text + "' is no time", name,
                           "Unset it, or give Unix seconds: date +%s.");
}

}  // namespace

std::string first_slurm_host(const std::string& node_list) {
  std::string host;
  for (std::size_t at = 0; at < node_list.size() && node_list[at] != ','; ++at) {
    if (node_list[at] != '[') {
      if (node_list[at] == ']') throw bad_node_list(node_list);
      host += node_list[at];
      continue;
    }
    const std::size_t close = node_list.find(']', at);
    const std::size_t end = node_list.find_first_of(",-]", at);
    const std::string number =
        node_list.substr(at + 1, end == std::string::npos ? 0 : end - at - 1);
    if (close == std::string::npos || number.empty() ||
        number.find_first_not_of("0123456789") != std::string::npos) {
      throw bad_node_list(node_list);
    }
    host += number;
    at = close;
  }
  if (host.empty()) throw bad_node_list(node_list);
  return host;
}

std::vector<int> slurm_tasks_per_node(const std::string& text) {
  std::vector<int> out;
  const auto bad = [&] {
    return Environment::wrong(
        "'" + text + "' is not of the form 2(x3),1", "SLURM_STEP_TASKS_PER_NODE",
        "Set LOCAL_WORLD_SIZE and torchrun's "
        "other variables instead: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.");
  };
  for (const std::string& part : split(text, ',')) {
    int tasks = 0, nodes = 1;
    const char* const last = part.data() + part.size();
    auto [end, fault] = std::from_chars(part.data(), last, tasks);
    if (fault != std::errc()) throw bad();
    if (end != last) {
      if (!std::string_view(end, last).starts_with("(x") || *(last - 1) != ')') throw bad();
      const auto [end_nodes, fault_nodes] = std::from_chars(end + 2, last - 1, nodes);
      if (fault_nodes != std::errc() || end_nodes != last - 1) throw bad();
    }
    if (tasks < 1 || nodes < 1 || nodes > 1'000'000) throw bad();
    out.insert(out.end(), static_cast<std::size_t>(nodes), tasks);
  }
  if (out.empty()) throw bad();
  return out;
}

int slurm_port(std::int64_t job, std::int64_t restarts) {
  return static_cast<int>(20000 + (job * 8 + restarts) % 12000);
}

std::int64_t Launcher::paid_since_steady_ms(const Clock& clock,
                                            std::int64_t program_began_ms) const {
  if (allocated_unix_s <= 0) return program_began_ms;
  const double ago_s = static_cast<double>(clock.unix_ms()) / 1000 - allocated_unix_s;
  if (ago_s < 0 || ago_s > 6 * 3600) return program_began_ms;
  return std::min<std::int64_t>(program_began_ms, clock.steady_ms() - std::llround(ago_s * 1000));
}

Launcher read_launcher(const EnvLookup& lookup) {
  const Environment env(lookup);
  const auto number = [&](const char* name) {
    return env.number(name, "Start the run with a launcher, or unset it.").value_or(0);
  };
  const int torch_restart = number("TORCHELASTIC_RESTART_COUNT");
  if (const auto own = env.text("TAILOR_LAUNCHER")) {
    return {*own, env.text_or("TAILOR_LAUNCHER_JOB", ""),
            number("SLURM_RESTART_COUNT") + torch_restart,
            unix_seconds(env, "TAILOR_ALLOCATED_AT")};
  }
  if (const auto task = env.text("SKYPILOT_TASK_ID")) return {"skypilot", *task, torch_restart, 0};
  if (const auto job = env.text("SLURM_JOB_ID")) {
    return {"slurm", *job, number("SLURM_RESTART_COUNT") + torch_restart, 0};
  }
  if (env.has("KUBERNETES_SERVICE_HOST") || env.has("JOB_COMPLETION_INDEX")) {
    std::string job = env.text_or("JOB_NAME", "");
    // The host name of an Indexed Job's pod is JOB-INDEX.
    const std::string host = env.text_or("HOSTNAME", ""),
                      index = "-" + env.text_or("JOB_COMPLETION_INDEX", "");
    if (job.empty() && index.size() > 1 && host.ends_with(index)) {
      job = host.substr(0, host.size() - index.size());
    }
    return {"kubernetes", job, torch_restart, 0};
  }
  if (const auto run = env.text("TORCHELASTIC_RUN_ID")) return {"torchrun", *run, torch_restart, 0};
  return {};
}

}  // namespace tailor
