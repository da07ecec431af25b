#include "data/runs/budget.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "base/text.h"
#include "base/units.h"

namespace tailor {
namespace {

/// Steps of an attempt before what is to come is worked out from them.
constexpr std::int64_t kStepsToForecast = 5;

std::string hours_text(double device_ms) {
  return number_text(device_ms / 3.6e6, 4) + " GPU-hours";
}
std::string dollars_text(double micros) {
  return usd_text(static_cast<std::int64_t>(std::llround(micros)));
}

/// Of one limit: what it allows, and what is used of it.
struct Use {
  double used = 0, limit = 0;
  bool money = false;
  std::string whose{};
  double share() const { return used / limit; }
  std::string text(double amount) const {
    return money ? dollars_text(amount) : hours_text(amount);
  }
};

[[noreturn]] void refuse(const Use& use, const PlannedUse& plan, double planned,
                         const std::string& where, const std::string& raise) {
  if (!plan.left.empty()) {
    throw Error(
        Fault::budget,
        {use.text(planned) + " for " + plan.left + " are more than is left of " + use.whose + ": " +
             use.text(std::max(0.0, use.limit - use.used)) + " of " + use.text(use.limit),
         where,
         raise + " It must be " + use.text(use.used + planned) +
             " or more. With --resume --over-budget it goes on all the same, and is saved "
             "and stopped before the budget is spent."});
  }
  throw Error(Fault::budget,
              {"the plan exceeds " + use.whose + ": " + use.text(use.used) + " used and " +
                   use.text(planned) + " planned of " + use.text(use.limit),
               where,
               raise + " --over-budget starts it all the same: it is then saved and stopped before "
                       "the budget is spent."});
}

}  // namespace

std::optional<PlannedUse> left_at_pace(const Ledger& ledger, const std::string& run,
                                       std::int64_t first_step, std::int64_t steps,
                                       std::optional<std::int64_t> usd_micros_per_device_hour) {
  if (run.empty() || !ledger.find_run(run)) return std::nullopt;
  const RunRecord record = ledger.read(run);
  double working_ms = 0;
  std::map<int, double> loading_ms;  // by attempt; the first may have packed, which is done
  std::int64_t done = 0;
  for (const SegmentRecord& segment : record.segments) {
    switch (segment.facts.phase) {
      case Phase::load:
        loading_ms[segment.attempt] += static_cast<double>(segment.device_ms);
        break;
      case Phase::train:
      case Phase::stall:
      case Phase::evaluate:
      case Phase::checkpoint:
        working_ms += static_cast<double>(segment.device_ms);
        done += segment.facts.steps;
        break;
      default:  // lost and idle time need not come again
        break;
    }
  }
  if (done < kStepsToForecast) return std::nullopt;
  const std::int64_t left = std::max<std::int64_t>(0, steps - first_step);
  const auto least = std::min_element(
      loading_ms.begin(), loading_ms.end(),
      [](const auto& one, const auto& other) { return one.second < other.second; });
  PlannedUse out;
  out.device_ms = std::llround(working_ms / static_cast<double>(done) * static_cast<double>(left) +
                               (least == loading_ms.end() ? 0 : least->second));
  if (usd_micros_per_device_hour) {
    out.usd_micros = cost_usd_micros(*usd_micros_per_device_hour, *out.device_ms);
  }
  out.left = "the " + count_text(left) + " steps left, at the pace of the " + count_text(done) +
             " so far,";
  return out;
}

void refuse_over_budget(const Ledger& ledger, const std::string& run, const std::string& project,
                        const BudgetLimits& own, const PlannedUse& planned) {
  std::int64_t used_ms = 0;
  std::int64_t used_usd = 0;
  if (!run.empty() && ledger.find_run(run)) {
    const RunTotals totals = ledger.totals(run);
    used_ms = totals.device_ms;
    used_usd = totals.usd_micros.value_or(0);
  }
  const auto check = [&](std::optional<std::int64_t> limit, std::int64_t used,
                         std::optional<std::int64_t> to_come, bool money, const std::string& whose,
                         const std::string& where, const std::string& raise) {
    if (!limit || !to_come || used + *to_come <= *limit) return;
    refuse({static_cast<double>(used), static_cast<double>(*limit), money, whose}, planned,
           static_cast<double>(*to_come), where, raise);
  };
  check(own.usd_micros, used_usd, planned.usd_micros, true, "the run's budget", "budget.usd",
        planned.left.empty() ? "Raise budget.usd, or plan for less: tailor plan."
                             : "Raise budget.usd.");
  check(own.device_ms, used_ms, planned.device_ms, false, "the run's budget", "budget.gpu_hours",
        planned.left.empty() ? "Raise budget.gpu_hours, or plan for less: tailor plan."
                             : "Raise budget.gpu_hours.");
  if (project.empty()) return;
  const auto shared = ledger.budget(project);
  if (!shared) return;
  const ProjectSpending spending = ledger.spending(project);
  std::int64_t all_ms = spending.device_ms;
  std::int64_t all_usd = spending.usd_micros;
  const std::int64_t now = ledger.clock().unix_ms();
  for (const ProjectSpending::Running& other : spending.running) {
    if (other.attempt.run == run || !other.alive(now)) continue;
    all_ms += std::max<std::int64_t>(0, other.planned_device_ms.value_or(0) - other.device_ms);
    all_usd += std::max<std::int64_t>(0, other.planned_usd_micros.value_or(0) - other.usd_micros);
  }
  const std::string whose = "the budget of project " + project;
  const std::string raise =
      "Raise it with `tailor runs budget " + project + "`, or wait for other runs to end.";
  check(shared->usd_micros_limit, all_usd, planned.usd_micros, true, whose, "cost.project", raise);
  check(shared->device_ms_limit, all_ms, planned.device_ms, false, whose, "cost.project", raise);
}

BudgetWatch::BudgetWatch(const Ledger& ledger, AttemptId attempt, const Options& options)
    : ledger_(ledger), attempt_(std::move(attempt)), options_(options) {
  refresh();
}

void BudgetWatch::refresh() {
  if (options_.project.empty()) return;
  try {
    const auto budget = ledger_.budget(options_.project);
    if (!budget) return;
    const ProjectSpending others = ledger_.spending_without(options_.project, attempt_.run);
    Others known;
    known.limits = {budget->usd_micros_limit, budget->device_ms_limit};
    known.at_ms = ledger_.clock().steady_ms();
    known.device_ms = static_cast<double>(others.device_ms);
    known.usd_micros = static_cast<double>(others.usd_micros);
    const std::int64_t now = ledger_.clock().unix_ms();
    for (const ProjectSpending::Running& other : others.running) {
      if (!other.alive(now)) continue;
      const double rate =
          static_cast<double>(other.usd_micros_per_device_hour.value_or(0)) / 3.6e6 * other.devices;
      const auto silent =
          static_cast<double>(std::max<std::int64_t>(0, now - other.heartbeat_unix_ms));
      known.device_ms_per_ms += other.devices;
      known.usd_micros_per_ms += rate;
      known.device_ms += silent * other.devices;
      known.usd_micros += silent * rate;
    }
    const std::lock_guard guard(mutex_);
    others_ = known;
  } catch (const Error& error) {
    if (error.fault() != Fault::io && error.fault() != Fault::bad_file) throw;
  }
}

std::optional<SharedBudget> BudgetWatch::shared() const {
  const std::lock_guard guard(mutex_);
  return shared_now();
}

std::optional<SharedBudget> BudgetWatch::shared_now() const {
  if (!others_) return std::nullopt;
  const auto since = static_cast<double>(ledger_.clock().steady_ms() - others_->at_ms);
  return SharedBudget{others_->limits, others_->device_ms + since * others_->device_ms_per_ms,
                      others_->usd_micros + since * others_->usd_micros_per_ms};
}

BudgetWatch::Verdict BudgetWatch::after_step(const SegmentTimer::Spent& spent, std::int64_t step,
                                             double saving_seconds) {
  const std::lock_guard guard(mutex_);
  Verdict verdict;
  if (!options_.own.any() && !others_) return verdict;
  if (!first_) {
    first_ = spent;
    first_at_step_ = step;
  }
  const double rate =  // micro-dollars of a device-millisecond
      static_cast<double>(options_.usd_micros_per_device_hour.value_or(0)) / 3.6e6;
  const std::int64_t steps_seen = step - first_at_step_;
  const double ms_per_step =  // device time, with all that came between the steps
      steps_seen > 0 ? static_cast<double>(spent.device_ms - first_->device_ms) /
                           static_cast<double>(steps_seen)
                     : 0;
  const double reserve = saving_seconds * 1000 * options_.devices + ms_per_step;
  const auto ms = static_cast<double>(spent.device_ms);
  const auto usd = static_cast<double>(spent.usd_micros.value_or(0));

  std::vector<Use> uses;
  const auto add = [&](const BudgetLimits& limits, double others_ms, double others_usd,
                       const std::string& whose) {
    if (limits.device_ms) {
      uses.push_back({ms + others_ms, static_cast<double>(*limits.device_ms), false, whose});
    }
    if (limits.usd_micros && spent.usd_micros) {
      uses.push_back({usd + others_usd, static_cast<double>(*limits.usd_micros), true, whose});
    }
  };
  add(options_.own, 0, 0, "the budget");
  if (const auto shared = shared_now()) {
    add(shared->limits, shared->others_device_ms, shared->others_usd_micros,
        "the budget of project " + options_.project);
  }

  const double left =
      ms_per_step * static_cast<double>(std::max<std::int64_t>(0, options_.steps - step));
  for (const Use& use : uses) {
    const double unit = use.money ? rate : 1;
    if (use.used + reserve * unit >= use.limit) verdict.stop = true;
    if (!warned_ && use.used + reserve * unit >= options_.warn * use.limit) {
      warned_ = true;
      verdict.event = "budget_warning";
      verdict.say = number_text(100 * (use.used + reserve * unit) / use.limit, 3) + " % of " +
                    use.whose + " is spent: " + use.text(use.used) + " of " + use.text(use.limit);
      continue;
    }
    const double in_the_end = use.used + left * unit;
    if (forecast_ || !verdict.event.empty() || steps_seen < kStepsToForecast ||
        in_the_end <= use.limit) {
      continue;
    }
    forecast_ = true;
    const auto steps_more = static_cast<std::int64_t>(
        std::max(0.0, (use.limit - use.used - reserve * unit) / (ms_per_step * unit)));
    verdict.event = "budget_forecast";
    verdict.say = "at this pace the run needs " + use.text(in_the_end) + ", " + use.whose + " is " +
                  use.text(use.limit) + ": it will be saved and stopped about step " +
                  count_text(step + steps_more) + " of " + count_text(options_.steps);
  }
  return verdict;
}

}  // namespace tailor
