#include "data/runs/ledger_schema.h"

#include <charconv>
#include <map>
#include <string>

#include "base/error.h"

namespace tailor {
namespace {

/// Version 1, in what SQLite and PostgreSQL share; @IDENTITY@ numbers rows as they come.
constexpr const char* kTables = R"sql(
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
CREATE TABLE artifact (
  artifact @IDENTITY@,
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
  event   @IDENTITY@,
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

/// What version 2 brought: who began a run, what it was planned to take, budgets that runs share,
/// and how far each process's journal has been taken in.
constexpr const char* kVersion2 = R"sql(
ALTER TABLE run ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE attempt ADD COLUMN planned_device_ms BIGINT;
ALTER TABLE attempt ADD COLUMN planned_usd_micros BIGINT;
CREATE INDEX run_by_project ON run (project);

CREATE TABLE budget (
  budget           @IDENTITY@,
  project          TEXT NOT NULL,
  usd_micros_limit BIGINT CHECK (usd_micros_limit > 0),
  device_ms_limit  BIGINT CHECK (device_ms_limit > 0),
  set_by           TEXT NOT NULL,
  set_unix_ms      BIGINT NOT NULL
);
CREATE INDEX budget_by_project ON budget (project, budget);

CREATE TABLE journal (
  journal TEXT PRIMARY KEY,
  number  BIGINT NOT NULL,
  run     TEXT NOT NULL,
  attempt INTEGER
);
UPDATE meta SET value = '2' WHERE key = 'schema_version';
)sql";

constexpr const char* kSqliteTriggers = R"sql(
CREATE TRIGGER segment_is_final BEFORE UPDATE ON segment
  BEGIN SELECT RAISE(ABORT, 'segments are append-only'); END;
CREATE TRIGGER segment_stays BEFORE DELETE ON segment
  BEGIN SELECT RAISE(ABORT, 'segments are append-only'); END;
)sql";
constexpr const char* kPostgresTriggers = R"sql(
CREATE FUNCTION segment_is_final() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION 'segments are append-only'; END $$;
CREATE TRIGGER segment_is_final BEFORE UPDATE OR DELETE ON segment
  FOR EACH ROW EXECUTE FUNCTION segment_is_final();
)sql";

std::string in_dialect(std::string sql, SqlDatabase::Dialect dialect) {
  const std::string mark = "@IDENTITY@";
  const std::string identity = dialect == SqlDatabase::Dialect::sqlite
                                   ? "INTEGER PRIMARY KEY"
                                   : "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY";
  for (std::size_t at = 0; (at = sql.find(mark)) != std::string::npos;) {
    sql.replace(at, mark.size(), identity);
  }
  return sql;
}

[[noreturn]] void not_ours(const SqlDatabase& database, const std::string& why) {
  throw Error(Fault::bad_file, {"not a Tailor ledger: " + why, database.place(),
                                "Name another place as the ledger."});
}

void make_tables(SqlDatabase& database) {
  const bool postgres = database.dialect() == SqlDatabase::Dialect::postgres;
  if (postgres && !database.prepare("SELECT 1 FROM pg_namespace WHERE nspname = 'tailor'").step()) {
    database.execute("CREATE SCHEMA tailor");
  }
  if (database.has_table("meta")) return;
  if (const auto other = database.any_table()) {
    not_ours(database, "holds a table '" + *other + "', but none named 'meta'");
  }
  database.execute(in_dialect(kTables, database.dialect()));
  database.execute(postgres ? kPostgresTriggers : kSqliteTriggers);
  database.execute(in_dialect(kVersion2, database.dialect()));
}

int version_of(SqlDatabase& database) {
  std::map<std::string, std::string> meta;
  auto rows = database.prepare("SELECT key, value FROM meta");
  while (rows.step()) meta[rows.text(0)] = rows.text(1);
  if (meta["format"] != "tailor ledger") {
    not_ours(database, "its table 'meta' is another program's");
  }
  const std::string& text = meta["schema_version"];
  int version = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), version);
  if (error == std::errc{} && end == text.data() + text.size() && version >= 1 &&
      version <= kLedgerSchemaVersion) {
    return version;
  }
  throw Error(Fault::usage,
              {"the ledger has schema version " + text + ", this Tailor knows version " +
                   std::to_string(kLedgerSchemaVersion),
               database.place(), "Use the newer Tailor that wrote it, or name another ledger."});
}

}  // namespace

void prepare_ledger_schema(SqlDatabase& database) {
  constexpr std::string_view kLock = "tailor ledger schema";
  if (!database.has_table("meta")) database.transaction(kLock, [&] { make_tables(database); });
  if (version_of(database) == kLedgerSchemaVersion) return;
  database.transaction(kLock, [&] {
    if (version_of(database) == 1) {
      database.execute(in_dialect(kVersion2, database.dialect()));
    }
  });
}

}  // namespace tailor
