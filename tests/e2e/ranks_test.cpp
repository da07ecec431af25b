// Several ranks as a user starts them: one command, and what becomes of it when one of them dies.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

#include "base/clock.h"
#include "data/checkpoint/safetensors.h"
#include "tests/e2e/train_program.h"

namespace tailor {
namespace {

using namespace testing_support;
using ::testing::HasSubstr;

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
};

TEST_F(RanksProgram, any_number_of_ranks_does_what_one_does) {
  ASSERT_EQ(run(train("one", 1)).code, 0);
  const auto want = metrics("one");
  for (const int N : {2, 3}) {
    const std::string folder = "on" + std::to_string(N);
    const Finished done = run(train(folder, N, {"--json"}));
    ASSERT_EQ(done.code, 0) << done.err;
    const auto got = metrics(folder);
    ASSERT_EQ(got.size(), want.size());
    for (const auto& [step, line] : want) {
      EXPECT_NEAR(got.at(step).loss, line.loss, 1e-5 * line.loss) << N << " ranks, step " << step;
      EXPECT_NEAR(got.at(step).grad_norm, line.grad_norm, 1e-3 * line.grad_norm);
      EXPECT_EQ(got.at(step).all.at("tokens"), line.all.at("tokens"));
      EXPECT_GT(got.at(step).all.at("exchange_bytes").get<double>(), 0);
      EXPECT_GE(got.at(step).all.at("exchange_exposed_seconds").get<double>(), 0);
    }
    EXPECT_FALSE(want.begin()->second.all.contains("exchange_bytes"));
    const auto evals = eval_losses(folder), one = eval_losses("one");
    ASSERT_EQ(evals.size(), one.size());
    for (std::size_t i = 0; i < one.size(); ++i) EXPECT_NEAR(evals[i], one[i], 1e-5 * one[i]);
    EXPECT_LT(distance("one", folder), 1e-3);
    // Device time is that of all ranks.
    const Json summary = parse_json(done.out, "stdout");
    EXPECT_EQ(summary.at("status"), "succeeded");
    EXPECT_TRUE(fs::exists(work_ / folder / "report.html"));
    const Json manifest =
        read_json(work_ / folder / "checkpoints" / "step-00000012" / "manifest.json");
    EXPECT_EQ(manifest.at("shards").size(), static_cast<std::size_t>(N));
  }
}

TEST_F(RanksProgram, two_runs_of_one_rank_count_are_equal_to_the_bit) {
  ASSERT_EQ(run(train("a", 3)).code, 0);
  ASSERT_EQ(
      run(train("b", 3, {"base.format=bf16", "base.device_memory=0", "base.host_memory=0"})).code,
      0);
  EXPECT_EQ(read_text(work_ / "a/adapter/adapter_model.safetensors"),
            read_text(work_ / "b/adapter/adapter_model.safetensors"));
  EXPECT_EQ(losses(work_ / "a"), losses(work_ / "b"));
}

TEST_F(RanksProgram, a_rank_that_dies_ends_the_run_with_its_name_and_the_next_attempt_resumes) {
  ASSERT_EQ(run(train("whole", 2)).code, 0);
  const auto want = metrics("whole");
  const pid_t launcher = start(train("run", 2, {"training.max_steps=400"}));
  const pid_t second = process_of(launcher, 1);
  wait_for_step("run", 5);
  ASSERT_EQ(::kill(second, SIGKILL), 0);
  const double killed = seconds_now();
  const Finished ended = wait(launcher);
  EXPECT_LT(seconds_now() - killed, 30);
  EXPECT_EQ(ended.code, 69) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("rank 1"));
  const Finished resumed =
      run(train("run", 3, {"training.max_steps=12", "training.lr_scheduler=cosine", "--resume"}));
  ASSERT_EQ(resumed.code, 0) << resumed.err;
}

TEST_F(RanksProgram, an_interrupted_run_goes_on_with_another_number_of_ranks) {
  const std::vector<std::string> constant = {"training.lr_scheduler=constant",
                                             "training.warmup_ratio=0", "training.max_steps=30"};
  ASSERT_EQ(run(train("whole", 1, constant)).code, 0);
  const auto want = metrics("whole");
  const pid_t launcher = start(train("run", 3, constant));
  wait_for_step("run", 2);
  ::kill(launcher, SIGTERM);
  const Finished ended = wait(launcher);
  ASSERT_EQ(ended.code, 75) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("--resume"));
  std::vector<std::string> resume = train("run", 2, constant);
  // The rows of a step are those the run began with, also where nobody says so.
  std::erase(resume, "training.global_batch_rows=5");
  resume.push_back("--resume");
  const Finished done = run(resume);
  ASSERT_EQ(done.code, 0) << done.err;
  const auto got = metrics("run");
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [step, line] : want) {
    EXPECT_NEAR(got.at(step).loss, line.loss, 1e-5 * line.loss) << "step " << step;
  }
  EXPECT_LT(distance("whole", "run"), 1e-3);
}

TEST_F(RanksProgram, what_contradicts_itself_is_refused) {
  ::setenv("WORLD_SIZE", "2", 1);
  const Finished alone = run(train("run", 2));
  ::unsetenv("WORLD_SIZE");
  EXPECT_EQ(alone.code, 2) << alone.err;
  EXPECT_THAT(alone.err, HasSubstr("RANK"));
  EXPECT_FALSE(fs::exists(work_ / "run"));
}

}  // namespace
}  // namespace tailor
