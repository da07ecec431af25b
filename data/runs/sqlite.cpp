#include "data/runs/sqlite.h"

#include <sqlite3.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace tailor {
namespace {

constexpr int kBusyMilliseconds = 30'000;

}  // namespace

SqliteDatabase::SqliteDatabase(const fs::path& path, Mode mode) : path_(path) {
  if (mode == Mode::create && path.has_parent_path()) make_folders(path.parent_path());
  const int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_FULLMUTEX | SQLITE_OPEN_EXRESCODE |
                    (mode == Mode::create ? SQLITE_OPEN_CREATE : 0);
  try {
    const int code = sqlite3_open_v2(path.c_str(), &handle_, flags, nullptr);
    if (code != SQLITE_OK) fail(code, "cannot open");
    sqlite3_busy_timeout(handle_, kBusyMilliseconds);
    execute("PRAGMA journal_mode=TRUNCATE; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;");
  } catch (...) {
    sqlite3_close_v2(handle_);
    throw;
  }
}

SqliteDatabase::~SqliteDatabase() { sqlite3_close_v2(handle_); }

void SqliteDatabase::execute(const std::string& sql) {
  const int code = sqlite3_exec(handle_, sql.c_str(), nullptr, nullptr, nullptr);
  if (code != SQLITE_OK) fail(code, "cannot write");
}

void SqliteDatabase::transaction(const std::function<void()>& work) {
  run_in("BEGIN IMMEDIATE", work);
}

void SqliteDatabase::snapshot(const std::function<void()>& work) { run_in("BEGIN", work); }

void SqliteDatabase::run_in(const char* begin, const std::function<void()>& work) {
  execute(begin);
  try {
    work();
    execute("COMMIT");
  } catch (...) {
    // Fails harmlessly where SQLite has rolled back by itself, as it does when the disk is full.
    sqlite3_exec(handle_, "ROLLBACK", nullptr, nullptr, nullptr);
    throw;
  }
}

std::int64_t SqliteDatabase::last_row_id() const { return sqlite3_last_insert_rowid(handle_); }

void SqliteDatabase::fail(int code, std::string_view doing) const {
  const std::string said = handle_ != nullptr ? sqlite3_errmsg(handle_) : sqlite3_errstr(code);
  const int system_error = handle_ != nullptr ? sqlite3_system_errno(handle_) : 0;
  const std::string what = std::string(doing) + " the database: ";
  const std::string where = path_.string();
  switch (code & 0xFF) {
    case SQLITE_FULL:
      throw io_error(ENOSPC, std::string(doing) + " the database", where);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      throw Error(Fault::bad_file,
                  {what + said, where,
                   "Move the file aside, or restore it from a backup; a new one is made on the "
                   "next run. `sqlite3 FILE .recover` can save rows of a damaged database."});
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      throw Error(Fault::io,
                  {what + "another process has held it for over 30 s", where,
                   "See who has the file open (`fuser -v FILE`); on network disks without working "
                   "locks, keep the database on a local one."});
    case SQLITE_READONLY:
      throw Error(Fault::io, {what + said, where,
                              "Make the file and its folder writable, or name another file."});
    case SQLITE_CANTOPEN:
    case SQLITE_PERM:
    case SQLITE_IOERR:
      if (system_error != 0)
        throw io_error(system_error, std::string(doing) + " the database", where);
      throw Error(Fault::io, {what + said, where, "Check the path, its permissions and the disk."});
    default:
      throw Error(
          Fault::internal,
          {what + said, where, "This is a mistake in Tailor. Please report it with this text."});
  }
}

SqliteDatabase::Statement::Statement(SqliteDatabase& database, std::string_view sql)
    : database_(database) {
  const int code = sqlite3_prepare_v2(database_.handle_, sql.data(), static_cast<int>(sql.size()),
                                      &handle_, nullptr);
  if (code != SQLITE_OK) database_.fail(code, "cannot read");
}

SqliteDatabase::Statement::Statement(Statement&& other) noexcept
    : database_(other.database_),
      handle_(std::exchange(other.handle_, nullptr)),
      next_parameter_(other.next_parameter_) {}

SqliteDatabase::Statement::~Statement() { sqlite3_finalize(handle_); }

SqliteDatabase::Statement& SqliteDatabase::Statement::bind(std::int64_t value) {
  TAILOR_CHECK(sqlite3_bind_int64(handle_, next_parameter_++, value) == SQLITE_OK);
  return *this;
}

SqliteDatabase::Statement& SqliteDatabase::Statement::bind(std::string_view value) {
  // A null pointer would bind NULL; the copy is SQLite's own. (SQLITE_TRANSIENT is a C cast.)
  const auto copy = reinterpret_cast<sqlite3_destructor_type>(std::intptr_t{-1});
  const char* data = value.data() != nullptr ? value.data() : "";
  TAILOR_CHECK(sqlite3_bind_text64(handle_, next_parameter_++, data, value.size(), copy,
                                   SQLITE_UTF8) == SQLITE_OK);
  return *this;
}

SqliteDatabase::Statement& SqliteDatabase::Statement::bind(
    const std::optional<std::int64_t>& value) {
  return value.has_value() ? bind(*value) : bind_null();
}

SqliteDatabase::Statement& SqliteDatabase::Statement::bind_null() {
  TAILOR_CHECK(sqlite3_bind_null(handle_, next_parameter_++) == SQLITE_OK);
  return *this;
}

bool SqliteDatabase::Statement::step() {
  const int code = sqlite3_step(handle_);
  if (code == SQLITE_ROW) return true;
  if (code == SQLITE_DONE) return false;
  database_.fail(code, sqlite3_stmt_readonly(handle_) != 0 ? "cannot read" : "cannot write");
}

void SqliteDatabase::Statement::run() {
  while (step()) {
  }
}

std::int64_t SqliteDatabase::Statement::integer(int column) const {
  return sqlite3_column_int64(handle_, column);
}

std::optional<std::int64_t> SqliteDatabase::Statement::integer_or_null(int column) const {
  if (sqlite3_column_type(handle_, column) == SQLITE_NULL) return std::nullopt;
  return integer(column);
}

std::string SqliteDatabase::Statement::text(int column) const {
  const unsigned char* data = sqlite3_column_text(handle_, column);
  if (data == nullptr) return {};
  return {reinterpret_cast<const char*>(data),
          static_cast<std::size_t>(sqlite3_column_bytes(handle_, column))};
}

}  // namespace tailor
