#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "base/file.h"

struct sqlite3;
struct sqlite3_stmt;

namespace tailor {

/// One connection to an SQLite file, set up for several processes that write and may be killed:
/// journal_mode=TRUNCATE (WAL has a corruption bug before 3.51.3), synchronous=FULL, foreign keys
/// on, up to 30 s of waiting for another writer. Every failure is an Error that names the file.
///
///   SqliteDatabase database(path, SqliteDatabase::Mode::create);
///   database.transaction([&] {
///     database.prepare("INSERT INTO event(run, text) VALUES (?, ?)").bind(run).bind(text).run();
///   });
class SqliteDatabase {
 public:
  enum class Mode { create, existing };

  class Statement {
   public:
    Statement(SqliteDatabase& database, std::string_view sql);
    Statement(Statement&& other) noexcept;
    Statement(const Statement&) = delete;
    Statement& operator=(const Statement&) = delete;
    ~Statement();

    /// Parameters in order, from the first.
    Statement& bind(std::int64_t value);
    Statement& bind(std::string_view value);
    Statement& bind(const std::optional<std::int64_t>& value);
    Statement& bind_null();

    /// The next row, or false after the last one.
    bool step();
    /// Runs a statement that gives no rows.
    void run();

    std::int64_t integer(int column) const;
    std::optional<std::int64_t> integer_or_null(int column) const;
    std::string text(int column) const;

   private:
    SqliteDatabase& database_;
    sqlite3_stmt* handle_ = nullptr;
    int next_parameter_ = 1;
  };

  SqliteDatabase(const fs::path& path, Mode mode);
  SqliteDatabase(const SqliteDatabase&) = delete;
  SqliteDatabase& operator=(const SqliteDatabase&) = delete;
  ~SqliteDatabase();

  Statement prepare(std::string_view sql) { return {*this, sql}; }
  /// One or several statements without parameters or rows.
  void execute(const std::string& sql);
  /// Runs `work` inside BEGIN IMMEDIATE ... COMMIT; rolls back when it throws. When this returns
  /// the rows are on the disk.
  void transaction(const std::function<void()>& work);
  /// As transaction, but for reading one consistent state; does not wait for writers to finish
  /// their work, only for their commit.
  void snapshot(const std::function<void()>& work);

  std::int64_t last_row_id() const;
  const fs::path& path() const noexcept { return path_; }

 private:
  void run_in(const char* begin, const std::function<void()>& work);
  [[noreturn]] void fail(int code, std::string_view doing) const;

  fs::path path_;
  sqlite3* handle_ = nullptr;
};

}  // namespace tailor
