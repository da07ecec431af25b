#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/recipes/planned.h"

namespace tailor {
namespace {

const std::vector<std::string> kSteps = {"training.max_steps=469"};

const JobPhase& phase_of(const Plan& plan, const std::string& name) {
  for (const JobPhase& phase : plan.phases) {
    if (phase.name == name) return phase;
  }
  throw std::out_of_range(name);
}

TEST(PlanJob, has_download_packing_and_loading_of_their_own) {
  const PlannedRun run = planned_run("maverick-a100", kSteps);
  const Plan& plan = run.plan;
  // 400.7 B bfloat16 parameters over 1 Gbit/s, packed by 16 cores, 210 GB loaded at 7 GB/s.
  EXPECT_NEAR(*phase_of(plan, "download").seconds, 801.4e9 / 125e6, 5);
  EXPECT_NEAR(*phase_of(plan, "packing").seconds, 801.4e9 / (16 * 0.25e9), 0.5);
  EXPECT_NEAR(*phase_of(plan, "loading").seconds, 209.7e9 / 7e9, 0.1);
  double in = 0, all = 0;
  for (const JobPhase& phase : plan.phases) {
    EXPECT_FALSE(phase.working.empty()) << phase.name;
    EXPECT_NEAR(*phase.usd, *phase.seconds / 3600 * 1.19, 1e-9) << phase.name;
    all += *phase.seconds / 3600;
    if (phase.in_hours) in += *phase.seconds / 3600;
  }
  EXPECT_DOUBLE_EQ(*plan.hours.value, in);
  EXPECT_DOUBLE_EQ(*plan.hours_with_preparation.value, all);
  EXPECT_NEAR(*plan.usd_with_preparation.value, all * 1.19, 1e-9);
  for (const Figure* figure : {&plan.hours, &plan.gpu_hours, &plan.usd})
    EXPECT_THAT(figure->working, testing::HasSubstr("download and packing are not in"));
  EXPECT_THAT(plan.usd_with_preparation.working, testing::HasSubstr("are in"));
}

TEST(PlanJob, prepares_only_what_is_not_there) {
  PlanExtras extras;
  extras.weights_here = true;
  const Plan weights = planned_run("maverick-a100", kSteps, extras).plan;
  EXPECT_EQ(*phase_of(weights, "download").seconds, 0);
  EXPECT_GT(*phase_of(weights, "packing").seconds, 0);
  extras.store_here = true;
  const Plan store = planned_run("maverick-a100", kSteps, extras).plan;
  EXPECT_EQ(*phase_of(store, "packing").seconds, 0);
  EXPECT_DOUBLE_EQ(*store.hours.value, *store.hours_with_preparation.value);
  EXPECT_THAT(store.hours.working, testing::HasSubstr("nothing to download or to pack"));
}

TEST(PlanJob, has_both_tiers_or_the_reason) {
  const Plan h100 = planned_run("r1-4xh100", kSteps).plan;
  ASSERT_EQ(h100.tiers.size(), 2U);
  EXPECT_NEAR(*h100.tiers[0].usd.value, *h100.gpu_hours.value * 2.69, 1e-9);
  EXPECT_NEAR(*h100.tiers[1].usd.value, *h100.gpu_hours.value * 4.76, 1e-9);
  EXPECT_EQ(h100.tiers[1].tier, "on-demand");
  const Plan h200 = planned_run("r1-1xh200", kSteps).plan;
  EXPECT_FALSE(h200.usd.value);
  EXPECT_THAT(h200.usd.working, testing::HasSubstr("no price for sku 'h200-141gb-sxm'"));
  for (const TierCost& tier : h200.tiers) {
    EXPECT_FALSE(tier.usd.value);
    EXPECT_THAT(tier.usd.working, testing::HasSubstr(tier.tier + " price for sku"));
  }
  EXPECT_TRUE(plan_json(h200).at("tiers")[0].at("usd_per_gpu_hour").is_null());
}

TEST(PlanJob, does_not_compute_padding) {
  PlanExtras full, half;
  full.data = DataStats{7500, 15'360'000, 0, 0, 15'360'000, 0};
  half.data = DataStats{7500, 7'680'000, 0, 0, 7'680'000, 0};
  const Plan all = planned_run("maverick-a100", {}, full).plan;
  const Plan some = planned_run("maverick-a100", {}, half).plan;
  EXPECT_EQ(*all.steps.value, *some.steps.value);
  EXPECT_LT(*some.seconds_per_step.value, *all.seconds_per_step.value);
  // Half the tokens are fewer than hide the stream: the link takes over.
  EXPECT_EQ(some.bound, Bound::link);
  EXPECT_NEAR(*some.tokens_per_second.value,
              *some.tokens_per_step.value / 2 / *some.seconds_per_step.value, 1e-9);
  EXPECT_EQ(*some.device_bytes_peak.value, *all.device_bytes_peak.value)
      << "memory is for full rows";
  const auto named = [](const PlanDifference& term) {
    return term.name == "rows that are not full";
  };
  EXPECT_TRUE(std::any_of(some.differences.begin(), some.differences.end(), named));
}

TEST(PlanJob, without_steps_says_why_and_still_plans_the_preparation) {
  const Plan plan = planned_run("maverick-a100", {}).plan;
  EXPECT_FALSE(plan.hours_with_preparation.value);
  EXPECT_FALSE(phase_of(plan, "training").seconds);
  EXPECT_GT(*phase_of(plan, "download").usd, 0);
}

}  // namespace
}  // namespace tailor
