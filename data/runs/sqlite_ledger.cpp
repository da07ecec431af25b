// The ledger on SQLite. Statements keep to what PostgreSQL understands too, but for the lines
// marked in the schema.

#include <algorithm>
#include <cctype>
#include <map>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "base/text.h"
#include "base/units.h"
#include "data/runs/ledger.h"
#include "data/runs/sqlite.h"

namespace tailor {
namespace {

constexpr std::int64_t kSchemaVersion = 1;

constexpr const char* kSchema = R"sql(
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO meta VALUES ('format', 'tailor ledger'), ('schema_version', '1'), ('currency', 'USD');

CREATE TABLE run (
  run              TEXT PRIMARY KEY,
  name             TEXT NOT NULL,
  project          TEXT NOT NULL,
  output_dir       TEXT NOT NULL,
  base_model       TEXT NOT NULL,
  base_sha256      TEXT NOT NULL,
  dataset_sha256   TEXT NOT NULL,
  recipe_sha256    TEXT NOT NULL,
  recipe_text      TEXT NOT NULL,
  code_version     TEXT NOT NULL,
  seed             BIGINT NOT NULL,
  usd_micros_limit BIGINT,
  device_ms_limit  BIGINT,
  created_unix_ms  BIGINT NOT NULL
);
CREATE INDEX run_by_folder ON run (output_dir, created_unix_ms);

CREATE TABLE attempt (
  run               TEXT NOT NULL REFERENCES run (run),
  attempt           INTEGER NOT NULL CHECK (attempt >= 1),
  launcher          TEXT NOT NULL,
  launcher_job      TEXT NOT NULL,
  world_size        INTEGER NOT NULL,
  nodes             INTEGER NOT NULL,
  devices           INTEGER NOT NULL CHECK (devices >= 0),
  host              TEXT NOT NULL,
  device_kind       TEXT NOT NULL,
  sku               TEXT NOT NULL,
  usd_micros_per_device_hour BIGINT CHECK (usd_micros_per_device_hour >= 0),
  no_price_reason   TEXT NOT NULL,
  price_id          TEXT NOT NULL,
  price_kind        TEXT NOT NULL,
  price_source      TEXT NOT NULL,
  resumed_from_step BIGINT NOT NULL,
  status            TEXT NOT NULL CHECK (status IN ('running', 'succeeded', 'failed', 'preempted',
                                                    'stopped_user', 'stopped_budget', 'lost')),
  began_unix_ms     BIGINT NOT NULL,
  heartbeat_unix_ms BIGINT NOT NULL,
  heartbeat_ms      BIGINT NOT NULL,
  ended_unix_ms     BIGINT,
  exit_code         INTEGER,
  reason            TEXT NOT NULL DEFAULT '',
  estimated         INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (run, attempt),
  CHECK ((status = 'running') = (ended_unix_ms IS NULL))
);

CREATE TABLE segment (
  run              TEXT NOT NULL,
  attempt          INTEGER NOT NULL,
  seq              INTEGER NOT NULL,
  phase            TEXT NOT NULL CHECK (phase IN ('start', 'load', 'train', 'stall', 'evaluate',
                                                  'checkpoint', 'idle', 'lost')),
  from_ms          BIGINT NOT NULL,
  to_ms            BIGINT NOT NULL CHECK (to_ms >= from_ms),
  device_ms        BIGINT NOT NULL CHECK (device_ms >= 0),
  usd_micros       BIGINT,
  step             BIGINT NOT NULL,
  steps            BIGINT NOT NULL CHECK (steps >= 0),
  tokens           BIGINT NOT NULL CHECK (tokens >= 0),
  trained_tokens   BIGINT NOT NULL CHECK (trained_tokens >= 0),
  busy_device_ms   BIGINT,
  energy_mj        BIGINT,
  estimated        INTEGER NOT NULL,
  recorded_unix_ms BIGINT NOT NULL,
  PRIMARY KEY (run, attempt, seq),
  FOREIGN KEY (run, attempt) REFERENCES attempt (run, attempt)
);
-- The triggers are SQLite's own.
CREATE TRIGGER segment_is_final BEFORE UPDATE ON segment
  BEGIN SELECT RAISE(ABORT, 'segments are append-only'); END;
CREATE TRIGGER segment_stays BEFORE DELETE ON segment
  BEGIN SELECT RAISE(ABORT, 'segments are append-only'); END;

CREATE TABLE artifact (
  artifact INTEGER PRIMARY KEY,  -- PostgreSQL: BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY
  run      TEXT NOT NULL,
  attempt  INTEGER NOT NULL,
  kind     TEXT NOT NULL,
  path     TEXT NOT NULL,
  step     BIGINT NOT NULL,
  bytes    BIGINT NOT NULL,
  sha256   TEXT NOT NULL,
  unix_ms  BIGINT NOT NULL,
  deleted  INTEGER NOT NULL DEFAULT 0,
  FOREIGN KEY (run, attempt) REFERENCES attempt (run, attempt)
);
CREATE INDEX artifact_by_run ON artifact (run, attempt);
CREATE UNIQUE INDEX artifact_by_path ON artifact (path) WHERE deleted = 0;

CREATE TABLE event (
  event   INTEGER PRIMARY KEY,  -- PostgreSQL: as above
  run     TEXT NOT NULL REFERENCES run (run),
  attempt INTEGER,
  unix_ms BIGINT NOT NULL,
  step    BIGINT,
  kind    TEXT NOT NULL,
  text    TEXT NOT NULL
);
CREATE INDEX event_by_run ON event (run, unix_ms);

CREATE VIEW run_cost AS
  SELECT r.run, r.name, r.project,
         (SELECT COUNT(*) FROM attempt a WHERE a.run = r.run) AS attempts,
         COALESCE(SUM(s.device_ms), 0) AS device_ms,
         CASE WHEN EXISTS (SELECT 1 FROM attempt a
                           WHERE a.run = r.run AND a.usd_micros_per_device_hour IS NULL)
              THEN NULL ELSE COALESCE(SUM(s.usd_micros), 0) END AS usd_micros
  FROM run r LEFT JOIN segment s ON s.run = r.run
  GROUP BY r.run, r.name, r.project;
)sql";

constexpr std::string_view kRunColumns =
    "run, name, project, output_dir, base_model, base_sha256, dataset_sha256, recipe_sha256, "
    "recipe_text, code_version, seed, usd_micros_limit, device_ms_limit, created_unix_ms";
constexpr std::string_view kAttemptColumns =
    "attempt, launcher, launcher_job, world_size, nodes, devices, host, device_kind, sku, "
    "usd_micros_per_device_hour, no_price_reason, price_id, price_kind, price_source, "
    "resumed_from_step, status, began_unix_ms, heartbeat_unix_ms, ended_unix_ms, exit_code, "
    "reason, estimated";
constexpr std::string_view kSegmentColumns =
    "attempt, phase, from_ms, to_ms, device_ms, usd_micros, step, steps, tokens, trained_tokens, "
    "busy_device_ms, energy_mj, estimated";

std::string sql(std::string_view a, std::string_view b, std::string_view c) {
  std::string out(a);
  out += b;
  out += c;
  return out;
}

Phase phase_from(const std::string& name, const std::string& where) {
  for (const Phase phase : kPhases) {
    if (phase_name(phase) == name) return phase;
  }
  throw Error(Fault::bad_file, {"unknown phase '" + name + "' in the ledger", where,
                                "Use the Tailor version that wrote it."});
}

RunStatus status_from(const std::string& name, const std::string& where) {
  for (int i = 0; i <= static_cast<int>(RunStatus::lost); ++i) {
    if (status_name(static_cast<RunStatus>(i)) == name) return static_cast<RunStatus>(i);
  }
  throw Error(Fault::bad_file, {"unknown status '" + name + "' in the ledger", where,
                                "Use the Tailor version that wrote it."});
}

class SqliteLedger final : public Ledger {
 public:
  SqliteLedger(const fs::path& path, SqliteDatabase::Mode mode, const Clock& clock)
      : database_(path, mode), clock_(clock) {
    if (!schema_is_there())
      database_.transaction([&] {
        if (!schema_is_there()) database_.execute(kSchema);
      });
    check_version();
  }

  std::string begin_run(const RunFacts& facts) override {
    const std::lock_guard guard(mutex_);
    const std::int64_t now = clock_.unix_ms();
    const std::string run = facts.run.empty() ? new_ulid(now) : facts.run;
    database_.transaction([&] {
      auto known = database_.prepare("SELECT output_dir FROM run WHERE run = ?");
      if (known.bind(run).step()) {  // a resumed run; its folder may have been moved
        if (known.text(0) != facts.output_dir) {
          database_.prepare("UPDATE run SET output_dir = ? WHERE run = ?")
              .bind(facts.output_dir)
              .bind(run)
              .run();
        }
        return;
      }
      database_
          .prepare(sql("INSERT INTO run (", kRunColumns,
                       ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"))
          .bind(run)
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
          .bind(now)
          .run();
    });
    return run;
  }

  AttemptId begin_attempt(const std::string& run, const AttemptFacts& facts) override {
    TAILOR_CHECK(facts.devices >= 0 && facts.held_ms_before >= 0);
    const std::lock_guard guard(mutex_);
    AttemptId id{run, 0};
    const std::int64_t now = clock_.unix_ms();
    const std::int64_t steady = clock_.steady_ms();
    database_.transaction([&] {
      close_running(run);
      auto last = database_.prepare("SELECT COALESCE(MAX(attempt), 0) FROM attempt WHERE run = ?");
      last.bind(run).step();
      id.attempt = narrow<int>(last.integer(0)) + 1;
      database_
          .prepare(
              "INSERT INTO attempt (run, attempt, launcher, launcher_job, world_size, nodes, "
              "devices, host, device_kind, sku, usd_micros_per_device_hour, no_price_reason, "
              "price_id, price_kind, price_source, resumed_from_step, status, began_unix_ms, "
              "heartbeat_unix_ms, heartbeat_ms) "
              "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'running', ?, ?, ?)")
          .bind(run)
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
          .bind(now - facts.held_ms_before)
          .bind(now)
          .bind(facts.held_ms_before)
          .run();
      if (facts.held_ms_before > 0) {
        const SegmentFacts held{
            .phase = Phase::start, .ms = facts.held_ms_before, .step = facts.resumed_from_step};
        append(id, std::span(&held, 1), false);
      }
    });
    began_steady_ms_[id.run + "/" + std::to_string(id.attempt)] = steady - facts.held_ms_before;
    return id;
  }

  void segments(const AttemptId& attempt, std::span<const SegmentFacts> facts) override {
    const std::lock_guard guard(mutex_);
    database_.transaction([&] {
      beat(attempt);
      append(attempt, facts, false);
    });
  }

  void heartbeat(const AttemptId& attempt) override {
    const std::lock_guard guard(mutex_);
    database_.transaction([&] { beat(attempt); });
  }

  void end_attempt(const AttemptId& attempt, RunStatus status, int exit_code,
                   const std::string& reason) override {
    TAILOR_CHECK(status != RunStatus::created && status != RunStatus::running);
    const std::lock_guard guard(mutex_);
    database_.transaction([&] {
      beat(attempt);
      database_
          .prepare(
              "UPDATE attempt SET status = ?, ended_unix_ms = ?, exit_code = ?, reason = ? "
              "WHERE run = ? AND attempt = ?")
          .bind(status_name(status))
          .bind(clock_.unix_ms())
          .bind(std::int64_t{exit_code})
          .bind(reason)
          .bind(attempt.run)
          .bind(std::int64_t{attempt.attempt})
          .run();
    });
  }

  void artifact(const AttemptId& attempt, const ArtifactFacts& facts) override {
    const std::lock_guard guard(mutex_);
    database_.transaction([&] {
      mark_deleted(facts.path);
      database_
          .prepare(
              "INSERT INTO artifact (run, attempt, kind, path, step, bytes, sha256, unix_ms) "
              "VALUES (?, ?, ?, ?, ?, ?, ?, ?)")
          .bind(attempt.run)
          .bind(std::int64_t{attempt.attempt})
          .bind(facts.kind)
          .bind(facts.path)
          .bind(facts.step)
          .bind(facts.bytes)
          .bind(facts.sha256)
          .bind(clock_.unix_ms())
          .run();
    });
  }

  void artifact_deleted(const AttemptId&, const std::string& path) override {
    const std::lock_guard guard(mutex_);
    database_.transaction([&] { mark_deleted(path); });
  }

  void event(const AttemptId& attempt, std::optional<std::int64_t> step, const std::string& kind,
             const std::string& text) override {
    const std::lock_guard guard(mutex_);
    database_.transaction([&] { add_event(attempt, step, kind, text); });
  }

  std::vector<std::string> runs() const override {
    const std::lock_guard guard(mutex_);
    return texts(database_.prepare("SELECT run FROM run ORDER BY created_unix_ms DESC, run DESC"));
  }

  std::optional<std::string> run_in_folder(const std::string& output_dir) const override {
    const std::lock_guard guard(mutex_);
    return first(database_.prepare("SELECT run FROM run WHERE output_dir = ? "
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
      auto like = database_.prepare("SELECT run FROM run WHERE run LIKE ? ORDER BY run LIMIT 2");
      like.bind(upper + "%");
      const std::vector<std::string> fitting = texts(std::move(like));
      if (fitting.size() == 1) return fitting.front();
      if (fitting.size() > 1) {
        throw Error(Fault::usage, {"several runs begin with '" + std::string(what) + "'",
                                   database_.path().string(),
                                   "Give more of the identifier, such as " + fitting[0] + "."});
      }
    }
    return first(database_.prepare("SELECT run FROM run WHERE name = ? "
                                   "ORDER BY created_unix_ms DESC, run DESC LIMIT 1"),
                 what);
  }

  RunRecord read(const std::string& run) const override {
    const std::lock_guard guard(mutex_);
    RunRecord record;
    database_.snapshot([&] {
      read_run(run, record);
      read_attempts(run, record);
      read_segments(run, record);
      read_artifacts(run, record);
      read_events(run, record);
    });
    return record;
  }

  const Clock& clock() const override { return clock_; }
  std::string place() const override { return database_.path().string(); }

 private:
  bool schema_is_there() {
    if (auto meta = database_.prepare("SELECT 1 FROM sqlite_master WHERE name = 'meta'");
        meta.step()) {
      return true;
    }
    auto other = database_.prepare("SELECT name FROM sqlite_master LIMIT 1");
    if (other.step()) not_ours("holds a table '" + other.text(0) + "', but none named 'meta'");
    return false;
  }

  [[noreturn]] void not_ours(const std::string& why) const {
    throw Error(Fault::bad_file, {"not a Tailor ledger: " + why, database_.path().string(),
                                  "Name another file as the ledger."});
  }

  void check_version() {
    std::map<std::string, std::string> meta;
    auto rows = database_.prepare("SELECT key, value FROM meta");
    while (rows.step()) meta[rows.text(0)] = rows.text(1);
    if (meta["format"] != "tailor ledger") not_ours("its table 'meta' is another program's");
    const std::string& version = meta["schema_version"];
    if (version == std::to_string(kSchemaVersion)) return;
    throw Error(Fault::usage, {"the ledger has schema version " + version +
                                   ", this Tailor knows version " + std::to_string(kSchemaVersion),
                               database_.path().string(),
                               "Use the newer Tailor that wrote it, or name another ledger."});
  }

  /// Moves the heartbeat on; throws when the attempt is closed.
  void beat(const AttemptId& attempt) {
    auto row = database_.prepare(
        "SELECT status, heartbeat_ms, heartbeat_unix_ms FROM attempt WHERE run = ? AND attempt = "
        "?");
    const bool found = row.bind(attempt.run).bind(std::int64_t{attempt.attempt}).step();
    if (!found || row.text(0) != "running") {
      throw Error(Fault::internal,
                  {found ? "the attempt is closed already (" + row.text(0) + ")"
                         : "the attempt is not in the ledger",
                   database_.path().string() + ", run " + attempt.run + ", attempt " +
                       std::to_string(attempt.attempt),
                   "A later attempt has taken the run over, or the ledger was exchanged while the "
                   "run went on. Stop this process; the newest attempt is the one that counts."});
    }
    // Ours has a steady clock to go by; an attempt begun elsewhere keeps what its segments say.
    const auto began = began_steady_ms_.find(attempt.run + "/" + std::to_string(attempt.attempt));
    const std::int64_t beat_ms =
        began == began_steady_ms_.end() ? 0 : clock_.steady_ms() - began->second;
    database_
        .prepare(
            "UPDATE attempt SET heartbeat_ms = ?, heartbeat_unix_ms = ? "
            "WHERE run = ? AND attempt = ?")
        .bind(std::max(row.integer(1), beat_ms))
        .bind(std::max(row.integer(2), clock_.unix_ms()))
        .bind(attempt.run)
        .bind(std::int64_t{attempt.attempt})
        .run();
  }

  void append(const AttemptId& attempt, std::span<const SegmentFacts> facts, bool estimated) {
    auto head = database_.prepare(
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
          .prepare(
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
          .bind(clock_.unix_ms())
          .run();
      from = to;
    }
  }

  /// Ends attempts that never ended themselves at their last heartbeat.
  void close_running(const std::string& run) {
    struct Open {
      AttemptId id;
      std::int64_t heartbeat_ms, heartbeat_unix_ms, segments_end_ms, step;
    };
    std::vector<Open> open;
    auto rows = database_.prepare(
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
        append(attempt.id, std::span(&tail, 1), true);
      }
      database_
          .prepare(
              "UPDATE attempt SET status = 'lost', ended_unix_ms = ?, estimated = 1, reason = ? "
              "WHERE run = ? AND attempt = ?")
          .bind(attempt.heartbeat_unix_ms)
          .bind("ended without a word; closed at its last heartbeat")
          .bind(run)
          .bind(std::int64_t{attempt.id.attempt})
          .run();
      add_event(attempt.id, attempt.step, "attempt_lost",
                "attempt " + std::to_string(attempt.id.attempt) +
                    " ended without a word; closed at its last heartbeat");
    }
  }

  void mark_deleted(const std::string& path) {
    database_.prepare("UPDATE artifact SET deleted = 1 WHERE path = ? AND deleted = 0")
        .bind(path)
        .run();
  }

  void add_event(const AttemptId& attempt, std::optional<std::int64_t> step,
                 const std::string& kind, const std::string& text) {
    auto insert = database_.prepare(
        "INSERT INTO event (run, attempt, unix_ms, step, kind, text) VALUES (?, ?, ?, ?, ?, ?)");
    insert.bind(attempt.run);
    if (attempt.attempt > 0) {
      insert.bind(std::int64_t{attempt.attempt});
    } else {
      insert.bind_null();
    }
    insert.bind(clock_.unix_ms()).bind(step).bind(kind).bind(text).run();
  }

  static std::vector<std::string> texts(SqliteDatabase::Statement rows) {
    std::vector<std::string> out;
    while (rows.step()) out.push_back(rows.text(0));
    return out;
  }

  static std::optional<std::string> first(SqliteDatabase::Statement rows, std::string_view key) {
    if (!rows.bind(key).step()) return std::nullopt;
    return rows.text(0);
  }

  void read_run(const std::string& run, RunRecord& record) const {
    auto row = database_.prepare(sql("SELECT ", kRunColumns, " FROM run WHERE run = ?"));
    if (!row.bind(run).step()) {
      throw Error(Fault::usage, {"the ledger holds no run '" + run + "'", database_.path().string(),
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
  }

  void read_attempts(const std::string& run, RunRecord& record) const {
    auto row = database_.prepare(
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
      attempt.status = status_from(row.text(15), database_.path().string());
      attempt.began_unix_ms = row.integer(16);
      attempt.heartbeat_unix_ms = row.integer(17);
      attempt.ended_unix_ms = row.integer_or_null(18);
      if (const auto code = row.integer_or_null(19)) attempt.exit_code = narrow<int>(*code);
      attempt.reason = row.text(20);
      attempt.estimated = row.integer(21) != 0;
      record.attempts.push_back(std::move(attempt));
    }
  }

  void read_segments(const std::string& run, RunRecord& record) const {
    auto row = database_.prepare(
        sql("SELECT ", kSegmentColumns, " FROM segment WHERE run = ? ORDER BY attempt, seq"));
    row.bind(run);
    while (row.step()) {
      SegmentRecord segment;
      segment.attempt = narrow<int>(row.integer(0));
      segment.facts = {.phase = phase_from(row.text(1), database_.path().string()),
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
    auto row = database_.prepare(
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
    auto row = database_.prepare(
        "SELECT attempt, unix_ms, step, kind, text FROM event WHERE run = ? ORDER BY event");
    row.bind(run);
    while (row.step()) {
      EventRecord event{{}, row.integer(1), row.integer_or_null(2), row.text(3), row.text(4)};
      if (const auto attempt = row.integer_or_null(0)) event.attempt = narrow<int>(*attempt);
      record.events.push_back(std::move(event));
    }
  }

  mutable std::mutex mutex_;
  mutable SqliteDatabase database_;
  const Clock& clock_;
  std::map<std::string, std::int64_t> began_steady_ms_;  ///< by "run/attempt", begun here
};

/// SQLite's file behind a place, or Error{usage} for places of another kind.
fs::path sqlite_path(const std::string& place) {
  if (place.find("://") != std::string::npos) {
    throw Error(
        Fault::usage,
        {"ledgers of this kind are not supported yet: " + place.substr(0, place.find("://")),
         "cost.ledger", "Name a file; it is an SQLite database that several runs can share."});
  }
  return place;
}

}  // namespace

std::unique_ptr<Ledger> Ledger::open(const std::string& place, const Clock& clock) {
  return std::make_unique<SqliteLedger>(sqlite_path(place), SqliteDatabase::Mode::create, clock);
}

std::unique_ptr<Ledger> Ledger::open_existing(const std::string& place, const Clock& clock) {
  const fs::path path = sqlite_path(place);
  std::error_code ignored;
  if (!fs::exists(path, ignored)) return nullptr;
  return std::make_unique<SqliteLedger>(path, SqliteDatabase::Mode::existing, clock);
}

}  // namespace tailor
