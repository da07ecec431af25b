#include <algorithm>
#include <iostream>

#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/runs/ledger.h"
#include "tools/launch/client.h"
#include "tools/launch/kubernetes.h"
#include "tools/launch/skypilot.h"
#include "tools/launch/slurm_log.h"
#include "tools/table.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

/// What the ledger has of a job: the run it belongs to, and the sums of its attempts.
struct JobCost {
  std::string run, name, status;
  int attempts = 0;
  std::int64_t device_ms = 0;
  std::optional<std::int64_t> usd_micros = 0;
  std::int64_t step = 0;
  double gpu_hours() const { return static_cast<double>(device_ms) / 3.6e6; }
};

/// Whether an attempt was this job's. SkyPilot's own names have the job's inside:
/// sky-managed-2026-11-24-10-00-00-000000_r1-4xh100_7-0.
bool is_of(const AttemptFacts& attempt, const std::string& launcher, const std::string& job) {
  if (attempt.launcher != launcher) return false;
  return attempt.launcher_job == job ||
         (launcher == "skypilot" &&
          attempt.launcher_job.find("_" + job + "_") != std::string::npos);
}

/// The newest run with an attempt by this job of this launcher.
std::optional<JobCost> cost_of(const std::string& place, const std::string& launcher,
                               const std::string& job) {
  const RealClock clock;
  const auto ledger = Ledger::open_existing(place.empty() ? Ledger::default_place() : place, clock);
  if (!ledger && !place.empty()) {
    throw Error(Fault::usage, {"there is no ledger", place, "Check --ledger."});
  }
  if (!ledger) return std::nullopt;
  for (const std::string& run : ledger->runs()) {
    const RunRecord record = ledger->read(run);
    JobCost out;
    for (const AttemptRecord& attempt : record.attempts) {
      if (!is_of(attempt.facts, launcher, job)) continue;
      const RunTotals totals = total(record, attempt.attempt);
      ++out.attempts;
      out.device_ms += totals.device_ms;
      out.usd_micros = out.usd_micros && totals.usd_micros
                           ? std::optional(*out.usd_micros + *totals.usd_micros)
                           : std::nullopt;
    }
    if (out.attempts == 0) continue;
    for (const SegmentRecord& segment : record.segments) {
      out.step = std::max(out.step, segment.facts.step);
    }
    out.run = run;
    out.name = record.facts.name;
    out.status = status_name(record.status(clock.unix_ms()));
    return out;
  }
  return std::nullopt;
}

Json cost_json(const std::optional<JobCost>& cost) {
  if (!cost) return {};
  return {{"run", cost->run},
          {"name", cost->name},
          {"status", cost->status},
          {"attempts", cost->attempts},
          {"step", cost->step},
          {"gpu_hours", cost->gpu_hours()},
          {"usd", cost->usd_micros ? Json(static_cast<double>(*cost->usd_micros) / 1e6) : Json()}};
}

void add_cost(TextTable& table, const std::optional<JobCost>& cost) {
  if (!cost) {
    table.add({"run", "no attempt of this job in the ledger (--ledger names another)"});
    return;
  }
  table.add({"run", cost->name + "  " + cost->run + "  " + cost->status + ", step " +
                        count_text(cost->step)});
  table.add({"cost", number_text(cost->gpu_hours(), 4) + " device hours" +
                         (cost->usd_micros ? ", " + usd_text(*cost->usd_micros)
                                           : ", dollars not known: no price") +
                         " in " + std::to_string(cost->attempts) +
                         (cost->attempts == 1 ? " attempt" : " attempts")});
}

int slurm_status(const LaunchStatusArguments& arguments) {
  const int code = arguments.follow ? follow_slurm(arguments.job, arguments.json ? 2 : 1) : 0;
  const SlurmState state = slurm_state(arguments.job);
  const auto cost = cost_of(arguments.ledger, "slurm", arguments.job);
  double gpu_hours = 0;
  for (const SlurmAttempt& attempt : state.attempts) gpu_hours += attempt.gpu_hours();
  if (arguments.json) {
    Json attempts = Json::array();
    for (const SlurmAttempt& attempt : state.attempts) {
      attempts.push_back({{"state", attempt.state},
                          {"start", attempt.start},
                          {"end", attempt.end},
                          {"seconds", attempt.seconds},
                          {"gpus", attempt.gpus},
                          {"exit_code", attempt.exit_code},
                          {"exit_signal", attempt.exit_signal}});
    }
    const Json out = {{"cluster", "slurm"},
                      {"job", state.job},
                      {"name", state.name},
                      {"state", state.state},
                      {"reason", state.reason.empty() ? Json() : Json(state.reason)},
                      {"ended", state.ended()},
                      {"restarts", state.restarts},
                      {"exit_code", state.exit_code},
                      {"log", state.log.empty() ? Json() : Json(state.log)},
                      {"accounting", state.accounting},
                      {"slurm_gpu_hours", state.accounting ? Json(gpu_hours) : Json()},
                      {"attempts", attempts},
                      {"run", cost_json(cost)}};
    std::cout << out.dump(2) << "\n";
    return code;
  }
  TextTable table({"", ""});
  table.add({"job", state.job + "  " + state.name});
  table.add({"state", lower(state.state) + (state.reason.empty() ? "" : ", " + state.reason) +
                          ", " + std::to_string(state.restarts) +
                          (state.restarts == 1 ? " restart" : " restarts")});
  if (state.ended()) table.add({"exit code", std::to_string(state.exit_code)});
  if (!state.log.empty()) table.add({"log", state.log});
  add_cost(table, cost);
  table.add({"Slurm", state.accounting
                          ? number_text(gpu_hours, 4) + " GPU hours in " +
                                std::to_string(state.attempts.size()) +
                                (state.attempts.size() == 1 ? " attempt" : " attempts")
                          : "keeps no accounting: earlier attempts are not known to it"});
  std::cout << rows_text(table, "");
  return code;
}

int kubernetes_status(const LaunchStatusArguments& arguments) {
  std::vector<std::string> where;
  if (!arguments.name_space.empty()) where.push_back("--namespace=" + arguments.name_space);
  const auto with = [&](std::vector<std::string> command) {
    command.insert(command.end(), where.begin(), where.end());
    return command;
  };
  if (arguments.follow) {
    show_client(with({"kubectl", "logs", "--follow", "--prefix", "--selector",
                      "app.kubernetes.io/instance=" + arguments.job}));
  }
  // A TrainJob's job has another name; its own object has the conditions.
  ClientOutcome found = run_client(with({"kubectl", "get", "job", arguments.job, "-o", "json"}));
  if (found.code != 0) {
    const ClientOutcome other =
        run_client(with({"kubectl", "get", "trainjob", arguments.job, "-o", "json"}));
    if (other.code == 0) found = other;
  }
  if (found.code != 0) {
    throw Error(Fault::device,
                {"kubectl does not find job " + arguments.job + ": " + std::string(trim(found.err)),
                 "kubectl get job", "Check the name, --namespace and the context."});
  }
  const KubernetesState state = read_kubernetes_state(parse_json(found.out, "kubectl get job"));
  const auto cost = cost_of(arguments.ledger, "kubernetes", arguments.job);
  if (arguments.json) {
    const Json out = {
        {"cluster", "kubernetes"},
        {"job", arguments.job},
        {"state", state.state},
        {"reason", state.reason.empty() ? Json() : Json(state.reason)},
        {"ended", state.ended()},
        {"pods",
         {{"active", state.active}, {"succeeded", state.succeeded}, {"failed", state.failed}}},
        {"run", cost_json(cost)}};
    std::cout << out.dump(2) << "\n";
    return 0;
  }
  TextTable table({"", ""});
  table.add({"job", arguments.job});
  table.add({"state", state.state + (state.reason.empty() ? "" : ": " + state.reason)});
  table.add({"pods", std::to_string(state.active) + " active, " + std::to_string(state.succeeded) +
                         " succeeded, " + std::to_string(state.failed) + " failed"});
  add_cost(table, cost);
  std::cout << rows_text(table, "");
  return 0;
}

int skypilot_status(const LaunchStatusArguments& arguments) {
  if (arguments.follow) show_client({"sky", "jobs", "logs", "--follow", "--name", arguments.job});
  const std::string printed = client_output({"sky", "jobs", "queue", "--output", "json"});
  const auto state = read_skypilot_state(parse_json(printed, "sky jobs queue"), arguments.job);
  if (!state) {
    throw Error(Fault::usage, {"SkyPilot does not know job " + arguments.job, "sky jobs queue",
                               "Check the name."});
  }
  const auto cost = cost_of(arguments.ledger, "skypilot", arguments.job);
  if (arguments.json) {
    const Json out = {{"cluster", "skypilot"},
                      {"job", arguments.job},
                      {"number", state->number},
                      {"state", state->state},
                      {"reason", state->reason.empty() ? Json() : Json(state->reason)},
                      {"recoveries", state->recoveries},
                      {"seconds", state->seconds},
                      {"run", cost_json(cost)}};
    std::cout << out.dump(2) << "\n";
    return 0;
  }
  TextTable table({"", ""});
  table.add({"job", arguments.job + "  " + std::to_string(state->number)});
  table.add({"state", state->state + (state->reason.empty() ? "" : ": " + state->reason) + ", " +
                          std::to_string(state->recoveries) + " recoveries, " +
                          seconds_text(state->seconds)});
  add_cost(table, cost);
  std::cout << rows_text(table, "");
  return 0;
}

}  // namespace

int run_launch_status(const LaunchStatusArguments& arguments) {
  const bool number =
      !arguments.job.empty() && arguments.job.find_first_not_of("0123456789") == std::string::npos;
  std::string on = arguments.on;
  if (on.empty() && number) on = "slurm";
  if (on == "slurm") return slurm_status(arguments);
  if (on == "kubernetes") return kubernetes_status(arguments);
  if (on == "skypilot") return skypilot_status(arguments);
  throw Error(Fault::usage, {"whose job " + arguments.job + " is, is not known",
                             "the command line of tailor launch status",
                             "Add --on kubernetes or --on skypilot."});
}

}  // namespace tailor
