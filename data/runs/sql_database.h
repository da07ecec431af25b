#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace tailor {

/// One connection to a database that several processes write to, any of which may be killed. What
/// SQLite and PostgreSQL have in common, as far as the ledger needs it. Not for several threads at
/// once. Failures are Errors that name place(): Fault::io where trying again later may help.
///
///   database.transaction(run, [&] {
///     database.prepare("INSERT INTO event (run, text) VALUES (?, ?)").bind(run).bind(text).run();
///   });
class SqlDatabase {
 public:
  /// A statement under way; parameters are written `?`.
  class Cursor {
   public:
    virtual ~Cursor() = default;
    virtual void bind_integer(std::int64_t value) = 0;
    virtual void bind_text(std::string_view value) = 0;
    virtual void bind_null() = 0;
    virtual bool step() = 0;
    virtual bool is_null(int column) const = 0;
    virtual std::int64_t integer(int column) const = 0;
    virtual std::string text(int column) const = 0;
  };

  class Statement {
   public:
    explicit Statement(std::unique_ptr<Cursor> cursor) : cursor_(std::move(cursor)) {}

    /// Parameters in order, from the first.
    Statement& bind(std::int64_t value) {
      cursor_->bind_integer(value);
      return *this;
    }
    Statement& bind(int value) { return bind(std::int64_t{value}); }
    Statement& bind(std::string_view value) {
      cursor_->bind_text(value);
      return *this;
    }
    Statement& bind(const std::optional<std::int64_t>& value) {
      if (value.has_value()) return bind(*value);
      cursor_->bind_null();
      return *this;
    }
    /// The next row, or false after the last one.
    bool step() { return cursor_->step(); }
    /// Runs a statement that gives no rows.
    void run() {
      while (step()) {
      }
    }
    std::int64_t integer(int column) const { return cursor_->integer(column); }
    std::optional<std::int64_t> integer_or_null(int column) const {
      if (cursor_->is_null(column)) return std::nullopt;
      return cursor_->integer(column);
    }
    std::string text(int column) const { return cursor_->text(column); }

   private:
    std::unique_ptr<Cursor> cursor_;
  };

  enum class Dialect { sqlite, postgres };

  SqlDatabase() = default;
  SqlDatabase(const SqlDatabase&) = delete;
  SqlDatabase& operator=(const SqlDatabase&) = delete;
  virtual ~SqlDatabase() = default;

  virtual Dialect dialect() const noexcept = 0;
  /// A path, or an address without its password.
  virtual std::string place() const = 0;
  virtual bool has_table(std::string_view name) = 0;
  /// The name of some table that is there, or nothing.
  virtual std::optional<std::string> any_table() = 0;

  virtual Statement prepare(std::string_view sql) = 0;
  /// One or several statements without parameters or rows.
  virtual void execute(const std::string& sql) = 0;
  /// Runs `work` in a transaction and rolls back when it throws; when this returns the rows are on
  /// the disk. Those of one `key` happen one after the other; `work` may be called again where the
  /// database asks for that.
  virtual void transaction(std::string_view key, const std::function<void()>& work) = 0;
  /// Runs `work` on one consistent state, without waiting for writers to finish their work.
  virtual void snapshot(const std::function<void()>& work) = 0;
};

}  // namespace tailor
