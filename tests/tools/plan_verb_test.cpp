#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

using testing::HasSubstr;

TEST(PlanVerb, compares_machines_in_one_table) {
  const Sandbox box;
  const std::vector<std::string> asked = {"plan", "maverick-a100", "training.max_steps=469", "--on",
                                          "a100-40gb,a100-80gb,4xh100,1xh200"};
  const Outcome outcome = run_tailor(box, asked);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  for (const char* machine : {"a100-40gb", "a100-80gb", "4xh100-80gb", "1xh200"})
    EXPECT_THAT(outcome.out, HasSubstr(machine));
  EXPECT_THAT(outcome.out, HasSubstr("no spot price for sku 'h200-141gb-sxm'"));

  std::vector<std::string> json = asked;
  json.emplace_back("--json");
  const Json plans = Json::parse(run_tailor(box, json).out).at("plans");
  ASSERT_EQ(plans.size(), 4U);
  for (const Json& plan : plans)  // the same step on all of them
    EXPECT_EQ(plan.at("tokens_per_step").at("value"), 32'768);
  EXPECT_EQ(plans[2].at("machine"), "4xh100-80gb");
  EXPECT_EQ(plans[2].at("ranks"), 4);
  EXPECT_TRUE(plans[3].at("usd").at("value").is_null());
  // Each is what a plan for that machine alone says.
  const Json alone =
      Json::parse(run_tailor(box, {"plan", "maverick-a100", "--json", "training.max_steps=469",
                                   "machine.profile=4xh100-80gb", "machine.ranks=4",
                                   "training.gradient_accumulation_steps=2"})
                      .out);
  for (const char* name : {"seconds_per_step", "usd", "device_bytes_peak"})
    EXPECT_EQ(plans[2].at(name), alone.at(name)) << name;
}

TEST(PlanVerb, plans_recipes_side_by_side) {
  const Sandbox box;
  const Outcome outcome =
      run_tailor(box, {"plan", "maverick-a100", "r1-4xh100", "training.max_steps=100", "--json"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json plans = Json::parse(outcome.out).at("plans");
  ASSERT_EQ(plans.size(), 2U);
  EXPECT_EQ(plans[0].at("recipe"), "maverick-a100");
  EXPECT_EQ(plans[1].at("machine"), "4xh100-80gb");
  EXPECT_EQ(plans[1].at("steps").at("value"), 100);
}

TEST(PlanVerb, of_machines_that_hold_none_ends_with_66) {
  const Sandbox box;
  const Outcome outcome = run_tailor(
      box, {"plan", "maverick-a100", "training.micro_batch_size=256", "--on", "a100-40gb"});
  EXPECT_EQ(outcome.code, 66) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("device memory: "));
}

TEST(PlanVerb, shows_what_to_change) {
  const Sandbox box;
  const std::vector<std::string> asked = {
      "plan", "maverick-a100", "training.gradient_accumulation_steps=2", "training.max_steps=1875"};
  const Outcome outcome = run_tailor(box, asked);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("tokens per step instead of 8,192: "));
  EXPECT_THAT(outcome.out, HasSubstr("training.gradient_accumulation_steps="));
  const Outcome misfit = run_tailor(box, {"plan", "maverick-a100", "training.micro_batch_size=64"});
  EXPECT_EQ(misfit.code, 66);
  EXPECT_THAT(misfit.out, HasSubstr("would fit"));
}

}  // namespace
}  // namespace tailor::testing_support
