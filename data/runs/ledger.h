#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/file.h"

namespace tailor {

/// What device time was spent on. The values are stored by name; see phase_name().
enum class Phase {
  start,  ///< held before the program ran: prolog of the scheduler, container start
  load,   ///< reading and packing weights, building the model
  train,  ///< steps
  stall,  ///< inside steps, waiting for weights
  evaluate,
  checkpoint,
  idle,  ///< held without work
  lost,  ///< steps redone after a failure, and the unaccounted tail of a killed attempt
};
constexpr std::array kPhases = {Phase::start,    Phase::load,       Phase::train, Phase::stall,
                                Phase::evaluate, Phase::checkpoint, Phase::idle,  Phase::lost};
std::string_view phase_name(Phase phase);

/// How an attempt, and by its last attempt a run, stands.
enum class RunStatus {
  created,  ///< no attempt yet (runs only)
  running,
  succeeded,
  failed,
  preempted,  ///< interrupted from outside, resumable
  stopped_user,
  stopped_budget,
  lost,  ///< vanished without a word: killed, or the machine went down
};
std::string_view status_name(RunStatus status);

/// What a run is, fixed when it begins.
struct RunFacts {
  std::string run{};  ///< identifier to use (RunFolder makes one); empty: a new one
  std::string name{};
  std::string project{};     ///< costs are added up by it; may be empty
  std::string owner{};       ///< the user that began it; empty where not known
  std::string output_dir{};  ///< absolute path of the run's folder
  std::string base_model{};
  std::string base_sha256{};  ///< empty where not known
  std::string dataset_sha256{};
  std::string recipe_sha256{};
  std::string recipe_text{};  ///< resolved recipe without secrets
  std::string code_version{};
  std::int64_t seed = 0;
  std::optional<std::int64_t> usd_micros_limit{};  ///< the recipe's own budget
  std::optional<std::int64_t> device_ms_limit{};
};

/// One process group from start to end: what it holds and at which price.
struct AttemptFacts {
  std::string launcher = "local";  ///< local, torchrun, slurm, kubernetes, skypilot, other
  std::string launcher_job{};      ///< SLURM_JOB_ID, pod uid, ...; may be empty
  int world_size = 1;
  int nodes = 1;
  int devices = 1;  ///< allocated, that is billed; on the CPU one for each rank
  std::string host{};
  std::string device_kind = "cpu";  ///< cpu or cuda
  std::string sku{};                ///< "h100-80gb-sxm", "cpu"

  /// Price of one device for one hour, frozen here. Null: not known; then costs are null too, with
  /// this reason ("no price for sku 'cpu' in the price book").
  std::optional<std::int64_t> usd_micros_per_device_hour{};
  std::string no_price_reason{};
  std::string price_id{};      ///< "runpod/h100-80gb-sxm/on-demand/2025-04-01"
  std::string price_kind{};    ///< on-demand, spot, reserved, owned, recipe
  std::string price_source{};  ///< where it was read and when

  /// What the plan says is still to come when the attempt begins; null: not known.
  std::optional<std::int64_t> planned_device_ms{}, planned_usd_micros{};

  std::int64_t resumed_from_step = 0;  ///< 0: from the beginning
  std::int64_t held_ms_before = 0;  ///< device time held before this call, booked as Phase::start
};

struct AttemptId {
  std::string run{};
  int attempt = 0;  ///< from 1
  bool operator==(const AttemptId&) const = default;
};

/// A stretch of time on all devices of the attempt, following the one recorded before it.
struct SegmentFacts {
  Phase phase = Phase::train;
  std::int64_t ms = 0;
  std::int64_t step = 0;   ///< last step completed at its end
  std::int64_t steps = 0;  ///< steps completed in it; the last of them is `step`
  std::int64_t tokens = 0;
  std::int64_t trained_tokens = 0;               ///< those that carry loss
  std::optional<std::int64_t> busy_device_ms{};  ///< devices at work; null: not measured
  std::optional<std::int64_t> energy_mj{};       ///< millijoules; null: not measured
};

struct ArtifactFacts {
  std::string kind{};  ///< checkpoint, adapter, merged, report, log
  std::string path{};
  std::int64_t step = 0;
  std::int64_t bytes = 0;
  std::string sha256{};
};

// --- what comes back
// ------------------------------------------------------------------------------

struct SegmentRecord {
  int attempt = 0;
  SegmentFacts facts;
  std::int64_t from_ms = 0;    ///< since the attempt began, on the steady clock
  std::int64_t device_ms = 0;  ///< ms * devices
  std::optional<std::int64_t> usd_micros{};
  bool estimated = false;  ///< not measured: the tail of an attempt found dead
};

struct AttemptRecord {
  int attempt = 0;
  AttemptFacts facts;
  RunStatus status = RunStatus::running;
  std::int64_t began_unix_ms = 0;
  std::int64_t heartbeat_unix_ms = 0;
  std::optional<std::int64_t> ended_unix_ms{};
  std::optional<int> exit_code{};
  std::string reason{};
  bool estimated = false;  ///< its end was set by a later attempt, at the last heartbeat
};

struct ArtifactRecord {
  int attempt = 0;
  ArtifactFacts facts;
  std::int64_t unix_ms = 0;
  bool deleted = false;
};

struct EventRecord {
  std::optional<int> attempt{};
  std::int64_t unix_ms = 0;
  std::optional<std::int64_t> step{};
  std::string kind{}, text{};
};

struct RunRecord {
  RunFacts facts;
  std::int64_t created_unix_ms = 0;
  std::vector<AttemptRecord> attempts;  ///< in order
  std::vector<SegmentRecord> segments;  ///< by attempt, then time
  std::vector<ArtifactRecord> artifacts;
  std::vector<EventRecord> events;

  const std::string& run() const { return facts.run; }
  /// The attempt that a row of the record is of, by its number.
  const AttemptRecord& attempt_of(int number) const;
  /// By the last attempt; `now_unix_ms` turns one that runs without a heartbeat for a minute into
  /// lost.
  RunStatus status(std::int64_t now_unix_ms) const;
};

struct PhaseTotals {
  std::int64_t device_ms = 0;
  std::optional<std::int64_t> usd_micros{};
};

/// A run's sums over all attempts, failed ones included.
struct RunTotals {
  int attempts = 0;
  std::int64_t device_ms = 0;
  std::optional<std::int64_t> usd_micros{};  ///< null when any attempt has no price
  std::string usd_null_reason{};
  std::array<PhaseTotals, kPhases.size()> phases{};        ///< add up to the totals exactly
  std::int64_t steps = 0, tokens = 0, trained_tokens = 0;  ///< all work done
  std::int64_t useful_steps = 0, useful_tokens = 0, useful_trained_tokens = 0;  ///< kept
  std::optional<std::int64_t> busy_device_ms{}, energy_mj{};
  bool estimated = false;  ///< some attempt's end is an estimate

  const PhaseTotals& of(Phase phase) const { return phases[static_cast<std::size_t>(phase)]; }
  double gpu_hours() const { return static_cast<double>(device_ms) / 3.6e6; }
  std::optional<double> usd() const;
};

/// The sums of a record. Work counts as lost when a later attempt resumed from before it.
RunTotals total(const RunRecord& record);
/// The same of one attempt; `attempts` is then 1, and USD is null only where this one has no price.
RunTotals total(const RunRecord& record, int attempt);

/// A budget that all runs of a project share.
struct ProjectBudget {
  std::optional<std::int64_t> usd_micros_limit{}, device_ms_limit{};  ///< null: no limit
  std::string set_by{};
  std::int64_t set_unix_ms = 0;
};

/// What all runs of a project have used, as far as it is written down, and who goes on using it.
struct ProjectSpending {
  struct Running {
    AttemptId attempt;
    int devices = 1;
    std::optional<std::int64_t> usd_micros_per_device_hour{};
    std::optional<std::int64_t> planned_device_ms{}, planned_usd_micros{};
    std::int64_t device_ms = 0, usd_micros = 0;  ///< of this attempt, among the sums
    std::int64_t heartbeat_unix_ms = 0;
    bool alive(std::int64_t now_unix_ms) const;  ///< gave a sign of life not long ago
  };
  std::int64_t device_ms = 0;
  std::int64_t usd_micros = 0;  ///< of the attempts that have a price
  bool unpriced = false;        ///< some attempt has none
  std::vector<Running> running;
};

/// How often time is written down at least; what a kill -9 can leave unaccounted.
constexpr std::int64_t kHeartbeatMs = 15'000;
/// An attempt without a sign of life for longer than this is taken for dead: four missed.
constexpr std::int64_t kSilentMs = 4 * kHeartbeatMs;

struct LedgerEntry;

struct LedgerOptions {
  int patience_ms = 30'000;  ///< how long another writer, or the server, is waited for
};

/// Append-only record of runs: attempts, device time by cause at a frozen price, artifacts, events.
/// Shared by all runs of a user or a team; any number of processes and threads may write at once.
/// When a call returns, what it recorded survives kill -9 and a power cut. Format:
/// docs/formats/ledger.md.
class Ledger {
 public:
  virtual ~Ledger() = default;

  /// Opens the ledger at `place`: the path of an SQLite file, or postgresql://USER@HOST/DATABASE.
  /// Makes file, parents and tables on first use. Throws Error{usage} for a newer schema or an
  /// unsupported kind of place, Error{bad_file} for a database that is no ledger, Error{io}.
  static std::unique_ptr<Ledger> open(const std::string& place, const Clock& clock,
                                      const LedgerOptions& options = {});
  /// As open, but null where there is no file, or no table: to look things up without leaving
  /// traces.
  static std::unique_ptr<Ledger> open_existing(const std::string& place, const Clock& clock);
  /// As open, in memory: gone with the object.
  static std::unique_ptr<Ledger> in_memory(const Clock& clock);
  /// data_folder() / "ledger.db".
  static std::string default_place();

  /// Returns the run's identifier (a ULID: sorts by time of creation).
  virtual std::string begin_run(const RunFacts& facts) = 0;
  /// Attempts of the run left `running` are closed first: status lost, end at their last
  /// heartbeat, marked as an estimate. Only call while holding the run's folder.
  virtual AttemptId begin_attempt(const std::string& run, const AttemptFacts& facts) = 0;
  /// Appends segments, in one transaction; also a heartbeat. Throws Error{internal} when the
  /// attempt was closed, by end_attempt or by a later attempt.
  virtual void segments(const AttemptId& attempt, std::span<const SegmentFacts> facts) = 0;
  virtual void heartbeat(const AttemptId& attempt) = 0;
  virtual void end_attempt(const AttemptId& attempt, RunStatus status, int exit_code,
                           const std::string& reason) = 0;

  /// Also marks an earlier artifact at the same path as deleted.
  virtual void artifact(const AttemptId& attempt, const ArtifactFacts& facts) = 0;
  virtual void artifact_deleted(const AttemptId& attempt, const std::string& path) = 0;
  virtual void event(const AttemptId& attempt, std::optional<std::int64_t> step,
                     const std::string& kind, const std::string& text) = 0;
  /// Any of the above as a value; a numbered one is taken once. The attempt it was about.
  virtual AttemptId apply(const LedgerEntry& entry) = 0;

  /// The newest one set, or null.
  virtual std::optional<ProjectBudget> budget(const std::string& project) const = 0;
  /// Of `budget`, the moment is the ledger's own. Earlier ones are kept, for who asks.
  virtual void set_budget(const std::string& project, const ProjectBudget& budget) = 0;
  /// Of the runs of `project`, without `except` where it names one.
  virtual ProjectSpending spending_without(const std::string& project,
                                           const std::string& except) const = 0;
  ProjectSpending spending(const std::string& project) const {
    return spending_without(project, "");
  }

  /// Identifiers, newest first.
  virtual std::vector<std::string> runs() const = 0;
  /// The newest run that wrote into this folder (absolute path as given to begin_run).
  virtual std::optional<std::string> run_in_folder(const std::string& output_dir) const = 0;
  /// A run by identifier, by an unambiguous beginning of one (4 characters or more), or by name
  /// (the newest). Null when nothing fits; throws Error{usage} when a beginning fits several.
  virtual std::optional<std::string> find_run(std::string_view what) const = 0;
  /// Everything about one run. Throws Error{usage} for an unknown identifier.
  virtual RunRecord read(const std::string& run) const = 0;

  RunTotals totals(const std::string& run) const { return total(read(run)); }
  virtual const Clock& clock() const = 0;
  /// A path, or an address without its password.
  virtual std::string place() const = 0;
};

/// A ULID: 48 bits of milliseconds and 80 random bits in Crockford's base 32, 26 characters.
std::string new_ulid(std::int64_t unix_ms);

}  // namespace tailor
