// bench_ledger: what the ledger can take, and what keeping books costs a step.
//   commits/s of writers (processes) that append a segment each time, on SQLite and on a PostgreSQL
//   of its own, beside the fsyncs a second of a plain file on the same disk
//   seconds a step spends on the timer, metrics.jsonl and the TensorBoard file; and the processor's
//   and the caller's time for a heartbeat
// usage: bench_ledger [FOLDER] [SECONDS]

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "data/runs/journaled_ledger.h"
#include "data/runs/metrics.h"
#include "data/runs/segment_timer.h"
#include "data/runs/tensorboard.h"
#include "tests/support/postgres_server.h"

namespace tailor {
namespace {

constexpr int kWriters = 8;

/// Calls `act(worker)` in `kWriters` processes over and over for `seconds`; calls a second, of all.
template <class Make>
double rate_of_processes(double seconds, const Make& make) {
  std::fflush(stdout);
  int pipe[2];
  if (::pipe(pipe) != 0) std::abort();
  std::vector<pid_t> children;
  for (int i = 0; i < kWriters; ++i) {
    const pid_t child = ::fork();
    if (child != 0) {
      children.push_back(child);
      continue;
    }
    try {
      auto act = make(i);
      act();  // connected, files made
      const double began = seconds_now();
      long count = 0;
      while (seconds_now() - began < seconds) {
        act();
        ++count;
      }
      if (::write(pipe[1], &count, sizeof count) != sizeof count) ::_exit(1);
      ::_exit(0);
    } catch (const Error& error) {
      std::fprintf(stderr, "%s", to_text(error).c_str());
      ::_exit(1);
    }
  }
  ::close(pipe[1]);
  long sum = 0;
  for (long one = 0; ::read(pipe[0], &one, sizeof one) == sizeof one;) sum += one;
  ::close(pipe[0]);
  for (const pid_t child : children) ::waitpid(child, nullptr, 0);
  return static_cast<double>(sum) / seconds;
}

double commits(const std::string& place, double seconds) {
  static const RealClock clock;
  Ledger::open(place, clock);
  return rate_of_processes(seconds, [&](int) {
    std::shared_ptr<Ledger> ledger = Ledger::open(place, clock);
    RunFacts facts;
    facts.name = "bench";
    AttemptFacts attempt_facts;
    attempt_facts.usd_micros_per_device_hour = 2'690'000;
    const AttemptId attempt = ledger->begin_attempt(ledger->begin_run(facts), attempt_facts);
    return [ledger, attempt] {
      const SegmentFacts one{.phase = Phase::train, .ms = 1000, .step = 1, .steps = 1};
      ledger->segments(attempt, std::span(&one, 1));
    };
  });
}

void step_cost(const fs::path& folder) {
  const RealClock clock;
  make_folders(folder);
  JournaledLedger ledger((folder / "ledger.db").string(), folder, clock);
  RunFacts facts;
  facts.name = "bench";
  AttemptFacts attempt_facts;
  attempt_facts.usd_micros_per_device_hour = 2'690'000;
  ledger.begin_run(facts);
  const AttemptId attempt =
      ledger.begin_attempt(ledger.read(ledger.runs()[0]).run(), attempt_facts);
  SegmentTimer timer(ledger, attempt, Phase::train, SegmentTimer::Heartbeats::by_hand);
  MetricsWriter metrics = MetricsWriter::create(folder / "metrics.jsonl");
  TensorboardWriter tensorboard(folder, clock, 0);
  constexpr int kSteps = 5'000;
  const double began = seconds_now();
  for (int step = 1; step <= kSteps; ++step) {
    timer.step_done({.step = step, .tokens = 4096, .trained_tokens = 900, .stall_seconds = 0});
    StepMetrics line;
    line.step = step;
    line.loss = 1.5;
    line.learning_rate = 1e-4;
    line.tokens = 4096;
    line.seconds = 1;
    line.tokens_per_second = 4096;
    line.gpu_hours = timer.spent().gpu_hours();
    line.usd = timer.spent().usd();
    metrics.write(line);
    tensorboard.scalar("train/loss", line.loss, step);
    tensorboard.scalar("train/learning_rate", line.learning_rate, step);
    tensorboard.scalar("train/grad_norm", 1, step);
    tensorboard.scalar("train/tokens_per_second", 4096, step);
    tensorboard.scalar("cost/usd", 1, step);
    tensorboard.flush();
  }
  const double step_seconds = (seconds_now() - began) / kSteps;
  constexpr int kBeats = 100;
  const double beats_began = seconds_now();
  for (int i = 0; i < kBeats; ++i) timer.flush();
  const double beat_seconds = (seconds_now() - beats_began) / kBeats;
  const double share = step_seconds + beat_seconds * 1000 / static_cast<double>(kHeartbeatMs);
  std::printf("a step's books                 %8.3f ms\n", 1e3 * step_seconds);
  std::printf("a heartbeat, every 15 s        %8.3f ms (in a thread of its own)\n",
              1e3 * beat_seconds);
  std::printf("both, at one step a second     %8.4f %% of the step's time (goal 0.5 %%)\n",
              100 * share);
}

}  // namespace
}  // namespace tailor

int main(int argc, char** argv) {
  using namespace tailor;
  const fs::path folder = fs::path(argc > 1 ? argv[1] : "/tmp") / "tailor_bench_ledger";
  const double seconds = argc > 2 ? std::atof(argv[2]) : 5;
  try {
    fs::remove_all(folder);
    make_folders(folder);
    const double syncs = rate_of_processes(seconds, [&](int i) {
      auto file = std::make_shared<FileWriter>(folder / ("plain" + std::to_string(i)));
      const fs::path path = folder / ("plain" + std::to_string(i));
      return [file, path] {
        file->write(std::string(512, 'x'));
        file->flush();
        sync_path(path);
      };
    });
    std::printf("plain files, %d processes       %8.0f fsyncs/s\n", kWriters, syncs);
    const double sqlite = commits((folder / "ledger.db").string(), seconds);
    std::printf("SQLite, %d writers              %8.0f commits/s (goal 200), %.2f of the fsyncs\n",
                kWriters, sqlite, sqlite / syncs);
    if (const std::string missing = PostgresServer::missing(); !missing.empty()) {
      std::printf("PostgreSQL: %s\n", missing.c_str());
    } else {
      const PostgresServer server;
      const double postgres = commits(server.make_database("bench"), seconds);
      std::printf("PostgreSQL, %d writers          %8.0f commits/s (goal 200)\n", kWriters,
                  postgres);
    }
    step_cost(folder / "run");
    fs::remove_all(folder);
  } catch (const Error& error) {
    std::fprintf(stderr, "%s", to_text(error).c_str());
    return error.exit_code();
  }
  return 0;
}
