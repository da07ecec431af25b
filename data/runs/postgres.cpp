#include "data/runs/postgres.h"

#include <libpq-fe.h>
#include <poll.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"
#include "base/url.h"

namespace tailor {
namespace {

constexpr int kTries = 10;

/// PostgreSQL asked for the transaction to be done again.
struct AskedAgain {};

/// The 64 bits of FNV-1a, for advisory locks.
std::int64_t lock_number(std::string_view key) {
  std::uint64_t hash = 14'695'981'039'346'656'037U;
  for (const char c : key) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 1'099'511'628'211U;
  }
  return static_cast<std::int64_t>(hash);
}

/// libpq's messages are lines that end in a newline and may repeat; one line of ours.
std::string one_line(std::string_view message) {
  std::string out;
  for (const std::string& line : split(message, '\n')) {
    const std::string_view text = trim(line);
    if (text.empty()) continue;
    if (!out.empty()) out += "; ";
    out += text;
  }
  return out;
}

}  // namespace

void PostgresDatabase::Clear::operator()(pg_result* result) const noexcept { PQclear(result); }

class PostgresDatabase::PostgresCursor final : public SqlDatabase::Cursor {
 public:
  PostgresCursor(PostgresDatabase& database, std::string_view sql) : database_(database) {
    int number = 0;
    for (const char c : sql) {  // no statement of ours has a ? that is not a parameter
      if (c == '?') {
        sql_ += "$" + std::to_string(++number);
      } else {
        sql_ += c;
      }
    }
  }

  void bind_integer(std::int64_t value) override { values_.emplace_back(std::to_string(value)); }
  void bind_text(std::string_view value) override {
    // The server's texts hold no NUL; what follows one is of no use to a reader either.
    values_.emplace_back(std::string(value.substr(0, value.find('\0'))));
  }
  void bind_null() override { values_.emplace_back(std::nullopt); }

  bool step() override {
    if (!result_) {
      std::vector<const char*> pointers;
      pointers.reserve(values_.size());
      for (const auto& value : values_) pointers.push_back(value ? value->c_str() : nullptr);
      database_.connect();
      if (PQsendQueryParams(database_.connection_, sql_.c_str(), static_cast<int>(pointers.size()),
                            nullptr, pointers.data(), nullptr, nullptr, 0) != 1) {
        database_.lost(PQerrorMessage(database_.connection_));
      }
      result_ = database_.receive();
    }
    return ++row_ < PQntuples(result_.get());
  }
  bool is_null(int column) const override { return PQgetisnull(result_.get(), row_, column) == 1; }
  std::int64_t integer(int column) const override {
    const std::string value = text(column);
    std::int64_t out = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), out);
    if (error == std::errc{} && end == value.data() + value.size()) return out;
    if (value.empty()) return 0;
    throw Error(Fault::bad_file, {"a whole number is needed, found '" + value + "'",
                                  database_.place(), "The ledger's tables were changed by hand."});
  }
  std::string text(int column) const override {
    return {PQgetvalue(result_.get(), row_, column),
            static_cast<std::size_t>(PQgetlength(result_.get(), row_, column))};
  }

 private:
  PostgresDatabase& database_;
  std::string sql_;
  std::vector<std::optional<std::string>> values_;
  Result result_;
  int row_ = -1;
};

PostgresDatabase::PostgresDatabase(std::string address, int patience_ms)
    : address_(std::move(address)), place_(without_password(address_)), patience_ms_(patience_ms) {
  char* said = nullptr;
  PQconninfoOption* options = PQconninfoParse(address_.c_str(), &said);
  const std::string why = said != nullptr ? one_line(said) : "";
  PQfreemem(said);
  PQconninfoFree(options);
  // libpq's reason may quote the address, password and all.
  if (options != nullptr) return;
  const bool may_tell = place_ == address_;
  throw Error(Fault::usage,
              {"not an address of a PostgreSQL database" + (may_tell ? ": " + why : ""), place_,
               "Write postgresql://USER@HOST:PORT/DATABASE; the password belongs in ~/.pgpass or "
               "PGPASSWORD."});
}

PostgresDatabase::~PostgresDatabase() { disconnect(); }

void PostgresDatabase::disconnect() noexcept {
  PQfinish(connection_);
  connection_ = nullptr;
}

void PostgresDatabase::lost(const std::string& why) {
  disconnect();
  throw Error(Fault::io,
              {"cannot reach the database: " + one_line(why), place_,
               "See that the server runs and that this machine may connect: psql '" + place_ +
                   "'. The password is looked for in PGPASSWORD and ~/.pgpass."});
}

void PostgresDatabase::wait_for_socket(bool to_write) {
  const RealClock clock;
  pollfd wait{PQsocket(connection_), static_cast<short>(to_write ? POLLOUT : POLLIN), 0};
  while (true) {
    const std::int64_t left = deadline_ms_ - clock.steady_ms();
    if (left <= 0 || wait.fd < 0) break;
    const int ready = ::poll(&wait, 1, static_cast<int>(left));
    if (ready > 0) return;
    if (ready < 0 && errno != EINTR) break;
  }
  lost("no answer within " + seconds_text(patience_ms_ / 1000.0));
}

void PostgresDatabase::connect() {
  if (connection_ != nullptr) return;
  deadline_ms_ = RealClock().steady_ms() + patience_ms_;
  // Without NOTICE lines on stderr, and a peer that vanished without a word is found out.
  const std::array keys = {"dbname", "fallback_application_name", "keepalives_idle",
                           "tcp_user_timeout", static_cast<const char*>(nullptr)};
  const std::string timeout = std::to_string(patience_ms_);
  const std::array values = {address_.c_str(), "tailor", "30", timeout.c_str(),
                             static_cast<const char*>(nullptr)};
  connection_ = PQconnectStartParams(keys.data(), values.data(), 1);
  if (connection_ == nullptr) lost("out of memory");
  PostgresPollingStatusType state = PGRES_POLLING_WRITING;
  while (state != PGRES_POLLING_OK) {
    if (PQstatus(connection_) == CONNECTION_BAD || state == PGRES_POLLING_FAILED) {
      lost(PQerrorMessage(connection_));
    }
    wait_for_socket(state == PGRES_POLLING_WRITING);
    state = PQconnectPoll(connection_);
  }
  PQsetNoticeProcessor(
      connection_, [](void*, const char*) {}, nullptr);
  if (PQsetnonblocking(connection_, 1) != 0) lost(PQerrorMessage(connection_));
  // A lost client's locks end with it, and a commit is on the disk when it returns.
  execute(
      "SET search_path = tailor; SET client_encoding = 'UTF8'; SET synchronous_commit = on; "
      "SET idle_in_transaction_session_timeout = '60s'; SET lock_timeout = " +
      timeout);
}

PostgresDatabase::Result PostgresDatabase::receive() {
  deadline_ms_ = RealClock().steady_ms() + patience_ms_;
  while (true) {
    const int left = PQflush(connection_);
    if (left == 0) break;
    if (left < 0) lost(PQerrorMessage(connection_));
    wait_for_socket(true);
  }
  Result last;
  Result wrong;
  while (true) {
    while (PQisBusy(connection_) == 1) {
      wait_for_socket(false);
      if (PQconsumeInput(connection_) != 1) lost(PQerrorMessage(connection_));
    }
    Result next(PQgetResult(connection_));
    if (!next) break;
    const ExecStatusType status = PQresultStatus(next.get());
    const bool good = status == PGRES_TUPLES_OK || status == PGRES_COMMAND_OK;
    if (!good && !wrong) wrong = std::move(next);
    if (good) last = std::move(next);
  }
  if (wrong) fail(wrong.get());
  if (!last) lost("no result");
  return last;
}

void PostgresDatabase::fail(const pg_result* result) {
  const char* field = PQresultErrorField(result, PG_DIAG_SQLSTATE);
  const std::string code = field != nullptr ? field : "";
  const std::string said = one_line(PQresultErrorMessage(result));
  const auto is_class = [&](std::string_view name) { return code.starts_with(name); };
  if (code.empty() || PQstatus(connection_) == CONNECTION_BAD || is_class("08") ||
      is_class("57P")) {
    lost(said);  // gone, or told to go
  }
  if (is_class("40") || code == "23505") throw AskedAgain{};
  const std::string what = "the database refuses: " + said;
  if (code == "55P03" || code == "57014") {
    throw Error(Fault::io, {what, place_,
                            "Another client holds the ledger's rows; see "
                            "pg_stat_activity on the server."});
  }
  if (code == "25006" || code == "42501" || is_class("28")) {
    throw Error(Fault::io, {what, place_,
                            "The user needs to write: GRANT CREATE ON DATABASE, or to own the "
                            "schema tailor."});
  }
  if (is_class("53") || is_class("58")) {
    throw Error(Fault::io, {what, place_, "Make room on the server's disk, or see its log."});
  }
  if (is_class("XX")) {
    throw Error(Fault::bad_file, {what, place_, "The database is damaged; see the server's log."});
  }
  throw Error(Fault::internal,
              {what + " (" + code + ")", place_,
               "This is a mistake in Tailor, or the ledger's tables were changed by hand."});
}

SqlDatabase::Statement PostgresDatabase::prepare(std::string_view sql) {
  return Statement(std::make_unique<PostgresCursor>(*this, sql));
}

void PostgresDatabase::execute(const std::string& sql) {
  connect();
  if (PQsendQuery(connection_, sql.c_str()) != 1) lost(PQerrorMessage(connection_));
  receive();
}

bool PostgresDatabase::has_table(std::string_view name) {
  return prepare("SELECT 1 FROM pg_tables WHERE schemaname = 'tailor' AND tablename = ?")
      .bind(name)
      .step();
}

std::optional<std::string> PostgresDatabase::any_table() {
  auto row = prepare("SELECT tablename FROM pg_tables WHERE schemaname = 'tailor' LIMIT 1");
  if (!row.step()) return std::nullopt;
  return row.text(0);
}

/// A connection that was lost while it lay idle is made anew.
void PostgresDatabase::begin(const std::string& statement) {
  const bool fresh = connection_ == nullptr;
  try {
    execute(statement);
  } catch (const Error&) {
    if (fresh || connection_ != nullptr) throw;
    execute(statement);
  }
}

void PostgresDatabase::run_in(const std::string& statement, std::string_view key,
                              const std::function<void()>& work) {
  for (int tries = 1;; ++tries) {
    try {
      begin(statement);
      if (!key.empty()) {
        prepare("SELECT pg_advisory_xact_lock(?::bigint)").bind(lock_number(key)).run();
      }
      work();
      execute("COMMIT");
      return;
    } catch (...) {
      try {
        if (connection_ != nullptr) execute("ROLLBACK");
      } catch (...) {  // NOLINT(bugprone-empty-catch): the server rolls back what has no client
        disconnect();
      }
      try {
        throw;
      } catch (const AskedAgain&) {
        if (tries < kTries) continue;
        throw Error(Fault::io, {"the database is too busy", place_,
                                "Too many clients change the same rows at once; try again."});
      }
    }
  }
}

void PostgresDatabase::transaction(std::string_view key, const std::function<void()>& work) {
  run_in("BEGIN", key, work);
}

void PostgresDatabase::snapshot(const std::function<void()>& work) {
  run_in("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", "", work);
}

}  // namespace tailor
