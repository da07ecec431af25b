#include "recipes/advice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/recipes/planned.h"

namespace tailor {
namespace {

std::vector<Advice> advice_of(const PlannedRun& run) {
  return advise(run.recipe, run.model, run.machine, shipped_prices(), run.extras, run.plan);
}

/// The recipe again, with an advice's changes.
PlannedRun again(const std::string& recipe, std::vector<std::string> overrides,
                 const Advice& advice, const PlanExtras& extras) {
  overrides.insert(overrides.end(), advice.changes.begin(), advice.changes.end());
  return planned_run(recipe, overrides, extras);
}

// 15.36 M tokens in steps of 16 samples of 512 tokens: the analytic model gives 562 tokens/s and
// $9.04, with 64 samples 1,605 tokens/s and $3.17.
TEST(Advice, of_short_steps_is_longer_ones_with_what_they_save) {
  PlanExtras extras;
  extras.oracle_assumptions = true;
  const std::vector<std::string> overrides = {"data.sequence_len=512",
                                              "training.micro_batch_size=8",
                                              "training.gradient_accumulation_steps=2",
                                              "training.max_steps=1875",
                                              "lora.expert_rank=16",
                                              "base.non_expert_format=nf4"};
  const PlannedRun run = planned_run("maverick-a100", overrides, extras);
  ASSERT_EQ(run.plan.bound, Bound::link);
  const std::vector<Advice> advice = advice_of(run);
  ASSERT_FALSE(advice.empty());
  EXPECT_EQ(advice.front().what,
            "32,768 tokens per step instead of 8,192: 2.9x faster, $5.87 saved");
  EXPECT_THAT(advice.front().changes, testing::ElementsAre("training.gradient_accumulation_steps=8",
                                                           "training.max_steps=469"));
  EXPECT_THAT(advice.front().working, testing::HasSubstr("469 updates instead of 1,875"));
  const Plan then = again("maverick-a100", overrides, advice.front(), extras).plan;
  EXPECT_NEAR(*run.plan.usd.value - *then.usd.value, *advice.front().usd_saved, 1e-9);
  EXPECT_NEAR(*run.plan.hours.value / *then.hours.value, advice.front().times_faster, 1e-9);
}

TEST(Advice, says_nothing_where_nothing_is_a_tenth_faster) {
  EXPECT_TRUE(advice_of(planned_run("maverick-a100", {"training.max_steps=469"})).empty());
}

TEST(Advice, of_what_does_not_fit_names_keys_that_make_it_fit) {
  const std::vector<std::string> overrides = {"training.micro_batch_size=64",
                                              "training.gradient_accumulation_steps=1",
                                              "training.max_steps=100"};
  const PlannedRun run = planned_run("maverick-a100", overrides);
  ASSERT_FALSE(run.plan.fits);
  const std::vector<Advice> advice = advice_of(run);
  ASSERT_FALSE(advice.empty());
  for (const Advice& one : advice) {
    SCOPED_TRACE(one.what);
    EXPECT_THAT(one.what, testing::HasSubstr(": fits, "));
    EXPECT_TRUE(again("maverick-a100", overrides, one, {}).plan.fits);
  }
}

TEST(Advice, of_bfloat16_experts_is_what_makes_them_fit) {
  const std::vector<std::string> overrides = {"base.format=bf16",
                                              "base.non_expert_format=bf16",
                                              "training.micro_batch_size=32",
                                              "training.gradient_accumulation_steps=1",
                                              "lora.expert_rank=64",
                                              "lora.expert_state=memory"};
  const PlannedRun run = planned_run("maverick-a100", overrides);
  ASSERT_FALSE(run.plan.fits);
  const std::vector<Advice> advice = advice_of(run);
  ASSERT_FALSE(advice.empty());
  EXPECT_TRUE(again("maverick-a100", overrides, advice.front(), {}).plan.fits);
}

TEST(Advice, of_a_machine_that_never_holds_it_is_none) {
  PlannedRun run = planned_run("maverick-a100", {});
  run.machine.device_bytes = 4e9;
  run.plan = make_plan(run.recipe, run.model, run.machine, shipped_prices(), run.extras);
  ASSERT_FALSE(run.plan.fits);
  EXPECT_TRUE(advice_of(run).empty());
}

TEST(Advice, of_published_weights_on_disk_is_int4) {
  const PlannedRun run = planned_run("r1-1xh200", {"base.format=as_is", "training.max_steps=100"});
  const std::vector<Advice> advice = advice_of(run);
  const auto int4 = [](const Advice& one) {
    return one.changes == std::vector<std::string>{"base.format=int4"};
  };
  ASSERT_TRUE(std::any_of(advice.begin(), advice.end(), int4));
  // Without a price it is time that is saved.
  EXPECT_THAT(advice.front().what, testing::AllOf(testing::HasSubstr("x faster, "),
                                                  testing::Not(testing::HasSubstr("$"))));
}

TEST(FindMachine, knows_a_profile_by_its_only_beginning) {
  const fs::path folder = shipped_folder() / "machines";
  EXPECT_EQ(find_machine("4xh100", folder).name, "4xh100-80gb");
  for (const char* name : {"a100", "a100-40g", "4xh200", "", "../machines/cpu"}) {
    try {
      find_machine(name, folder);
      ADD_FAILURE() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.exit_code(), 2) << name;
      EXPECT_FALSE(error.parts().mend.empty());
    }
  }
}

}  // namespace
}  // namespace tailor
