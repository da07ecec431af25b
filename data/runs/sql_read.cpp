#include <utility>

#include "base/error.h"
#include "base/units.h"
#include "data/runs/sql_records.h"

namespace tailor {
namespace {

constexpr std::string_view kAttemptColumns =
    "attempt, launcher, launcher_job, world_size, nodes, devices, host, device_kind, sku, "
    "usd_micros_per_device_hour, no_price_reason, price_id, price_kind, price_source, "
    "resumed_from_step, status, began_unix_ms, heartbeat_unix_ms, ended_unix_ms, exit_code, "
    "reason, estimated, planned_device_ms, planned_usd_micros";
constexpr std::string_view kSegmentColumns =
    "attempt, phase, from_ms, to_ms, device_ms, usd_micros, step, steps, tokens, trained_tokens, "
    "busy_device_ms, energy_mj, estimated";

void read_run(SqlDatabase& database, const std::string& run, RunRecord& record) {
  auto row = database.prepare("SELECT " + std::string(kRunColumns) + " FROM run WHERE run = ?");
  if (!row.bind(run).step()) {
    throw Error(Fault::usage, {"the ledger holds no run '" + run + "'", database.place(),
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

void read_attempts(SqlDatabase& database, const std::string& run, RunRecord& record) {
  auto row = database.prepare("SELECT " + std::string(kAttemptColumns) +
                              " FROM attempt WHERE run = ? ORDER BY attempt");
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
    attempt.status = status_from(row.text(15), database.place());
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

void read_segments(SqlDatabase& database, const std::string& run, RunRecord& record) {
  auto row = database.prepare("SELECT " + std::string(kSegmentColumns) +
                              " FROM segment WHERE run = ? ORDER BY attempt, seq");
  row.bind(run);
  while (row.step()) {
    SegmentRecord segment;
    segment.attempt = narrow<int>(row.integer(0));
    segment.facts = {.phase = phase_from(row.text(1), database.place()),
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

void read_artifacts(SqlDatabase& database, const std::string& run, RunRecord& record) {
  auto row = database.prepare(
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

void read_events(SqlDatabase& database, const std::string& run, RunRecord& record) {
  auto row = database.prepare(
      "SELECT attempt, unix_ms, step, kind, text FROM event WHERE run = ? ORDER BY event");
  row.bind(run);
  while (row.step()) {
    EventRecord event{{}, row.integer(1), row.integer_or_null(2), row.text(3), row.text(4)};
    if (const auto attempt = row.integer_or_null(0)) event.attempt = narrow<int>(*attempt);
    record.events.push_back(std::move(event));
  }
}

}  // namespace

RunRecord read_record(SqlDatabase& database, const std::string& run) {
  RunRecord record;
  read_run(database, run, record);
  read_attempts(database, run, record);
  read_segments(database, run, record);
  read_artifacts(database, run, record);
  read_events(database, run, record);
  return record;
}

}  // namespace tailor
