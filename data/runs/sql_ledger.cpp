// The ledger in SQL that SQLite and PostgreSQL share.

#include <algorithm>
#include <cctype>
#include <map>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "base/text.h"
#include "base/units.h"
#include "base/url.h"
#include "data/runs/ledger.h"
#include "data/runs/ledger_schema.h"
#include "data/runs/postgres.h"
#include "data/runs/sql_records.h"
#include "data/runs/sqlite.h"

namespace tailor {
namespace {

class SqlLedger final : public Ledger {
 public:
  SqlLedger(std::unique_ptr<SqlDatabase> database, const Clock& clock)
      : database_(std::move(database)), clock_(clock) {
    prepare_ledger_schema(*database_);
  }

  std::string begin_run(const RunFacts& facts) override {
    return apply(now({facts.run, 0}, facts)).run;
  }

  AttemptId begin_attempt(const std::string& run, const AttemptFacts& facts) override {
    TAILOR_CHECK(facts.devices >= 0 && facts.held_ms_before >= 0);
    const std::int64_t steady = clock_.steady_ms();
    AttemptId id = apply(now({run, 0}, facts));
    const std::lock_guard guard(mutex_);
    began_steady_ms_[id.run + "/" + std::to_string(id.attempt)] = steady - facts.held_ms_before;
    return id;
  }

  void segments(const AttemptId& attempt, std::span<const SegmentFacts> facts) override {
    apply(now(attempt, std::vector(facts.begin(), facts.end())));
  }

  void heartbeat(const AttemptId& attempt) override { apply(now(attempt, HeartbeatFacts{})); }

  void end_attempt(const AttemptId& attempt, RunStatus status, int exit_code,
                   const std::string& reason) override {
    TAILOR_CHECK(status != RunStatus::created && status != RunStatus::running);
    apply(now(attempt, EndFacts{status, exit_code, reason}));
  }

  void artifact(const AttemptId& attempt, const ArtifactFacts& facts) override {
    apply(now(attempt, facts));
  }

  void artifact_deleted(const AttemptId& attempt, const std::string& path) override {
    apply(now(attempt, DeletedFacts{path}));
  }

  void event(const AttemptId& attempt, std::optional<std::int64_t> step, const std::string& kind,
             const std::string& text) override {
    apply(now(attempt, EventFacts{step, kind, text}));
  }

  AttemptId apply(const LedgerEntry& entry) override {
    const std::lock_guard guard(mutex_);
    LedgerEntry own = entry;
    if (auto* run = std::get_if<RunFacts>(&own.what)) {
      if (own.attempt.run.empty()) own.attempt.run = new_ulid(own.unix_ms);
      run->run = own.attempt.run;
    }
    AttemptId id;
    database_->transaction(own.attempt.run, [&] { id = write_entry(*database_, own); });
    return id;
  }

  std::optional<ProjectBudget> budget(const std::string& project) const override {
    const std::lock_guard guard(mutex_);
    auto row = database_->prepare(
        "SELECT usd_micros_limit, device_ms_limit, set_by, set_unix_ms FROM budget "
        "WHERE project = ? ORDER BY budget DESC LIMIT 1");
    if (!row.bind(project).step()) return std::nullopt;
    return ProjectBudget{row.integer_or_null(0), row.integer_or_null(1), row.text(2),
                         row.integer(3)};
  }

  void set_budget(const std::string& project, const ProjectBudget& budget) override {
    const std::lock_guard guard(mutex_);
    database_->transaction("budget of " + project, [&] {
      database_
          ->prepare(
              "INSERT INTO budget (project, usd_micros_limit, device_ms_limit, set_by, "
              "set_unix_ms) VALUES (?, ?, ?, ?, ?)")
          .bind(project)
          .bind(budget.usd_micros_limit)
          .bind(budget.device_ms_limit)
          .bind(budget.set_by)
          .bind(clock_.unix_ms())
          .run();
    });
  }

  ProjectSpending spending_without(const std::string& project,
                                   const std::string& except) const override {
    const std::lock_guard guard(mutex_);
    ProjectSpending out;
    database_->snapshot([&] {
      out = {};
      auto sums = database_->prepare(
          "SELECT COALESCE(SUM(s.device_ms), 0), COALESCE(SUM(s.usd_micros), 0) "
          "FROM run r JOIN segment s ON s.run = r.run WHERE r.project = ? AND r.run <> ?");
      if (sums.bind(project).bind(except).step()) {
        out.device_ms = sums.integer(0);
        out.usd_micros = sums.integer(1);
      }
      auto unpriced = database_->prepare(
          "SELECT 1 FROM run r JOIN attempt a ON a.run = r.run WHERE r.project = ? "
          "AND r.run <> ? AND a.usd_micros_per_device_hour IS NULL LIMIT 1");
      out.unpriced = unpriced.bind(project).bind(except).step();
      auto rows = database_->prepare(
          "SELECT a.run, a.attempt, a.devices, a.usd_micros_per_device_hour, a.planned_device_ms, "
          "a.planned_usd_micros, a.heartbeat_unix_ms, "
          "(SELECT COALESCE(SUM(s.device_ms), 0) FROM segment s "
          "WHERE s.run = a.run AND s.attempt = a.attempt), "
          "(SELECT COALESCE(SUM(s.usd_micros), 0) FROM segment s "
          "WHERE s.run = a.run AND s.attempt = a.attempt) "
          "FROM run r JOIN attempt a ON a.run = r.run "
          "WHERE r.project = ? AND r.run <> ? AND a.status = 'running' ORDER BY a.run, a.attempt");
      rows.bind(project).bind(except);
      while (rows.step()) {
        out.running.push_back({{rows.text(0), narrow<int>(rows.integer(1))},
                               narrow<int>(rows.integer(2)),
                               rows.integer_or_null(3),
                               rows.integer_or_null(4),
                               rows.integer_or_null(5),
                               rows.integer(7),
                               rows.integer(8),
                               rows.integer(6)});
      }
    });
    return out;
  }

  std::vector<std::string> runs() const override {
    const std::lock_guard guard(mutex_);
    return texts(database_->prepare("SELECT run FROM run ORDER BY created_unix_ms DESC, run DESC"));
  }

  std::optional<std::string> run_in_folder(const std::string& output_dir) const override {
    const std::lock_guard guard(mutex_);
    return first(database_->prepare("SELECT run FROM run WHERE output_dir = ? "
                                    "ORDER BY created_unix_ms DESC, run DESC LIMIT 1"),
                 output_dir);
  }

  std::optional<std::string> find_run(std::string_view what) const override {
    const std::lock_guard guard(mutex_);
    std::string upper(what);
    for (char& c : upper) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    const bool may_be_identifier =
        upper.size() >= 4 && std::all_of(upper.begin(), upper.end(),
                                         [](unsigned char c) { return std::isalnum(c) != 0; });
    if (may_be_identifier) {
      auto like = database_->prepare("SELECT run FROM run WHERE run LIKE ? ORDER BY run LIMIT 2");
      like.bind(upper + "%");
      const std::vector<std::string> fitting = texts(std::move(like));
      if (fitting.size() == 1) return fitting.front();
      if (fitting.size() > 1) {
        throw Error(Fault::usage,
                    {"several runs begin with '" + std::string(what) + "'", database_->place(),
                     "Give more of the identifier, such as " + fitting[0] + "."});
      }
    }
    return first(database_->prepare("SELECT run FROM run WHERE name = ? "
                                    "ORDER BY created_unix_ms DESC, run DESC LIMIT 1"),
                 what);
  }

  RunRecord read(const std::string& run) const override {
    const std::lock_guard guard(mutex_);
    RunRecord record;
    database_->snapshot([&] { record = read_record(*database_, run); });
    return record;
  }

  const Clock& clock() const override { return clock_; }
  std::string place() const override { return database_->place(); }

 private:
  LedgerEntry now(const AttemptId& attempt, LedgerEntry::What what) const {
    LedgerEntry entry;
    entry.attempt = attempt;
    entry.unix_ms = clock_.unix_ms();
    entry.what = std::move(what);
    // Ours has a steady clock to go by; an attempt begun elsewhere keeps what its segments say.
    const std::lock_guard guard(mutex_);
    const auto began = began_steady_ms_.find(attempt.run + "/" + std::to_string(attempt.attempt));
    if (began != began_steady_ms_.end()) entry.ms = clock_.steady_ms() - began->second;
    return entry;
  }

  static std::vector<std::string> texts(SqlDatabase::Statement rows) {
    std::vector<std::string> out;
    while (rows.step()) out.push_back(rows.text(0));
    return out;
  }

  static std::optional<std::string> first(SqlDatabase::Statement rows, std::string_view key) {
    if (!rows.bind(key).step()) return std::nullopt;
    return rows.text(0);
  }

  mutable std::mutex mutex_;
  std::unique_ptr<SqlDatabase> database_;
  const Clock& clock_;
  std::map<std::string, std::int64_t> began_steady_ms_;  ///< by "run/attempt", begun here
};

/// The database behind a place; null where `existing` is asked for and there is none.
std::unique_ptr<SqlDatabase> database_at(const std::string& place, bool existing,
                                         const LedgerOptions& options) {
  if (has_scheme(place, "postgresql") || has_scheme(place, "postgres")) {
    auto database = std::make_unique<PostgresDatabase>(place, options.patience_ms);
    if (existing && !database->has_table("meta")) return nullptr;
    return database;
  }
  if (place.find("://") != std::string::npos) {
    throw Error(Fault::usage,
                {"ledgers of this kind are not supported: " + place.substr(0, place.find("://")),
                 "cost.ledger",
                 "Name a file, which several runs can share, or postgresql://USER@HOST/DATABASE."});
  }
  std::error_code ignored;
  if (existing && !fs::exists(place, ignored)) return nullptr;
  return std::make_unique<SqliteDatabase>(
      place, existing ? SqliteDatabase::Mode::existing : SqliteDatabase::Mode::create,
      options.patience_ms);
}

}  // namespace

std::unique_ptr<Ledger> Ledger::open(const std::string& place, const Clock& clock,
                                     const LedgerOptions& options) {
  return std::make_unique<SqlLedger>(database_at(place, false, options), clock);
}

std::unique_ptr<Ledger> Ledger::open_existing(const std::string& place, const Clock& clock) {
  auto database = database_at(place, true, {});
  if (!database) return nullptr;
  return std::make_unique<SqlLedger>(std::move(database), clock);
}

std::unique_ptr<Ledger> Ledger::in_memory(const Clock& clock) { return open(":memory:", clock); }

}  // namespace tailor
