// Report of a long run: 100,000 steps in four attempts, 58 layers of 256 experts.
//   build/release/bin/bench_report FOLDER [steps]
// FOLDER is best in memory (/dev/shm/NAME): making the ledger waits for thousands of fsyncs.
// Makes the run in FOLDER (once), then reads ledger and folder and writes the report, five times.

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "data/runs/report.h"
#include "tests/support/synthetic_run.h"

int main(int count, char** words) {
  using namespace tailor;
  if (count < 2) {
    std::fputs("usage: bench_report FOLDER [steps]\n", stderr);
    return 2;
  }
  const fs::path folder = words[1];
  testing_support::SyntheticRun run;
  if (count > 2) run.steps = std::stoll(words[2]);
  run.recipe.clear();
  for (int i = 0; i < 110; ++i) run.recipe += "key_" + std::to_string(i) + ": value   # default\n";
  testing_support::SteppedClock clock;
  const std::string place = (folder / "ledger.db").string();
  if (!fs::exists(place)) run.make(folder / "run", place, clock);
  const auto ledger = Ledger::open(place, clock);
  const std::string id = RunFolder::run_in(folder / "run");
  std::vector<double> reading;
  std::vector<double> all;
  for (int i = 0; i < 5; ++i) {
    const double began = seconds_now();
    read_report(*ledger, id);
    reading.push_back(seconds_now() - began);
    const double again = seconds_now();
    write_report(*ledger, id);
    all.push_back(seconds_now() - again);
  }
  std::sort(reading.begin(), reading.end());
  std::sort(all.begin(), all.end());
  std::printf(
      "%lld steps, metrics.jsonl %.1f MB: read in %.2f s, report written in %.2f s (reading "
      "included; medians of 5), report.html %.3f MB\n",
      static_cast<long long>(run.steps),
      static_cast<double>(fs::file_size(folder / "run/metrics.jsonl")) / 1e6, reading[2], all[2],
      static_cast<double>(fs::file_size(folder / "run/report.html")) / 1e6);
  return all[2] < 5 && fs::file_size(folder / "run/report.html") < 3'000'000 ? 0 : 1;
}
