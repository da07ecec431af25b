#pragma once

#include "data/runs/sql_database.h"

struct pg_conn;
struct pg_result;

namespace tailor {

/// A PostgreSQL database by its address, "postgresql://user@host:port/database?..."; what the
/// address leaves open comes from PGPASSWORD, ~/.pgpass and the other places libpq looks in. Tables
/// live in the schema `tailor`. Connects when first used, and again after the connection was lost:
/// a server that is away, hangs or answers late is Error{io} after `patience_ms`. Where an error
/// comes out of a commit, the rows may be there or not.
class PostgresDatabase final : public SqlDatabase {
 public:
  /// Throws Error{usage} for an address that libpq cannot read.
  explicit PostgresDatabase(std::string address, int patience_ms = 30'000);
  ~PostgresDatabase() override;

  Dialect dialect() const noexcept override { return Dialect::postgres; }
  std::string place() const override { return place_; }
  bool has_table(std::string_view name) override;
  std::optional<std::string> any_table() override;
  Statement prepare(std::string_view sql) override;
  void execute(const std::string& sql) override;
  /// Of one key one after the other, by an advisory lock. Done again after a serialisation failure
  /// or a deadlock.
  void transaction(std::string_view key, const std::function<void()>& work) override;
  void snapshot(const std::function<void()>& work) override;

 private:
  class PostgresCursor;
  /// A result that clears itself.
  struct Clear {
    void operator()(pg_result* result) const noexcept;
  };
  using Result = std::unique_ptr<pg_result, Clear>;

  void connect();
  void disconnect() noexcept;
  void begin(const std::string& statement);
  void run_in(const std::string& begin, std::string_view key, const std::function<void()>& work);
  /// Waits for what was sent; the last result.
  Result receive();
  void wait_for_socket(bool to_write);
  [[noreturn]] void fail(const pg_result* result);
  [[noreturn]] void lost(const std::string& why);

  std::string address_, place_;
  int patience_ms_;
  std::int64_t deadline_ms_ = 0;
  pg_conn* connection_ = nullptr;
};

}  // namespace tailor
