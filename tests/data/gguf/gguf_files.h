#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "data/gguf/header.h"

namespace tailor::gguf_tests {

inline fs::path golden(const std::string& name) {
  return fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name;
}

/// A folder that goes away, and a cache of its own.
class ScratchTest : public testing::Test {
 protected:
  ScratchTest() {
    std::string name = (fs::temp_directory_path() / "tailor_gguf.XXXXXX").string();
    folder_ = ::mkdtemp(name.data());
    ::setenv("TAILOR_CACHE", (folder_ / "cache").c_str(), 1);
  }
  ~ScratchTest() override {
    ::unsetenv("TAILOR_CACHE");
    std::error_code error;
    fs::remove_all(folder_, error);
  }
  fs::path copy_model(const std::string& name) const {
    const fs::path to = folder_ / name;
    fs::create_directories(to);
    for (const auto& entry : fs::directory_iterator(golden(name) / "model")) {
      fs::copy_file(entry.path(), to / entry.path().filename());
    }
    return to;
  }
  fs::path folder_;
};

/// Changes keys of a model's config.json.
inline void change_config(const fs::path& model, const Json& changes) {
  Json config = read_json(model / "config.json");
  for (const auto& [key, value] : changes.items()) config[key] = value;
  write_atomically(model / "config.json", config.dump(2));
}

inline std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

inline GgufHeader parse(const std::string& file) {
  return parse_gguf_header(bytes_of(file), "x.gguf");
}

/// The error a call ends with; fails where it does not.
inline Error error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no error";
  return Error(Fault::internal, {"none", "", ""});
}

}  // namespace tailor::gguf_tests
