#include "data/runs/ledger_entry.h"

#include <utility>

#include "base/error.h"
#include "base/units.h"

namespace tailor {
namespace {

/// One list of members serves writing and reading, so that the two cannot differ.
class Writer {
 public:
  explicit Writer(Json& out) : out_(out) {}
  void operator()(const char* key, const std::string& value) {
    if (!value.empty()) out_[key] = value;
  }
  void operator()(const char* key, std::int64_t value) { out_[key] = value; }
  void operator()(const char* key, int value) { out_[key] = value; }
  void operator()(const char* key, const std::optional<std::int64_t>& value) {
    if (value.has_value()) out_[key] = *value;
  }
  void operator()(const char* key, Phase value) { out_[key] = phase_name(value); }
  void operator()(const char* key, RunStatus value) { out_[key] = status_name(value); }

 private:
  Json& out_;
};

class Reader {
 public:
  Reader(const Json& in, const std::string& where) : in_(in, where) {}
  void operator()(const char* key, std::string& value) { value = in_.text(key, ""); }
  void operator()(const char* key, std::int64_t& value) { value = in_.integer(key); }
  void operator()(const char* key, int& value) { value = narrow<int>(in_.integer(key)); }
  void operator()(const char* key, std::optional<std::int64_t>& value) {
    if (in_.has(key)) value = in_.integer(key);
  }
  void operator()(const char* key, Phase& value) { value = phase_from(in_.text(key), in_.where()); }
  void operator()(const char* key, RunStatus& value) {
    value = status_from(in_.text(key), in_.where());
  }

 private:
  JsonReader in_;
};

template <class Visit, class Facts>
void each_of_run(Visit& visit, Facts& facts) {
  visit("run", facts.run);
  visit("name", facts.name);
  visit("project", facts.project);
  visit("owner", facts.owner);
  visit("output_dir", facts.output_dir);
  visit("base_model", facts.base_model);
  visit("base_sha256", facts.base_sha256);
  visit("dataset_sha256", facts.dataset_sha256);
  visit("recipe_sha256", facts.recipe_sha256);
  visit("recipe_text", facts.recipe_text);
  visit("code_version", facts.code_version);
  visit("seed", facts.seed);
  visit("usd_micros_limit", facts.usd_micros_limit);
  visit("device_ms_limit", facts.device_ms_limit);
}

template <class Visit, class Facts>
void each_of_attempt(Visit& visit, Facts& facts) {
  visit("launcher", facts.launcher);
  visit("launcher_job", facts.launcher_job);
  visit("host", facts.host);
  visit("device_kind", facts.device_kind);
  visit("sku", facts.sku);
  visit("no_price_reason", facts.no_price_reason);
  visit("price_id", facts.price_id);
  visit("price_kind", facts.price_kind);
  visit("price_source", facts.price_source);
  visit("world_size", facts.world_size);
  visit("nodes", facts.nodes);
  visit("devices", facts.devices);
  visit("usd_micros_per_device_hour", facts.usd_micros_per_device_hour);
  visit("planned_device_ms", facts.planned_device_ms);
  visit("planned_usd_micros", facts.planned_usd_micros);
  visit("resumed_from_step", facts.resumed_from_step);
  visit("held_ms_before", facts.held_ms_before);
}

template <class Visit, class Facts>
void each_of_segment(Visit& visit, Facts& facts) {
  visit("phase", facts.phase);
  visit("ms", facts.ms);
  visit("step", facts.step);
  visit("steps", facts.steps);
  visit("tokens", facts.tokens);
  visit("trained_tokens", facts.trained_tokens);
  visit("busy_device_ms", facts.busy_device_ms);
  visit("energy_mj", facts.energy_mj);
}

template <class Visit, class Facts>
void each_of_end(Visit& visit, Facts& facts) {
  visit("status", facts.status);
  visit("exit_code", facts.exit_code);
  visit("reason", facts.reason);
}

template <class Visit, class Facts>
void each_of_artifact(Visit& visit, Facts& facts) {
  visit("kind", facts.kind);
  visit("path", facts.path);
  visit("step", facts.step);
  visit("bytes", facts.bytes);
  visit("sha256", facts.sha256);
}

template <class Visit, class Facts>
void each_of_event(Visit& visit, Facts& facts) {
  visit("step", facts.step);
  visit("kind", facts.kind);
  visit("text", facts.text);
}

}  // namespace

Json entry_json(const LedgerEntry& entry) {
  Json out;
  Writer head(out);
  head("number", entry.number);
  head("run", entry.attempt.run);
  head("unix_ms", entry.unix_ms);
  head("ms", entry.ms);
  Json inner = Json::object();
  Writer write(inner);
  if (const auto* run = std::get_if<RunFacts>(&entry.what)) {
    each_of_run(write, *run);
    out["begin_run"] = inner;
  } else if (const auto* attempt = std::get_if<AttemptFacts>(&entry.what)) {
    each_of_attempt(write, *attempt);
    out["begin_attempt"] = inner;
  } else if (const auto* segments = std::get_if<std::vector<SegmentFacts>>(&entry.what)) {
    Json list = Json::array();
    for (const SegmentFacts& facts : *segments) {
      Json row;
      Writer write_row(row);
      each_of_segment(write_row, facts);
      list.push_back(row);
    }
    out["segments"] = list;
  } else if (std::holds_alternative<HeartbeatFacts>(entry.what)) {
    out["heartbeat"] = inner;
  } else if (const auto* end = std::get_if<EndFacts>(&entry.what)) {
    each_of_end(write, *end);
    out["end_attempt"] = inner;
  } else if (const auto* artifact = std::get_if<ArtifactFacts>(&entry.what)) {
    each_of_artifact(write, *artifact);
    out["artifact"] = inner;
  } else if (const auto* deleted = std::get_if<DeletedFacts>(&entry.what)) {
    write("path", deleted->path);
    out["artifact_deleted"] = inner;
  } else if (const auto* event = std::get_if<EventFacts>(&entry.what)) {
    each_of_event(write, *event);
    out["event"] = inner;
  }
  return out;
}

LedgerEntry entry_from_json(const Json& json, const std::string& where) {
  LedgerEntry entry;
  const JsonReader in(json, where);
  Reader head(json, where);
  head("number", entry.number);
  head("run", entry.attempt.run);
  head("unix_ms", entry.unix_ms);
  head("ms", entry.ms);
  if (in.has("begin_run")) {
    RunFacts facts;
    Reader read(in.at("begin_run"), where);
    each_of_run(read, facts);
    entry.what = facts;
  } else if (in.has("begin_attempt")) {
    AttemptFacts facts;
    Reader read(in.at("begin_attempt"), where);
    each_of_attempt(read, facts);
    entry.what = facts;
  } else if (in.has("segments")) {
    std::vector<SegmentFacts> rows;
    for (const Json& row : in.at("segments")) {
      Reader read(row, where);
      each_of_segment(read, rows.emplace_back());
    }
    entry.what = rows;
  } else if (in.has("heartbeat")) {
    entry.what = HeartbeatFacts{};
  } else if (in.has("end_attempt")) {
    EndFacts facts;
    Reader read(in.at("end_attempt"), where);
    each_of_end(read, facts);
    entry.what = facts;
  } else if (in.has("artifact")) {
    ArtifactFacts facts;
    Reader read(in.at("artifact"), where);
    each_of_artifact(read, facts);
    entry.what = facts;
  } else if (in.has("artifact_deleted")) {
    DeletedFacts facts;
    Reader read(in.at("artifact_deleted"), where);
    read("path", facts.path);
    entry.what = facts;
  } else if (in.has("event")) {
    EventFacts facts;
    Reader read(in.at("event"), where);
    each_of_event(read, facts);
    entry.what = facts;
  } else {
    throw Error(Fault::bad_file, {"an entry of an unknown kind in the journal", where,
                                  "Use the Tailor version that wrote it."});
  }
  return entry;
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

}  // namespace tailor
