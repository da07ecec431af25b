#include <algorithm>
#include <iostream>

#include "base/clock.h"
#include "base/environment.h"
#include "base/error.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"
#include "base/url.h"
#include "data/runs/grouping.h"
#include "data/runs/journaled_ledger.h"
#include "data/runs/listing.h"
#include "data/runs/report.h"
#include "data/runs/run_folder.h"
#include "recipes/scalars.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

/// The ledger named, which must be there, or the default one, null where there is none yet.
std::unique_ptr<Ledger> open_ledger(const std::string& place, const Clock& clock) {
  if (place.empty()) return Ledger::open_existing(Ledger::default_place(), clock);
  auto ledger = Ledger::open_existing(place, clock);
  if (!ledger) {
    throw Error(Fault::usage, {"there is no ledger", without_password(place),
                               "Check --ledger; without it the default one is used, which `tailor "
                               "doctor` names."});
  }
  return ledger;
}

/// What the user means by RUN: a run's folder by the identifier in it, anything else as it is.
std::string named_run(const Ledger* ledger, const std::string& asked) {
  if (asked.empty()) {
    const std::vector<std::string> runs =
        ledger != nullptr ? ledger->runs() : std::vector<std::string>();
    if (runs.empty()) {
      throw Error(Fault::usage, {"there are no runs yet",
                                 ledger != nullptr ? ledger->place() : Ledger::default_place(),
                                 "Train one: tailor train demo-maverick"});
    }
    return runs.front();
  }
  std::error_code error;
  if (fs::is_directory(asked, error)) {
    const std::string run = RunFolder::run_in(asked);
    if (!run.empty()) return run;
  }
  return asked;
}

GroupBy group_by(const std::string& word) {
  for (const GroupBy by : {GroupBy::day, GroupBy::model, GroupBy::user}) {
    if (group_name(by) == word) return by;
  }
  return GroupBy::project;
}

/// A decimal above zero, in millionths.
std::int64_t amount(const std::string& flag, const std::string& text) {
  const auto micros = parse_micros(text);
  if (micros && *micros > 0) return *micros;
  throw Error(Fault::usage,
              {flag + " needs an amount above 0, found '" + text + "'", "",
               "Write it in digits, such as " + flag + " 150 or " + flag + " 99.50."});
}

std::string focus_text(const Ledger* ledger) {
  FocusExport out = export_focus(ledger);
  if (out.unpriced_device_ms > 0) {
    log_warning("left out " + number_text(static_cast<double>(out.unpriced_device_ms) / 3.6e6, 4) +
                " GPU-hours without a price: FOCUS has no unknown costs");
  }
  return std::move(out.csv);
}

Json amount_or_null(std::int64_t amount, double unit) {
  return amount > 0 ? Json(static_cast<double>(amount) / unit) : Json();
}

/// The budget of a project beside what is spent.
int show_budget(const Ledger& ledger, const std::string& project, bool json) {
  const auto budget = ledger.budget(project);
  const ProjectSpending spending = ledger.spending(project);
  const std::int64_t now = ledger.clock().unix_ms();
  const auto running =
      std::count_if(spending.running.begin(), spending.running.end(),
                    [&](const ProjectSpending::Running& run) { return run.alive(now); });
  std::int64_t usd = 0;  // 0: no limit, which no limit is
  std::int64_t hours = 0;
  if (budget) {
    usd = budget->usd_micros_limit.value_or(0);
    hours = budget->device_ms_limit.value_or(0);
  }
  if (json) {
    std::cout << Json{{"project", project},
                      {"usd_limit", amount_or_null(usd, 1e6)},
                      {"gpu_hours_limit", amount_or_null(hours, 3.6e6)},
                      {"usd", static_cast<double>(spending.usd_micros) / 1e6},
                      {"gpu_hours", static_cast<double>(spending.device_ms) / 3.6e6},
                      {"unpriced", spending.unpriced},
                      {"running", running},
                      {"set_by", budget ? Json(budget->set_by) : Json()},
                      {"set", budget ? Json(utc_text(budget->set_unix_ms)) : Json()}}
                     .dump(2)
              << "\n";
    return 0;
  }
  const auto line = [](const std::string& spent, const std::string& limit) {
    return "  " + spent + " spent" + (limit.empty() ? ", no limit" : " of " + limit) + "\n";
  };
  std::cout << "project " << project << (budget ? "" : ": no budget was set") << "\n"
            << line(usd_text(spending.usd_micros), usd > 0 ? usd_text(usd) : "")
            << line(number_text(static_cast<double>(spending.device_ms) / 3.6e6, 4) + " GPU-hours",
                    hours > 0 ? number_text(static_cast<double>(hours) / 3.6e6, 4) : "")
            << "  " << running << (running == 1 ? " run is" : " runs are") << " going on\n";
  if (spending.unpriced) std::cout << "  some runs have no price: their time costs nothing here\n";
  return 0;
}

}  // namespace

int run_runs_replay(const RunsReplayArguments& arguments) {
  const RealClock clock;
  if (RunFolder::run_in(arguments.folder).empty()) {
    throw Error(Fault::usage, {"no run's folder", arguments.folder,
                               "Name the output_dir of a run; `tailor runs ls` lists them."});
  }
  // Taken, as by an attempt: a process that trains here writes its journal itself.
  const RunFolder folder = RunFolder::open(arguments.folder, true, clock);
  const std::vector<fs::path> journals = journals_in(folder.path());
  Replayed done;
  std::string place = arguments.ledger;
  if (!journals.empty()) {
    if (place.empty()) place = journal_place(journals.front());
    const auto ledger = Ledger::open(place, clock);
    place = ledger->place();
    done = replay_journals(folder.path(), *ledger);
  }
  if (arguments.json) {
    std::cout << Json{{"journals", done.journals},
                      {"entries", done.entries},
                      {"ledger", journals.empty() ? Json() : Json(place)}}
                     .dump()
              << "\n";
  } else if (journals.empty()) {
    std::cout << "nothing waits in " << folder.path().string() << "\n";
  } else {
    std::cout << place << " has taken in " << done.journals
              << (done.journals == 1 ? " journal of " : " journals of ") << done.entries
              << " entries\n";
  }
  return 0;
}

int run_runs_budget(const RunsBudgetArguments& arguments) {
  const RealClock clock;
  const bool set = !arguments.usd.empty() || !arguments.gpu_hours.empty() || arguments.none;
  if (arguments.none && (!arguments.usd.empty() || !arguments.gpu_hours.empty())) {
    throw Error(Fault::usage, {"--none does not go with --usd and --gpu-hours", "",
                               "Give the new budget, or --none."});
  }
  ProjectBudget budget;
  constexpr std::int64_t kMsPerMicroHour = 3600;  // and 1000 of them
  if (!arguments.usd.empty()) budget.usd_micros_limit = amount("--usd", arguments.usd);
  if (!arguments.gpu_hours.empty()) {
    budget.device_ms_limit = std::max<std::int64_t>(
        1, amount("--gpu-hours", arguments.gpu_hours) * kMsPerMicroHour / 1000);
  }
  std::unique_ptr<Ledger> ledger;
  if (set) {
    const std::string place = arguments.ledger.empty() ? Ledger::default_place() : arguments.ledger;
    ledger = Ledger::open(place, clock);
    if (const auto before = ledger->budget(arguments.project); before && !arguments.none) {
      if (arguments.usd.empty()) budget.usd_micros_limit = before->usd_micros_limit;
      if (arguments.gpu_hours.empty()) budget.device_ms_limit = before->device_ms_limit;
    }
    budget.set_by = user_name();
    ledger->set_budget(arguments.project, budget);
  } else {
    ledger = open_ledger(arguments.ledger, clock);
    if (!ledger) ledger = Ledger::in_memory(clock);
  }
  return show_budget(*ledger, arguments.project, arguments.json);
}

int run_runs_list(const RunsListArguments& arguments) {
  const RealClock clock;
  const auto ledger = open_ledger(arguments.ledger, clock);
  if (!arguments.by.empty()) {
    const GroupBy by = group_by(arguments.by);
    std::cout << (arguments.json ? groups_json(ledger.get(), by).dump(2) + "\n"
                                 : groups_text(ledger.get(), by));
    return 0;
  }
  if (arguments.json) {
    std::cout << runs_json(ledger.get()).dump(2) << "\n";
  } else {
    std::cout << runs_text(ledger.get());
  }
  return 0;
}

int run_runs_show(const RunsShowArguments& arguments) {
  const RealClock clock;
  const auto ledger = open_ledger(arguments.ledger, clock);
  const std::string run = named_run(ledger.get(), arguments.run);
  if (arguments.json) {
    std::cout << run_json(ledger.get(), run).dump(2) << "\n";
  } else {
    std::cout << run_text(ledger.get(), run);
  }
  return 0;
}

int run_runs_report(const RunsReportArguments& arguments) {
  const RealClock clock;
  const auto ledger = open_ledger(arguments.ledger, clock);
  const std::string run = require_run(ledger.get(), named_run(ledger.get(), arguments.run));
  const RunReport report = read_report(*ledger, run);
  if (!arguments.html.empty()) {
    write_atomically(arguments.html, report_html(report));
    log_info("wrote " + arguments.html);
    if (!arguments.json) return 0;
  }
  if (arguments.json) {
    std::cout << summary_json(report).dump(2) << "\n";
  } else {
    std::cout << report_text(report);
  }
  return 0;
}

int run_runs_export(const RunsExportArguments& arguments) {
  const RealClock clock;
  const auto ledger = open_ledger(arguments.ledger, clock);
  const std::string format = arguments.json ? "json" : arguments.format;
  const std::string text = format == "json"    ? export_json(ledger.get()).dump(2) + "\n"
                           : format == "focus" ? focus_text(ledger.get())
                                               : export_csv(ledger.get());
  if (arguments.output.empty()) {
    std::cout << text;
  } else {
    write_atomically(arguments.output, text);
    log_info("wrote " + arguments.output);
  }
  return 0;
}

}  // namespace tailor
