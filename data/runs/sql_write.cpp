#include <algorithm>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/units.h"
#include "data/runs/sql_records.h"

namespace tailor {
namespace {

/// Of an entry that is about the run alone there is none.
std::optional<std::int64_t> number_or_null(const AttemptId& id) {
  return id.attempt > 0 ? std::optional<std::int64_t>(id.attempt) : std::nullopt;
}

class EntryWriter {
 public:
  EntryWriter(SqlDatabase& database, const LedgerEntry& entry)
      : database_(database), entry_(entry) {}

  AttemptId write() {
    AttemptId id = entry_.attempt;
    if (!entry_.journal.empty() && !take_number(id)) return id;
    std::visit([&](const auto& what) { put(id, what); }, entry_.what);
    if (!entry_.journal.empty()) keep_number(id);
    return id;
  }

 private:
  /// False where the entry is in already. `id` becomes the journal's attempt, once it has one.
  bool take_number(AttemptId& id) {
    auto row = database_.prepare("SELECT number, attempt FROM journal WHERE journal = ?");
    if (!row.bind(entry_.journal).step()) return true;
    if (const auto attempt = row.integer_or_null(1)) id.attempt = narrow<int>(*attempt);
    return row.integer(0) < entry_.number;
  }

  void keep_number(const AttemptId& id) {
    auto row = database_.prepare(
        "INSERT INTO journal (journal, number, run, attempt) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (journal) DO UPDATE SET number = excluded.number, attempt = excluded.attempt");
    row.bind(entry_.journal).bind(entry_.number).bind(id.run).bind(number_or_null(id)).run();
  }

  void put(AttemptId& id, const RunFacts& facts) {
    auto known = database_.prepare("SELECT output_dir FROM run WHERE run = ?");
    if (known.bind(id.run).step()) {  // a resumed run; its folder may have been moved
      if (known.text(0) == facts.output_dir) return;
      database_.prepare("UPDATE run SET output_dir = ? WHERE run = ?")
          .bind(facts.output_dir)
          .bind(id.run)
          .run();
      return;
    }
    database_
        .prepare("INSERT INTO run (" + std::string(kRunColumns) +
                 ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")
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
        .bind(entry_.unix_ms)
        .bind(facts.owner)
        .run();
  }

  void put(AttemptId& id, const AttemptFacts& facts) {
    close_running(id.run);
    auto last = database_.prepare("SELECT COALESCE(MAX(attempt), 0) FROM attempt WHERE run = ?");
    last.bind(id.run).step();
    id.attempt = narrow<int>(last.integer(0)) + 1;
    database_
        .prepare(
            "INSERT INTO attempt (run, attempt, launcher, launcher_job, world_size, nodes, "
            "devices, host, device_kind, sku, usd_micros_per_device_hour, no_price_reason, "
            "price_id, price_kind, price_source, resumed_from_step, status, began_unix_ms, "
            "heartbeat_unix_ms, heartbeat_ms, planned_device_ms, planned_usd_micros) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'running', ?, ?, ?, ?, ?)")
        .bind(id.run)
        .bind(id.attempt)
        .bind(facts.launcher)
        .bind(facts.launcher_job)
        .bind(facts.world_size)
        .bind(facts.nodes)
        .bind(facts.devices)
        .bind(facts.host)
        .bind(facts.device_kind)
        .bind(facts.sku)
        .bind(facts.usd_micros_per_device_hour)
        .bind(facts.usd_micros_per_device_hour.has_value() ? "" : facts.no_price_reason)
        .bind(facts.price_id)
        .bind(facts.price_kind)
        .bind(facts.price_source)
        .bind(facts.resumed_from_step)
        .bind(entry_.unix_ms - facts.held_ms_before)
        .bind(entry_.unix_ms)
        .bind(facts.held_ms_before)
        .bind(facts.planned_device_ms)
        .bind(facts.planned_usd_micros)
        .run();
    if (facts.held_ms_before > 0) {
      const SegmentFacts held{
          .phase = Phase::start, .ms = facts.held_ms_before, .step = facts.resumed_from_step};
      append(id, std::span(&held, 1), false);
    }
  }

  void put(AttemptId& id, const std::vector<SegmentFacts>& facts) {
    beat(id);
    append(id, facts, false);
  }

  void put(AttemptId& id, const HeartbeatFacts&) { beat(id); }

  void put(AttemptId& id, const EndFacts& facts) {
    beat(id);
    database_
        .prepare(
            "UPDATE attempt SET status = ?, ended_unix_ms = ?, exit_code = ?, reason = ? "
            "WHERE run = ? AND attempt = ?")
        .bind(status_name(facts.status))
        .bind(entry_.unix_ms)
        .bind(facts.exit_code)
        .bind(facts.reason)
        .bind(id.run)
        .bind(id.attempt)
        .run();
  }

  void put(AttemptId& id, const ArtifactFacts& facts) {
    mark_deleted(facts.path);
    database_
        .prepare(
            "INSERT INTO artifact (run, attempt, kind, path, step, bytes, sha256, unix_ms) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)")
        .bind(id.run)
        .bind(id.attempt)
        .bind(facts.kind)
        .bind(facts.path)
        .bind(facts.step)
        .bind(facts.bytes)
        .bind(facts.sha256)
        .bind(entry_.unix_ms)
        .run();
  }

  void put(AttemptId&, const DeletedFacts& facts) { mark_deleted(facts.path); }

  void put(AttemptId& id, const EventFacts& facts) {
    add_event(id, facts.step, facts.kind, facts.text);
  }

  /// Moves the heartbeat on; throws when the attempt is closed.
  void beat(const AttemptId& attempt) {
    auto row = database_.prepare(
        "SELECT status, heartbeat_ms, heartbeat_unix_ms FROM attempt WHERE run = ? AND attempt = "
        "?");
    const bool found = row.bind(attempt.run).bind(attempt.attempt).step();
    if (!found || row.text(0) != "running") {
      throw Error(Fault::internal,
                  {found ? "the attempt is closed already (" + row.text(0) + ")"
                         : "the attempt is not in the ledger",
                   database_.place() + ", run " + attempt.run + ", attempt " +
                       std::to_string(attempt.attempt),
                   "A later attempt has taken the run over, or the ledger was exchanged while the "
                   "run went on. Stop this process; the newest attempt is the one that counts."});
    }
    database_
        .prepare(
            "UPDATE attempt SET heartbeat_ms = ?, heartbeat_unix_ms = ? "
            "WHERE run = ? AND attempt = ?")
        .bind(std::max(row.integer(1), entry_.ms))
        .bind(std::max(row.integer(2), entry_.unix_ms))
        .bind(attempt.run)
        .bind(attempt.attempt)
        .run();
  }

  void append(const AttemptId& attempt, std::span<const SegmentFacts> facts, bool estimated) {
    // Of a long run's segments the last one alone is looked at: its end is the attempt's so far.
    auto head = database_.prepare(
        "SELECT a.devices, a.usd_micros_per_device_hour, COALESCE(s.seq, 0), "
        "COALESCE(s.to_ms, 0) FROM attempt a LEFT JOIN segment s "
        "ON s.run = a.run AND s.attempt = a.attempt AND s.seq = (SELECT MAX(l.seq) "
        "FROM segment l WHERE l.run = a.run AND l.attempt = a.attempt) "
        "WHERE a.run = ? AND a.attempt = ?");
    TAILOR_CHECK(head.bind(attempt.run).bind(attempt.attempt).step());
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
          .bind(attempt.attempt)
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
          .bind(estimated ? 1 : 0)
          .bind(entry_.unix_ms)
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
          .bind(attempt.id.attempt)
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
    database_
        .prepare(
            "INSERT INTO event (run, attempt, unix_ms, step, kind, text) VALUES (?, ?, ?, ?, ?, ?)")
        .bind(attempt.run)
        .bind(number_or_null(attempt))
        .bind(entry_.unix_ms)
        .bind(step)
        .bind(kind)
        .bind(text)
        .run();
  }

  SqlDatabase& database_;
  const LedgerEntry& entry_;
};

}  // namespace

AttemptId write_entry(SqlDatabase& database, const LedgerEntry& entry) {
  return EntryWriter(database, entry).write();
}

}  // namespace tailor
