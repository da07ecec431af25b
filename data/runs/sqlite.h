#pragma once

#include "base/file.h"
#include "data/runs/sql_database.h"

struct sqlite3;

namespace tailor {

/// An SQLite file, set up for several processes that write and may be killed:
/// journal_mode=TRUNCATE (WAL has a corruption bug before 3.51.3), synchronous=FULL, foreign keys
/// on. Every failure is an Error that names the file.
class SqliteDatabase final : public SqlDatabase {
 public:
  enum class Mode { create, existing };

  /// `patience_ms`: how long another writer is waited for. The path ":memory:" keeps it in memory.
  SqliteDatabase(const fs::path& path, Mode mode, int patience_ms = 30'000);
  ~SqliteDatabase() override;

  Dialect dialect() const noexcept override { return Dialect::sqlite; }
  std::string place() const override { return path_.string(); }
  bool has_table(std::string_view name) override;
  std::optional<std::string> any_table() override;
  Statement prepare(std::string_view sql) override;
  void execute(const std::string& sql) override;
  /// BEGIN IMMEDIATE ... COMMIT, so all writers happen one after the other.
  void transaction(std::string_view key, const std::function<void()>& work) override;
  void snapshot(const std::function<void()>& work) override;

 private:
  class SqliteCursor;
  void run_in(const char* begin, const std::function<void()>& work);
  [[noreturn]] void fail(int code, std::string_view doing) const;

  fs::path path_;
  int patience_ms_;
  sqlite3* handle_ = nullptr;
};

}  // namespace tailor
