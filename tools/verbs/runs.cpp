#include <iostream>

#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"
#include "base/log.h"
#include "data/runs/listing.h"
#include "data/runs/report.h"
#include "data/runs/run_folder.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

/// The ledger named, which must be there, or the default one, null where there is none yet.
std::unique_ptr<Ledger> open_ledger(const std::string& place, const Clock& clock) {
  if (place.empty()) return Ledger::open_existing(Ledger::default_place(), clock);
  auto ledger = Ledger::open_existing(place, clock);
  if (!ledger) {
    throw Error(Fault::usage, {"there is no ledger", place,
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

}  // namespace

int run_runs_list(const RunsListArguments& arguments) {
  const RealClock clock;
  const auto ledger = open_ledger(arguments.ledger, clock);
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
                           : format == "focus" ? export_focus_csv(ledger.get())
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
