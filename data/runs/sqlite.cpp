#include "data/runs/sqlite.h"

#include <sqlite3.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace tailor {

class SqliteDatabase::SqliteCursor final : public SqlDatabase::Cursor {
 public:
  SqliteCursor(SqliteDatabase& database, std::string_view sql) : database_(database) {
    const int code = sqlite3_prepare_v2(database_.handle_, sql.data(), static_cast<int>(sql.size()),
                                        &handle_, nullptr);
    if (code != SQLITE_OK) database_.fail(code, "cannot read");
  }
  SqliteCursor(const SqliteCursor&) = delete;
  SqliteCursor& operator=(const SqliteCursor&) = delete;
  ~SqliteCursor() override { sqlite3_finalize(handle_); }

  void bind_integer(std::int64_t value) override {
    TAILOR_CHECK(sqlite3_bind_int64(handle_, next_parameter_++, value) == SQLITE_OK);
  }
  void bind_text(std::string_view value) override {
    // A null pointer would bind NULL; the copy is SQLite's own. (SQLITE_TRANSIENT is a C cast.)
    const auto copy = reinterpret_cast<sqlite3_destructor_type>(std::intptr_t{-1});
    const char* data = value.data() != nullptr ? value.data() : "";
    TAILOR_CHECK(sqlite3_bind_text64(handle_, next_parameter_++, data, value.size(), copy,
                                     SQLITE_UTF8) == SQLITE_OK);
  }
  void bind_null() override {
    TAILOR_CHECK(sqlite3_bind_null(handle_, next_parameter_++) == SQLITE_OK);
  }
  bool step() override {
    const int code = sqlite3_step(handle_);
    if (code == SQLITE_ROW) return true;
    if (code == SQLITE_DONE) return false;
    database_.fail(code, sqlite3_stmt_readonly(handle_) != 0 ? "cannot read" : "cannot write");
  }
  bool is_null(int column) const override {
    return sqlite3_column_type(handle_, column) == SQLITE_NULL;
  }
  std::int64_t integer(int column) const override { return sqlite3_column_int64(handle_, column); }
  std::string text(int column) const override {
    const unsigned char* data = sqlite3_column_text(handle_, column);
    if (data == nullptr) return {};
    return {reinterpret_cast<const char*>(data),
            static_cast<std::size_t>(sqlite3_column_bytes(handle_, column))};
  }

 private:
  SqliteDatabase& database_;
  sqlite3_stmt* handle_ = nullptr;
  int next_parameter_ = 1;
};

SqliteDatabase::SqliteDatabase(const fs::path& path, Mode mode, int patience_ms)
    : path_(path), patience_ms_(patience_ms) {
  if (mode == Mode::create && path.has_parent_path()) make_folders(path.parent_path());
  const int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_FULLMUTEX | SQLITE_OPEN_EXRESCODE |
                    (mode == Mode::create ? SQLITE_OPEN_CREATE : 0);
  try {
    const int code = sqlite3_open_v2(path.c_str(), &handle_, flags, nullptr);
    if (code != SQLITE_OK) fail(code, "cannot open");
    sqlite3_busy_timeout(handle_, patience_ms_);
    execute("PRAGMA journal_mode=TRUNCATE; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;");
  } catch (...) {
    sqlite3_close_v2(handle_);
    throw;
  }
}

SqliteDatabase::~SqliteDatabase() { sqlite3_close_v2(handle_); }

bool SqliteDatabase::has_table(std::string_view name) {
  return prepare("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?").bind(name).step();
}

std::optional<std::string> SqliteDatabase::any_table() {
  auto row = prepare("SELECT name FROM sqlite_master LIMIT 1");
  if (!row.step()) return std::nullopt;
  return row.text(0);
}

SqlDatabase::Statement SqliteDatabase::prepare(std::string_view sql) {
  return Statement(std::make_unique<SqliteCursor>(*this, sql));
}

void SqliteDatabase::execute(const std::string& sql) {
  const int code = sqlite3_exec(handle_, sql.c_str(), nullptr, nullptr, nullptr);
  if (code != SQLITE_OK) fail(code, "cannot write");
}

void SqliteDatabase::transaction(std::string_view /*key*/, const std::function<void()>& work) {
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
                  {what + "another process has held it for over " +
                       std::to_string(patience_ms_ / 1000) + " s",
                   where,
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
}  // namespace tailor
