#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <regex>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/file.h"
#include "base/json.h"

namespace tailor::testing_support {

/// A folder of its own for one test, with caches and ledger of its own; removed at the end.
class Sandbox {
 public:
  Sandbox() {
    std::string name = (fs::temp_directory_path() / "tailor-cli-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    root_ = fs::canonical(name);
    make_folders(root_ / "cache");
    write_text("cache/machine-calibration.json",
               R"({"gflops_bfloat16": 200.0, "gflops_float32": 100.0, "measured": "2026-11-23"})");
  }
  Sandbox(const Sandbox&) = delete;
  Sandbox& operator=(const Sandbox&) = delete;
  ~Sandbox() {
    std::error_code error;
    fs::remove_all(root_, error);
  }

  const fs::path& root() const { return root_; }
  void write_text(const std::string& name, std::string_view text) const {
    make_folders((root_ / name).parent_path());
    FileWriter file(root_ / name);
    file.write(text);
    file.close();
  }
  /// A copy of a golden model, to be damaged.
  void copy_model(const std::string& golden, const std::string& name) const {
    fs::copy(fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / golden / "model", root_ / name,
             fs::copy_options::recursive);
  }

 private:
  fs::path root_;
};

struct Outcome {
  int code = -1;  ///< exit code; 128 + signal when killed
  std::string out, err;
  double seconds = 0;
};

struct RunOptions {
  bool as_nobody = false;  ///< give up root, so that permissions count
  std::string out;         ///< file that stdout goes to instead
};

/// Runs `tailor` in the sandbox. In its texts the sandbox is BOX, the sources are SRC.
inline Outcome run_tailor(const Sandbox& box, const std::vector<std::string>& arguments,
                          const RunOptions& options = {}) {
  const std::string program = std::string(TAILOR_BIN_DIR) + "/tailor";
  const fs::path out = options.out.empty() ? box.root() / ".out" : fs::path(options.out);
  const fs::path err = box.root() / ".err";
  const double start = seconds_now();
  const pid_t child = ::fork();
  if (child == 0) {
    const int to = ::open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    const int error_to = ::open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    ::dup2(to, STDOUT_FILENO);
    ::dup2(error_to, STDERR_FILENO);
    if (::chdir(box.root().c_str()) != 0) ::_exit(126);
    ::setenv("TAILOR_CACHE", (box.root() / "cache").c_str(), 1);
    ::setenv("TAILOR_DATA", (box.root() / "data").c_str(), 1);
    ::setenv("HF_HUB_CACHE", (box.root() / "hub").c_str(), 1);
    ::unsetenv("TAILOR_RECIPES");
    if (options.as_nobody && (::setgid(65534) != 0 || ::setuid(65534) != 0)) ::_exit(126);
    std::vector<std::string> words = {program};
    words.insert(words.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    ::execv(program.c_str(), argv.data());
    ::_exit(126);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  Outcome outcome;
  outcome.seconds = seconds_now() - start;
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  const auto normal = [&](std::string text) {
    for (const auto& [from, to] : {std::pair{box.root().string(), std::string("BOX")},
                                   std::pair{std::string(TAILOR_SOURCE_DIR), std::string("SRC")}}) {
      for (std::size_t at = text.find(from); at != std::string::npos; at = text.find(from, at)) {
        text.replace(at, from.size(), to);
      }
    }
    // Temporary files are named by the process.
    return std::regex_replace(text, std::regex(R"(\.staging\.\d+\.\d+)"), ".staging");
  };
  if (options.out.empty()) outcome.out = normal(read_text(out));
  outcome.err = normal(read_text(err));
  return outcome;
}

}  // namespace tailor::testing_support
