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
#include "data/runs/ledger_entry.h"
#include "data/runs/ledger_schema.h"
#include "data/runs/postgres.h"
#include "data/runs/sqlite.h"

namespace tailor {
namespace {

constexpr std::string_view kRunColumns =
    "run, name, project, output_dir, base_model, base_sha256, dataset_sha256, recipe_sha256, "
    "recipe_text, code_version, seed, usd_micros_limit, device_ms_limit, created_unix_ms, owner";
constexpr std::string_view kAttemptColumns =
    "attempt, launcher, launcher_job, world_size, nodes, devices, host, device_kind, sku, "
    "usd_micros_per_device_hour, no_price_reason, price_id, price_kind, price_source, "
    "resumed_from_step, status, began_unix_ms, heartbeat_unix_ms, ended_unix_ms, exit_code, "
    "reason, estimated, planned_device_ms, planned_usd_micros";
constexpr std::string_view kSegmentColumns =
    "attempt, phase, from_ms, to_ms, device_ms, usd_micros, step, steps, tokens, trained_tokens, "
    "busy_device_ms, energy_mj, estimated";

std::string sql(std::string_view a, std::string_view b, std::string_view c) {
  std::string out(a);
  out += b;
  out += c;
  return out;
}

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
    database_->transaction(own.attempt.run, [&] {
      id = own.attempt;
      if (!own.journal.empty() && !take_number(own, id)) return;
      std::visit([&](const auto& what) { put(own, id, what); }, own.what);
      if (!own.journal.empty()) keep_number(own, id);
    });
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

  ProjectSpending spending(const std::string& project) const override {
    const std::lock_guard guard(mutex_);
    ProjectSpending out;
    database_->snapshot([&] {
      out = {};
      auto sums = database_->prepare(
          "SELECT COALESCE(SUM(s.device_ms), 0), COALESCE(SUM(s.usd_micros), 0) "
          "FROM run r JOIN segment s ON s.run = r.run WHERE r.project = ?");
      if (sums.bind(project).step()) {
        out.device_ms = sums.integer(0);
        out.usd_micros = sums.integer(1);
      }
      auto unpriced = database_->prepare(
          "SELECT 1 FROM run r JOIN attempt a ON a.run = r.run WHERE r.project = ? "
          "AND a.usd_micros_per_device_hour IS NULL LIMIT 1");
      out.unpriced = unpriced.bind(project).step();
      auto rows = database_->prepare(
          "SELECT a.run, a.attempt, a.devices, a.usd_micros_per_device_hour, a.planned_device_ms, "
          "a.planned_usd_micros, a.heartbeat_unix_ms, "
          "(SELECT COALESCE(SUM(s.device_ms), 0) FROM segment s "
          "WHERE s.run = a.run AND s.attempt = a.attempt), "
          "(SELECT COALESCE(SUM(s.usd_micros), 0) FROM segment s "
          "WHERE s.run = a.run AND s.attempt = a.attempt) "
          "FROM run r JOIN attempt a ON a.run = r.run "
          "WHERE r.project = ? AND a.status = 'running' ORDER BY a.run, a.attempt");
      rows.bind(project);
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
    database_->snapshot([&] {
      record = {};
      read_run(run, record);
      read_attempts(run, record);
      read_segments(run, record);
      read_artifacts(run, record);
      read_events(run, record);
    });
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

  /// False where the entry is in already. `id` becomes the journal's attempt, once it has one.
  bool take_number(const LedgerEntry& entry, AttemptId& id) {
    auto row = database_->prepare("SELECT number, attempt FROM journal WHERE journal = ?");
    if (!row.bind(entry.journal).step()) return true;
    if (const auto attempt = row.integer_or_null(1)) id.attempt = narrow<int>(*attempt);
    return row.integer(0) < entry.number;
  }

  void keep_number(const LedgerEntry& entry, const AttemptId& id) {
    auto row = database_->prepare(
        "INSERT INTO journal (journal, number, run, attempt) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (journal) DO UPDATE SET number = excluded.number, attempt = excluded.attempt");
    row.bind(entry.journal).bind(entry.number).bind(id.run);
    if (id.attempt > 0) {
      row.bind(std::int64_t{id.attempt}).run();
    } else {
      row.bind_null().run();
    }
  }

  void put(const LedgerEntry& entry, AttemptId& id, const RunFacts& facts) {
    auto known = database_->prepare("SELECT output_dir FROM run WHERE run = ?");
    if (known.bind(id.run).step()) {  // a resumed run; its folder may have been moved
      if (known.text(0) == facts.output_dir) return;
      database_->prepare("UPDATE run SET output_dir = ? WHERE run = ?")
          .bind(facts.output_dir)
          .bind(id.run)
          .run();
      return;
    }
    database_
        ->prepare(sql("INSERT INTO run (", kRunColumns,
                      ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"))
        .bind(id.run)
        .bind(facts.name)
        .bind(facts.project)
        .bind(facts.output_dir)
        .bind(facts.base_model)
        .bind(facts.base_sha256)
        .bind(facts.dataset_sha256)
        .bind(facts.recipe_sha256)
        .bind(facts.recipe_text)
        .bind(facts.code_version)
        .bind(facts.seed)
        .bind(facts.usd_micros_limit)
        .bind(facts.device_ms_limit)
        .bind(entry.unix_ms)
        .bind(facts.owner)
        .run();
  }

  void put(const LedgerEntry& entry, AttemptId& id, const AttemptFacts& facts) {
    close_running(entry, id.run);
    auto last = database_->prepare("SELECT COALESCE(MAX(attempt), 0) FROM attempt WHERE run = ?");
    last.bind(id.run).step();
    id.attempt = narrow<int>(last.integer(0)) + 1;
    database_
        ->prepare(
            "INSERT INTO attempt (run, attempt, launcher, launcher_job, world_size, nodes, "
            "devices, host, device_kind, sku, usd_micros_per_device_hour, no_price_reason, "
            "price_id, price_kind, price_source, resumed_from_step, status, began_unix_ms, "
            "heartbeat_unix_ms, heartbeat_ms, planned_device_ms, planned_usd_micros) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'running', ?, ?, ?, ?, ?)")
        .bind(id.run)
        .bind(std::int64_t{id.attempt})
        .bind(facts.launcher)
        .bind(facts.launcher_job)
        .bind(std::int64_t{facts.world_size})
        .bind(std::int64_t{facts.nodes})
        .bind(std::int64_t{facts.devices})
        .bind(facts.host)
        .bind(facts.device_kind)
        .bind(facts.sku)
        .bind(facts.usd_micros_per_device_hour)
        .bind(facts.usd_micros_per_device_hour.has_value() ? "" : facts.no_price_reason)
        .bind(facts.price_id)
        .bind(facts.price_kind)
        .bind(facts.price_source)
        .bind(facts.resumed_from_step)
        .bind(entry.unix_ms - facts.held_ms_before)
        .bind(entry.unix_ms)
        .bind(facts.held_ms_before)
        .bind(facts.planned_device_ms)
        .bind(facts.planned_usd_micros)
        .run();
    if (facts.held_ms_before > 0) {
      const SegmentFacts held{
          .phase = Phase::start, .ms = facts.held_ms_before, .step = facts.resumed_from_step};
      append(entry, id, std::span(&held, 1), false);
    }
  }

  void put(const LedgerEntry& entry, AttemptId& id, const std::vector<SegmentFacts>& facts) {
    beat(entry, id);
    append(entry, id, facts, false);
  }

  void put(const LedgerEntry& entry, AttemptId& id, const HeartbeatFacts&) { beat(entry, id); }

  void put(const LedgerEntry& entry, AttemptId& id, const EndFacts& facts) {
    beat(entry, id);
    database_
        ->prepare(
            "UPDATE attempt SET status = ?, ended_unix_ms = ?, exit_code = ?, reason = ? "
            "WHERE run = ? AND attempt = ?")
        .bind(status_name(facts.status))
        .bind(entry.unix_ms)
        .bind(std::int64_t{facts.exit_code})
        .bind(facts.reason)
        .bind(id.run)
        .bind(std::int64_t{id.attempt})
        .run();
  }

  void put(const LedgerEntry& entry, AttemptId& id, const ArtifactFacts& facts) {
    mark_deleted(facts.path);
    database_
        ->prepare(
            "INSERT INTO artifact (run, attempt, kind, path, step, bytes, sha256, unix_ms) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)")
        .bind(id.run)
        .bind(std::int64_t{id.attempt})
        .bind(facts.kind)
        .bind(facts.path)
        .bind(facts.step)
        .bind(facts.bytes)
        .bind(facts.sha256)
        .bind(entry.unix_ms)
        .run();
  }

  void put(const LedgerEntry&, AttemptId&, const DeletedFacts& facts) { mark_deleted(facts.path); }

  void put(const LedgerEntry& entry, AttemptId& id, const EventFacts& facts) {
    add_event(entry, id, facts.step, facts.kind, facts.text);
  }

  /// Moves the heartbeat on; throws when the attempt is closed.
  void beat(const LedgerEntry& entry, const AttemptId& attempt) {
    auto row = database_->prepare(
        "SELECT status, heartbeat_ms, heartbeat_unix_ms FROM attempt WHERE run = ? AND attempt = "
        "?");
    const bool found = row.bind(attempt.run).bind(std::int64_t{attempt.attempt}).step();
    if (!found || row.text(0) != "running") {
      throw Error(Fault::internal,
                  {found ? "the attempt is closed already (" + row.text(0) + ")"
                         : "the attempt is not in the ledger",
                   database_->place() + ", run " + attempt.run + ", attempt " +
                       std::to_string(attempt.attempt),
                   "A later attempt has taken the run over, or the ledger was exchanged while the "
                   "run went on. Stop this process; the newest attempt is the one that counts."});
    }
    database_
        ->prepare(
            "UPDATE attempt SET heartbeat_ms = ?, heartbeat_unix_ms = ? "
            "WHERE run = ? AND attempt = ?")
        .bind(std::max(row.integer(1), entry.ms))
        .bind(std::max(row.integer(2), entry.unix_ms))
        .bind(attempt.run)
        .bind(std::int64_t{attempt.attempt})
        .run();
  }

  void append(const LedgerEntry& entry, const AttemptId& attempt,
              std::span<const SegmentFacts> facts, bool estimated) {
    auto head = database_->prepare(
        "SELECT a.devices, a.usd_micros_per_device_hour, COALESCE(MAX(s.seq), 0), "
        "COALESCE(MAX(s.to_ms), 0) FROM attempt a LEFT JOIN segment s "
        "ON s.run = a.run AND s.attempt = a.attempt WHERE a.run = ? AND a.attempt = ? "
        "GROUP BY a.devices, a.usd_micros_per_device_hour");
    TAILOR_CHECK(head.bind(attempt.run).bind(std::int64_t{attempt.attempt}).step());
    const std::int64_t devices = head.integer(0);
    const std::optional<std::int64_t> rate = head.integer_or_null(1);
    std::int64_t seq = head.integer(2);
    std::int64_t from = head.integer(3);
    // Cost up to a moment, so that segments add up to the attempt's cost to the micro-dollar.
    const auto cost_until = [&](std::int64_t ms) {
      return cost_usd_micros(*rate, checked_multiply(ms, devices));
    };
    for (const SegmentFacts& segment : facts) {
      TAILOR_CHECK(segment.ms >= 0 && segment.steps >= 0);
      const std::int64_t to = from + segment.ms;
      database_
          ->prepare(
              "INSERT INTO segment (run, attempt, seq, phase, from_ms, to_ms, device_ms, "
              "usd_micros, step, steps, tokens, trained_tokens, busy_device_ms, energy_mj, "
              "estimated, recorded_unix_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, "
              "?)")
          .bind(attempt.run)
          .bind(std::int64_t{attempt.attempt})
          .bind(++seq)
          .bind(phase_name(segment.phase))
          .bind(from)
          .bind(to)
          .bind(checked_multiply(segment.ms, devices))
          .bind(rate.has_value() ? std::optional(cost_until(to) - cost_until(from)) : std::nullopt)
          .bind(segment.step)
          .bind(segment.steps)
          .bind(segment.tokens)
          .bind(segment.trained_tokens)
          .bind(segment.busy_device_ms)
          .bind(segment.energy_mj)
          .bind(std::int64_t{estimated ? 1 : 0})
          .bind(entry.unix_ms)
          .run();
      from = to;
    }
  }

  /// Ends attempts that never ended themselves at their last heartbeat.
  void close_running(const LedgerEntry& entry, const std::string& run) {
    struct Open {
      AttemptId id;
      std::int64_t heartbeat_ms, heartbeat_unix_ms, segments_end_ms, step;
    };
    std::vector<Open> open;
    auto rows = database_->prepare(
        "SELECT a.attempt, a.heartbeat_ms, a.heartbeat_unix_ms, COALESCE(MAX(s.to_ms), 0), "
        "COALESCE(MAX(s.step), a.resumed_from_step) FROM attempt a LEFT JOIN segment s "
        "ON s.run = a.run AND s.attempt = a.attempt WHERE a.run = ? AND a.status = 'running' "
        "GROUP BY a.attempt, a.heartbeat_ms, a.heartbeat_unix_ms, a.resumed_from_step");
    rows.bind(run);
    while (rows.step()) {
      open.push_back({{run, narrow<int>(rows.integer(0))},
                      rows.integer(1),
                      rows.integer(2),
                      rows.integer(3),
                      rows.integer(4)});
    }
    for (const Open& attempt : open) {
      if (attempt.heartbeat_ms > attempt.segments_end_ms) {
        const SegmentFacts tail{.phase = Phase::lost,
                                .ms = attempt.heartbeat_ms - attempt.segments_end_ms,
                                .step = attempt.step};
        append(entry, attempt.id, std::span(&tail, 1), true);
      }
      database_
          ->prepare(
              "UPDATE attempt SET status = 'lost', ended_unix_ms = ?, estimated = 1, reason = ? "
              "WHERE run = ? AND attempt = ?")
          .bind(attempt.heartbeat_unix_ms)
          .bind("ended without a word; closed at its last heartbeat")
          .bind(run)
          .bind(std::int64_t{attempt.id.attempt})
          .run();
      add_event(entry, attempt.id, attempt.step, "attempt_lost",
                "attempt " + std::to_string(attempt.id.attempt) +
                    " ended without a word; closed at its last heartbeat");
    }
  }

  void mark_deleted(const std::string& path) {
    database_->prepare("UPDATE artifact SET deleted = 1 WHERE path = ? AND deleted = 0")
        .bind(path)
        .run();
  }

  void add_event(const LedgerEntry& entry, const AttemptId& attempt,
                 std::optional<std::int64_t> step, const std::string& kind,
                 const std::string& text) {
    auto insert = database_->prepare(
        "INSERT INTO event (run, attempt, unix_ms, step, kind, text) VALUES (?, ?, ?, ?, ?, ?)");
    insert.bind(attempt.run);
    if (attempt.attempt > 0) {
      insert.bind(std::int64_t{attempt.attempt});
    } else {
      insert.bind_null();
    }
    insert.bind(entry.unix_ms).bind(step).bind(kind).bind(text).run();
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

  void read_run(const std::string& run, RunRecord& record) const {
    auto row = database_->prepare(sql("SELECT ", kRunColumns, " FROM run WHERE run = ?"));
    if (!row.bind(run).step()) {
      throw Error(Fault::usage, {"the ledger holds no run '" + run + "'", database_->place(),
                                 "`tailor runs ls` lists the runs."});
    }
    RunFacts& facts = record.facts;
    int column = 0;
    for (std::string* field : {&facts.run, &facts.name, &facts.project, &facts.output_dir,
                               &facts.base_model, &facts.base_sha256, &facts.dataset_sha256,
                               &facts.recipe_sha256, &facts.recipe_text, &facts.code_version}) {
      *field = row.text(column++);
    }
    facts.seed = row.integer(10);
    facts.usd_micros_limit = row.integer_or_null(11);
    facts.device_ms_limit = row.integer_or_null(12);
    record.created_unix_ms = row.integer(13);
    facts.owner = row.text(14);
  }

  void read_attempts(const std::string& run, RunRecord& record) const {
    auto row = database_->prepare(
        sql("SELECT ", kAttemptColumns, " FROM attempt WHERE run = ? ORDER BY attempt"));
    row.bind(run);
    while (row.step()) {
      AttemptRecord attempt;
      AttemptFacts& facts = attempt.facts;
      attempt.attempt = narrow<int>(row.integer(0));
      facts.launcher = row.text(1);
      facts.launcher_job = row.text(2);
      facts.world_size = narrow<int>(row.integer(3));
      facts.nodes = narrow<int>(row.integer(4));
      facts.devices = narrow<int>(row.integer(5));
      facts.host = row.text(6);
      facts.device_kind = row.text(7);
      facts.sku = row.text(8);
      facts.usd_micros_per_device_hour = row.integer_or_null(9);
      facts.no_price_reason = row.text(10);
      facts.price_id = row.text(11);
      facts.price_kind = row.text(12);
      facts.price_source = row.text(13);
      facts.resumed_from_step = row.integer(14);
      attempt.status = status_from(row.text(15), database_->place());
      attempt.began_unix_ms = row.integer(16);
      attempt.heartbeat_unix_ms = row.integer(17);
      attempt.ended_unix_ms = row.integer_or_null(18);
      if (const auto code = row.integer_or_null(19)) attempt.exit_code = narrow<int>(*code);
      attempt.reason = row.text(20);
      attempt.estimated = row.integer(21) != 0;
      facts.planned_device_ms = row.integer_or_null(22);
      facts.planned_usd_micros = row.integer_or_null(23);
      record.attempts.push_back(std::move(attempt));
    }
  }

  void read_segments(const std::string& run, RunRecord& record) const {
    auto row = database_->prepare(
        sql("SELECT ", kSegmentColumns, " FROM segment WHERE run = ? ORDER BY attempt, seq"));
    row.bind(run);
    while (row.step()) {
      SegmentRecord segment;
      segment.attempt = narrow<int>(row.integer(0));
      segment.facts = {.phase = phase_from(row.text(1), database_->place()),
                       .ms = row.integer(3) - row.integer(2),
                       .step = row.integer(6),
                       .steps = row.integer(7),
                       .tokens = row.integer(8),
                       .trained_tokens = row.integer(9),
                       .busy_device_ms = row.integer_or_null(10),
                       .energy_mj = row.integer_or_null(11)};
      segment.from_ms = row.integer(2);
      segment.device_ms = row.integer(4);
      segment.usd_micros = row.integer_or_null(5);
      segment.estimated = row.integer(12) != 0;
      record.segments.push_back(segment);
    }
  }

  void read_artifacts(const std::string& run, RunRecord& record) const {
    auto row = database_->prepare(
        "SELECT attempt, kind, path, step, bytes, sha256, unix_ms, deleted FROM artifact "
        "WHERE run = ? ORDER BY artifact");
    row.bind(run);
    while (row.step()) {
      record.artifacts.push_back(
          {narrow<int>(row.integer(0)),
           {row.text(1), row.text(2), row.integer(3), row.integer(4), row.text(5)},
           row.integer(6),
           row.integer(7) != 0});
    }
  }

  void read_events(const std::string& run, RunRecord& record) const {
    auto row = database_->prepare(
        "SELECT attempt, unix_ms, step, kind, text FROM event WHERE run = ? ORDER BY event");
    row.bind(run);
    while (row.step()) {
      EventRecord event{{}, row.integer(1), row.integer_or_null(2), row.text(3), row.text(4)};
      if (const auto attempt = row.integer_or_null(0)) event.attempt = narrow<int>(*attempt);
      record.events.push_back(std::move(event));
    }
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
