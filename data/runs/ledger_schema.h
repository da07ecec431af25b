#pragma once

#include "data/runs/sql_database.h"

namespace tailor {

constexpr int kLedgerSchemaVersion = 2;

/// Makes the ledger's tables where there are none, and brings older ones up to date. Throws
/// Error{bad_file} where the database is another program's, Error{usage} for a newer schema.
/// Format: docs/formats/ledger.md.
void prepare_ledger_schema(SqlDatabase& database);

}  // namespace tailor
