#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <string>

#include "base/file.h"
#include "data/checkpoint/model_spec.h"

namespace tailor::testing_support {

inline fs::path golden(const std::string& name) {
  return fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name;
}
inline ModelSpec spec_of(const std::string& fixture) {
  return read_model_spec(golden(fixture) / "model");
}

/// A test with an empty folder of its own.
class FolderTest : public testing::Test {
 protected:
  void SetUp() override {
    const testing::TestInfo& test = *testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::path(testing::TempDir()) / ("tailor_" + std::string(test.test_suite_name()) +
                                              "_" + std::to_string(::getpid()) + "_" + test.name());
    fs::remove_all(folder_);
    make_folders(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  fs::path folder_;
};

}  // namespace tailor::testing_support
