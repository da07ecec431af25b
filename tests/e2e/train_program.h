#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <span>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "data/checkpoint/safetensors.h"

namespace tailor::testing_support {

inline constexpr const char* kModel = TAILOR_SOURCE_DIR "/tests/golden/llama4_maverick_tiny/model";

struct Finished {
  int code = 0;
  std::string out, err;
};

/// A tiny model, tokenised data and a recipe in a folder of its own, and the program to run on
/// them.
class TrainProgram : public testing::Test {
 protected:
  void SetUp() override {
    work_ = fs::path(testing::TempDir()) /
            ("tailor_e2e_" + std::to_string(::getpid()) + "_" +
             testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(work_);
    make_folders(work_);
    std::string lines;
    for (std::uint64_t row = 0; row < 40; ++row) {
      Json ids = Json::array();
      const std::uint64_t length = 6 + row % 17;
      for (std::uint64_t i = 0; i < length; ++i) {
        // Each token follows from the one before, so that there is something to learn.
        ids.push_back((row % 4 * 50 + i * 7) % 256);
      }
      lines += Json({{"input_ids", ids}}).dump() + "\n";
    }
    write_atomically(work_ / "rows.jsonl", lines);
    write_atomically(
        work_ / "recipe.yaml",
        "name: tiny\n"
        "base_model: " TAILOR_SOURCE_DIR
        "/tests/golden/llama4_maverick_tiny/model\n"
        "output_dir: " +
            (work_ / "run").string() +
            "\n"
            "lora: {rank: 4, alpha: 8, dropout: 0.1, targets: [all]}\n"
            "data: {train: [" +
            (work_ / "rows.jsonl").string() +
            "], validation: {split: 0.1}, sequence_len: 24}\n"
            "training: {micro_batch_size: 2, gradient_accumulation_steps: 2, num_epochs: 50, "
            "max_steps: 12, learning_rate: 5.0e-3, eval_every_steps: 5}\n"
            "compute: {dtype: bfloat16, threads: 1}\n"
            "checkpoint: {every_steps: 3}\n"
            "cost: {price: {usd_per_gpu_hour: 0.10}, ledger: " +
            (work_ / "ledger.db").string() + "}\n");
  }
  void TearDown() override { fs::remove_all(work_); }

  pid_t start(const std::vector<std::string>& arguments) {
    const pid_t child = ::fork();
    if (child != 0) return child;
    ::setenv("TAILOR_CACHE", (work_ / "cache").c_str(), 1);
    ::setenv("TAILOR_DATA", (work_ / "data").c_str(), 1);
    const int out = ::open((work_ / "out.txt").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    const int err = ::open((work_ / "err.txt").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    ::dup2(out, STDOUT_FILENO);
    ::dup2(err, STDERR_FILENO);
    std::vector<char*> argv;
    std::string program = TAILOR_BIN_DIR "/tailor";
    argv.push_back(program.data());
    std::vector<std::string> copies = arguments;
    for (std::string& argument : copies) argv.push_back(argument.data());
    argv.push_back(nullptr);
    ::execv(program.c_str(), argv.data());
    ::_exit(127);
  }
  Finished wait(pid_t child) {
    int status = 0;
    ::waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
            read_text(work_ / "out.txt"), read_text(work_ / "err.txt")};
  }
  Finished run(const std::vector<std::string>& arguments) { return wait(start(arguments)); }
  /// Changes a bit of the named tensor's data in the model of that folder.
  static void flip_bit(const fs::path& model, const std::string& tensor, std::int64_t at) {
    for (const auto& entry : fs::directory_iterator(model)) {
      if (entry.path().extension() != ".safetensors") continue;
      std::string bytes = read_text(entry.path());
      const auto header =
          parse_safetensors_header(std::as_bytes(std::span(bytes)), entry.path().string());
      const auto found = header.tensors.find(tensor);
      if (found == header.tensors.end()) continue;
      char& changed = bytes[static_cast<std::size_t>(found->second.offset + at)];
      changed = static_cast<char>(changed ^ 1);
      write_atomically(entry.path(), bytes);
      return;
    }
    FAIL() << "no tensor " << tensor;
  }

  std::string recipe() const { return (work_ / "recipe.yaml").string(); }

  /// Losses by step from a run's metrics.jsonl, as written.
  std::vector<std::string> losses(const fs::path& folder) {
    std::vector<std::string> out;
    for (const std::string& line : split(read_text(folder / "metrics.jsonl"), '\n')) {
      if (line.empty()) continue;
      const Json json = parse_json(line, "metrics.jsonl");
      if (json.contains("loss"))
        out.push_back(json.at("step").dump() + " " + json.at("loss").dump());
    }
    return out;
  }

  fs::path work_;
};

}  // namespace tailor::testing_support
