#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <string>

#include "base/clock.h"
#include "base/error.h"
#include "base/file.h"
#include "data/runs/ledger.h"
#ifdef TAILOR_TEST_POSTGRES
#include "tests/support/postgres_server.h"
#endif

namespace tailor {

/// A clock that stands still until told otherwise; its two times move apart where a test wants.
class ManualClock final : public Clock {
 public:
  std::int64_t unix_ms() const override { return unix_ms_; }
  std::int64_t steady_ms() const override { return steady_ms_; }
  void pass(std::int64_t ms) {
    unix_ms_ += ms;
    steady_ms_ += ms;
  }
  /// Someone set the wall clock.
  void jump(std::int64_t ms) { unix_ms_ += ms; }

 private:
  std::atomic<std::int64_t> unix_ms_{1'795'474'800'000};  // 2026-11-23T23:00:00Z
  std::atomic<std::int64_t> steady_ms_{5'000};
};

#ifdef TAILOR_TEST_POSTGRES
/// One server for the whole program, made by its main(); a database for each test.
extern PostgresServer* the_postgres;
#endif

/// The same tests are built twice: on SQLite, and in test_ledger_postgres on PostgreSQL.
class RunsTest : public testing::Test {
 protected:
#ifdef TAILOR_TEST_POSTGRES
  static constexpr bool kSqlite = false;
#else
  static constexpr bool kSqlite = true;
#endif
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) / ("tailor_runs_" + std::to_string(::getpid()));
    fs::remove_all(folder_);
    make_folders(folder_);
#ifdef TAILOR_TEST_POSTGRES
    static int count = 0;
    database_ = "ledger" + std::to_string(++count);
    place_ = the_postgres->make_database(database_);
#else
    place_ = (folder_ / "deep" / "er" / "ledger.db").string();
#endif
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::unique_ptr<Ledger> open() { return Ledger::open(place_, clock_); }

  static RunFacts run_facts(const std::string& name = "demo") {
    RunFacts facts;
    facts.name = name;
    facts.output_dir = "/tmp/runs/" + name;
    facts.base_model = "tiny-moe";
    facts.recipe_sha256 = "ab";
    facts.recipe_text = "base_model: tiny-moe\n";
    facts.code_version = "0.1.0";
    facts.seed = 42;
    return facts;
  }
  static AttemptFacts attempt_facts(std::int64_t from_step = 0) {
    AttemptFacts facts;
    facts.host = "n1";
    facts.device_kind = "cuda";
    facts.sku = "h100-80gb-sxm";
    facts.world_size = 4;
    facts.devices = 4;
    facts.usd_micros_per_device_hour = 2'690'000;
    facts.price_id = "runpod/h100-80gb-sxm/on-demand/2025-04-01";
    facts.price_kind = "on-demand";
    facts.price_source = "runpod.io/pricing, 2025-04-01";
    facts.resumed_from_step = from_step;
    return facts;
  }

  ManualClock clock_;
  fs::path folder_;
  std::string place_;
#ifdef TAILOR_TEST_POSTGRES
  std::string database_;
#endif
};

/// The Error that `act` must throw.
template <class Act>
Error error_of(const Act& act) {
  try {
    act();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return {Fault::internal, {}};
}

}  // namespace tailor
