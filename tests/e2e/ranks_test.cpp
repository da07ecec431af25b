// Several ranks as a user starts them: one command, and what becomes of it when one of them dies.

#include "tests/e2e/ranks_program.h"

namespace tailor {
namespace {

using namespace testing_support;
using ::testing::HasSubstr;

TEST_F(RanksProgram, any_number_of_ranks_does_what_one_does) {
  ASSERT_EQ(run(train("one", 1)).code, 0);
  const auto want = metrics("one");
  for (const int N : {2, 3}) {
    const std::string folder = "on" + std::to_string(N);
    const Finished done = run(train(folder, N, {"--json"}));
    ASSERT_EQ(done.code, 0) << done.err;
    SCOPED_TRACE(folder);
    const auto got = metrics(folder);
    expect_same_losses(got, want);
    if (HasFatalFailure()) return;
    for (const auto& [step, line] : want) {
      EXPECT_NEAR(got.at(step).grad_norm, line.grad_norm, 1e-3 * line.grad_norm);
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
  expect_same_losses(metrics("run"), want);
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
