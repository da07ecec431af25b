#include <gtest/gtest.h>

#include "tests/data/runs/runs_fixture.h"

namespace tailor {
PostgresServer* the_postgres = nullptr;
}

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const std::string missing = tailor::PostgresServer::missing();
  if (!missing.empty()) {
    std::printf("skipped: %s\n", missing.c_str());
    return 77;
  }
  tailor::PostgresServer server;
  tailor::the_postgres = &server;
  return RUN_ALL_TESTS();
}
