#pragma once

#include <string>
#include <string_view>

#include "data/runs/ledger_entry.h"
#include "data/runs/sql_database.h"

namespace tailor {

// The rows of the ledger's tables, in SQL that SQLite and PostgreSQL share. For the inside of a
// transaction or a snapshot.

/// Takes `entry` in, a numbered one once; the attempt it was about. Error{internal} where that is
/// closed already.
AttemptId write_entry(SqlDatabase& database, const LedgerEntry& entry);

/// Everything about one run. Throws Error{usage} for an unknown identifier.
RunRecord read_record(SqlDatabase& database, const std::string& run);

/// The columns of a run, in the order in which they are written and read.
inline constexpr std::string_view kRunColumns =
    "run, name, project, output_dir, base_model, base_sha256, dataset_sha256, recipe_sha256, "
    "recipe_text, code_version, seed, usd_micros_limit, device_ms_limit, created_unix_ms, owner";

}  // namespace tailor
