#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <thread>

#include "base/clock.h"
#include "data/checkpoint/safetensors.h"
#include "tests/e2e/train_program.h"
#include "tests/support/rank_processes.h"

namespace tailor::testing_support {

/// Runs of several ranks.
class RanksProgram : public TrainProgram {
 protected:
  std::vector<std::string> train(const std::string& folder, int ranks,
                                 std::vector<std::string> more = {}) const {
    std::vector<std::string> words = {"train",
                                      recipe(),
                                      "machine.ranks=" + std::to_string(ranks),
                                      "compute.dtype=float32",
                                      "training.global_batch_rows=5",
                                      "output_dir=" + (work_ / folder).string()};
    words.insert(words.end(), more.begin(), more.end());
    return words;
  }

  struct Line {
    double loss = 0, grad_norm = 0;
    Json all;
  };
  std::map<std::int64_t, Line> metrics(const std::string& folder) const {
    std::map<std::int64_t, Line> out;
    for (const std::string& text : split(read_text(work_ / folder / "metrics.jsonl"), '\n')) {
      if (text.empty()) continue;
      const Json json = parse_json(text, "metrics.jsonl");
      if (!json.contains("loss")) continue;
      out[json.at("step").get<std::int64_t>()] = {json.at("loss"), json.at("grad_norm"), json};
    }
    return out;
  }
  /// The same steps with the same losses, but for the order in which ranks add.
  static void expect_same_losses(const std::map<std::int64_t, Line>& got,
                                 const std::map<std::int64_t, Line>& want) {
    ASSERT_EQ(got.size(), want.size());
    for (const auto& [step, line] : want) {
      EXPECT_NEAR(got.at(step).loss, line.loss, 1e-5 * line.loss) << "step " << step;
      EXPECT_EQ(got.at(step).all.at("tokens"), line.all.at("tokens")) << "step " << step;
    }
  }
  std::vector<double> eval_losses(const std::string& folder) const {
    std::vector<double> out;
    for (const std::string& text : split(read_text(work_ / folder / "metrics.jsonl"), '\n')) {
      if (text.empty()) continue;
      const Json json = parse_json(text, "metrics.jsonl");
      if (json.contains("eval_loss")) out.push_back(json.at("eval_loss"));
    }
    return out;
  }

  /// Relative distance of two adapters' tensors.
  double distance(const std::string& a, const std::string& b) const {
    const auto values = [&](const std::string& folder) {
      const MappedFile file(work_ / folder / "adapter/adapter_model.safetensors");
      const auto header = parse_safetensors_header(file.bytes(), "adapter");
      std::map<std::string, std::vector<float>> out;
      for (const auto& [name, tensor] : header.tensors) {
        std::vector<float>& to = out[name];
        to.resize(static_cast<std::size_t>(tensor.elements()));
        std::memcpy(to.data(), file.bytes().data() + tensor.offset, to.size() * sizeof(float));
      }
      return out;
    };
    const auto left = values(a), right = values(b);
    EXPECT_EQ(left.size(), right.size());
    double difference = 0, size = 0;
    for (const auto& [name, x] : left) {
      const auto& y = right.at(name);
      for (std::size_t i = 0; i < x.size(); ++i) {
        difference += std::pow(static_cast<double>(x[i]) - y[i], 2);
        size += std::pow(static_cast<double>(x[i]), 2);
      }
    }
    return std::sqrt(difference / size);
  }

  /// The process of rank `rank` below the launcher `parent`, once it is there.
  static pid_t process_of(pid_t parent, int rank) {
    const double until = seconds_now() + 30;
    while (seconds_now() < until) {
      std::ifstream list("/proc/" + std::to_string(parent) + "/task/" + std::to_string(parent) +
                         "/children");
      pid_t child = 0;
      while (list >> child) {
        std::ifstream file("/proc/" + std::to_string(child) + "/environ", std::ios::binary);
        std::ostringstream text;
        text << file.rdbuf();
        const std::string environment = '\0' + text.str();
        const std::string wanted = std::string(1, '\0') + "RANK=" + std::to_string(rank) + '\0';
        if (environment.find(wanted) != std::string::npos) return child;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    ADD_FAILURE() << "rank " << rank << " does not start";
    return 0;
  }
  void wait_for_step(const std::string& folder, int step) const {
    const double until = seconds_now() + 60;
    while (seconds_now() < until) {
      if (fs::exists(work_ / folder / "metrics.jsonl") &&
          static_cast<int>(metrics(folder).size()) >= step) {
        return;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    ADD_FAILURE() << "step " << step << " does not come";
  }

  /// The ranks of a run, each started by hand as another machine's would be, so that each may have
  /// a command, variables and a folder of its own.
  class Group {
   public:
    /// Waits for all but `except`.
    bool wait(double seconds, int except = -1) { return processes.wait(seconds, except); }
    RankProcesses processes;
    int port = free_port();
  };
  /// `command`: what is to start the program.
  void start_rank(Group& group, int rank, int size, const std::vector<std::string>& arguments,
                  const RankProcesses::Variables& more = {},
                  std::vector<std::string> command = {}) const {
    RankProcesses::Variables variables = {{"RANK", std::to_string(rank)},
                                          {"LOCAL_RANK", std::to_string(rank)},
                                          {"WORLD_SIZE", std::to_string(size)},
                                          {"LOCAL_WORLD_SIZE", std::to_string(size)},
                                          {"MASTER_ADDR", "127.0.0.1"},
                                          {"MASTER_PORT", std::to_string(group.port)},
                                          {"TAILOR_CACHE", (work_ / "cache").string()},
                                          {"TAILOR_DATA", (work_ / "data").string()}};
    for (const auto& [name, value] : more) variables[name] = value;
    command.emplace_back(TAILOR_BIN_DIR "/tailor");
    command.insert(command.end(), arguments.begin(), arguments.end());
    group.processes.start(command, variables);
  }
};

}  // namespace tailor::testing_support
