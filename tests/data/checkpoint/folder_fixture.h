#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "data/checkpoint/safetensors.h"

namespace tailor::testing_support {

/// A folder of the test's own, gone afterwards.
class FolderTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) /
              ("tailor_checkpoint_" + std::to_string(::getpid()) + "_" +
               testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder_);
    make_folders(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  /// Tensors of float32 ones, each [2, 3] unless `shape` says otherwise.
  static void write_ones(const fs::path& path, const std::vector<std::string>& names,
                         const std::vector<std::int64_t>& shape = {2, 3}) {
    std::int64_t elements = 1;
    for (const std::int64_t size : shape) elements *= size;
    const std::vector<float> ones(static_cast<std::size_t>(elements), 1.0F);
    std::vector<TensorToWrite> tensors;
    for (const std::string& name : names) {
      tensors.push_back({name, Dtype::f32, shape, std::as_bytes(std::span(ones))});
    }
    write_safetensors(path, tensors);
  }

  fs::path folder_;
};

/// The text of the Error that `body` throws, with `folder` written as DIR; its fault must be
/// `fault`.
template <class Body>
std::string error_of(const Body& body, const fs::path& folder = {}, Fault fault = Fault::bad_file) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), fault) << to_text(error);
    std::string text = to_text(error);
    const std::string name = folder.string();
    for (std::size_t at = 0; !name.empty() && (at = text.find(name, at)) != std::string::npos;) {
      text.replace(at, name.size(), "DIR");
    }
    return text;
  }
  return "no error";
}

}  // namespace tailor::testing_support
