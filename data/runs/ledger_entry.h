#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/json.h"
#include "data/runs/ledger.h"

namespace tailor {

struct EndFacts {
  RunStatus status = RunStatus::succeeded;
  int exit_code = 0;
  std::string reason{};
};
struct DeletedFacts {
  std::string path{};
};
struct EventFacts {
  std::optional<std::int64_t> step{};
  std::string kind{}, text{};
};
struct HeartbeatFacts {};

/// One change of the ledger. With a journal's name it is numbered, and the ledger takes it once
/// however often it is offered: that is how a change whose fate is unknown is offered again.
struct LedgerEntry {
  using What = std::variant<RunFacts, AttemptFacts, std::vector<SegmentFacts>, HeartbeatFacts,
                            EndFacts, ArtifactFacts, DeletedFacts, EventFacts>;
  std::string journal{};     ///< a ULID; empty: not numbered
  std::int64_t number = 0;   ///< from 1, in order
  AttemptId attempt{};       ///< of a numbered one only the run counts: its journal has one attempt
  std::int64_t unix_ms = 0;  ///< when it happened
  std::int64_t ms = 0;       ///< the same on the steady clock, since the attempt began; 0: unknown
  What what{};
};

Json entry_json(const LedgerEntry& entry);
/// Throws Error{bad_file} naming `where`.
LedgerEntry entry_from_json(const Json& json, const std::string& where);

Phase phase_from(const std::string& name, const std::string& where);
RunStatus status_from(const std::string& name, const std::string& where);

}  // namespace tailor
