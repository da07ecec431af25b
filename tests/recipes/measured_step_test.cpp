#include "recipes/measured_step.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "recipes/plan.h"
#include "recipes/read.h"
#include "recipes/step_cost.h"

namespace tailor {
namespace {

using testing::HasSubstr;

const fs::path kRecipes = fs::path(TAILOR_SOURCE_DIR) / "recipes";

/// Two layers of each kind out of 15, measured on 800 tokens of which 400 carried loss.
MeasuredStep measured() {
  MeasuredStep out;
  out.date = "2026-11-29T02:00:00Z";
  out.threads = 2;
  out.tokens = 800;
  out.trained_tokens = 400;
  out.layer_flops_per_token = 1;  // set to the recipe's by plan_with()
  out.parameters = 1;
  out.layers = {{"dense", 2, 15, 0.002, 0.004}, {"mixture", 2, 15, 0.003, 0.007}};
  out.head_seconds = 0.05;
  out.update_seconds = 0.01;
  out.disk_bytes_per_second = 2e9;
  out.pass_bytes = 1e8;
  out.tokens_max = 1'024;
  out.process_bytes = 3e8;
  return out;
}

ModelFacts demo() {
  ModelSpec spec;
  spec.family = Family::llama4;
  spec.hidden = 576;
  spec.heads = 9;
  spec.kv_heads = 3;
  spec.head_dim = 64;
  spec.vocab = 49152;
  spec.dense_width = 1536;
  spec.expert_width = spec.shared_width = 768;
  spec.experts = 8;
  spec.experts_per_token = 1;
  spec.layers.resize(30);
  for (std::size_t i = 1; i < 30; i += 2) spec.layers[i].moe = true;
  return model_facts(spec, "demo");
}

struct Planned {
  Recipe recipe;
  Plan plan;
  Machine machine;
};
/// demo-maverick with overrides, as `step` was measured; `disk` reads so many bytes a second.
Planned plan_with(MeasuredStep step, const std::vector<std::string>& overrides,
                  const std::optional<DataStats>& data = std::nullopt, double disk = 1e9) {
  RecipeFile file = read_recipe(kRecipes / "demo-maverick.yaml", overrides);
  resolve(file, demo().traits());
  PlanExtras extras;
  extras.at_unix_ms = 1'772'800'000'000;
  extras.data = data;
  Calibration calibration{0, step.source(), step.busy_share > 0.15};
  calibration.step = std::move(step);
  extras.calibration = std::move(calibration);
  Planned out{file.recipe, {}, find_machine("cpu", kRecipes / "machines")};
  out.machine.disk_bytes_per_second = disk;
  out.plan = make_plan(file.recipe, demo(), out.machine, PriceBook::read(kRecipes / "prices.yaml"),
                       extras);
  return out;
}

/// As measured for that very recipe: its own arithmetic and factors.
MeasuredStep measured_for(const std::vector<std::string>& overrides) {
  RecipeFile file = read_recipe(kRecipes / "demo-maverick.yaml", overrides);
  resolve(file, demo().traits());
  MeasuredStep out = measured();
  const TokenFlops flops = token_flops(file.recipe, demo(), true);
  out.layer_flops_per_token = flops.total() - 2 * flops.head;
  out.parameters = static_cast<double>(count_lora(file.recipe, demo()).total());
  return out;
}

TEST(MeasuredStep, of_the_whole_model_is_the_sum_of_its_layers) {
  const MeasuredStep step = measured();
  EXPECT_DOUBLE_EQ(step.forward_seconds(), 15 * 0.002 + 15 * 0.003);
  EXPECT_DOUBLE_EQ(step.backward_seconds(), 15 * 0.004 + 15 * 0.007);
  EXPECT_EQ(step.measured_layers(), 4);
  EXPECT_THAT(step.source(), HasSubstr("4 of 30 layers measured on this machine on 2026-11-29"));
}

TEST(MeasuredStep, comes_back_from_its_file_and_nothing_else_does) {
  MeasuredStep step = measured();
  step.stream = MeasuredStep::Stream{0.5, 0.4};
  const MeasuredStep again = read_measured_step(to_json(step), "file");
  EXPECT_EQ(to_json(again), to_json(step));
  EXPECT_DOUBLE_EQ(again.stream->over(), 1.25);
  for (const char* key :
       {"tokens", "layers", "head_seconds", "process_bytes", "measured", "row_counts"}) {
    Json broken = to_json(step);
    broken.erase(key);
    EXPECT_THROW(read_measured_step(broken, "file"), Error) << key;
  }
  for (const double bad : {0.0, -1.0}) {
    Json broken = to_json(step);
    broken["layers"][0]["forward_seconds"] = bad;
    EXPECT_THROW(read_measured_step(broken, "file"), Error) << bad;
  }
}

TEST(MeasuredStep, is_the_plans_step_for_as_many_tokens) {
  // 1,024 positions a step, full rows whose tokens all carry loss.
  const Planned full = plan_with(measured_for({}), {});
  const double more = 1024.0 / 800;
  const double layers = 0.075 + 0.165;
  EXPECT_NEAR(*full.plan.seconds_per_step.value, more * layers + 1024.0 / 400 * 0.05 + 0.01, 1e-12);
  EXPECT_EQ(full.plan.bound, Bound::compute);
  EXPECT_THAT(full.plan.seconds_per_step.working, HasSubstr("15 dense x (0.00200 + 0.00400)"));
  EXPECT_THAT(full.plan.seconds_per_step.working, HasSubstr("4 of 30 layers measured"));
  EXPECT_THAT(full.plan.warnings, testing::IsEmpty());
  EXPECT_EQ(full.plan.items.front().name, "process");
  EXPECT_EQ(full.plan.items.front().bytes, 3e8);
  // Rows four fifths full, half of whose tokens carry loss: what was measured.
  DataStats data;
  data.rows = 10;
  data.tokens = 2'000;  // of 2,560 positions
  data.trained_tokens = 1'000;
  const Planned same = plan_with(measured_for({}), {}, data);
  EXPECT_NEAR(*same.plan.seconds_per_step.value, layers + 0.05 + 0.01, 1e-12);
  EXPECT_NEAR(*same.plan.tokens_per_second.value, 800 / (layers + 0.06), 1e-9);
}

TEST(MeasuredStep, is_carried_over_to_what_advice_changes) {
  const MeasuredStep step = measured_for({});
  const double update = 0.01, head = 1024.0 / 400 * 0.05;
  const double once = *plan_with(step, {}).plan.seconds_per_step.value;
  // Twice the rows: all but the update twice.
  EXPECT_NEAR(
      *plan_with(step, {"training.gradient_accumulation_steps=2"}).plan.seconds_per_step.value,
      2 * (once - update) + update, 1e-12);
  // Recomputing costs what the arithmetic says, in the layers alone.
  const Planned again = plan_with(step, {"compute.keep_activations=none"});
  const TokenFlops flops = token_flops(again.recipe, demo(), false);
  const double ratio = (flops.total() - 2 * flops.head) / step.layer_flops_per_token;
  EXPECT_GT(ratio, 1.2);
  EXPECT_NEAR(*again.plan.seconds_per_step.value, ratio * (once - update - head) + head + update,
              1e-9);
  // Packed experts were not unpacked when it was measured.
  const Planned packed = plan_with(step, {"base.format=int4"});
  EXPECT_THAT(packed.plan.seconds_per_step.working, HasSubstr(" + dequantise "));
  EXPECT_GT(*packed.plan.seconds_per_step.value, once);
}

TEST(MeasuredStep, that_streams_waits_pass_by_pass_and_pays_for_reading_beside_computing) {
  const std::vector<std::string> overrides = {"base.format=int4", "base.device_memory=0",
                                              "base.host_memory=0"};
  MeasuredStep step = measured_for(overrides);
  step.dequantising = true;
  step.stream = MeasuredStep::Stream{0.44, 0.4};
  const double more = 1024.0 / 800, head = 1024.0 / 400 * 0.05;
  const double forward = more * 0.075 + head, backward = more * 0.165;
  const Planned planned = plan_with(step, overrides, std::nullopt, 1.3e9);
  const double of_head = base_bytes(planned.recipe, demo()).head;
  const double bytes = *planned.plan.stream_bytes_per_step.value;
  const double read_forward = (bytes + of_head) / 2 / 1.3e9;
  ASSERT_GT(read_forward, forward);
  ASSERT_LT((bytes - of_head) / 2 / 1.3e9, backward);
  EXPECT_NEAR(*planned.plan.seconds_per_step.value, (read_forward + backward) * 1.1 + 0.01, 1e-9);
  EXPECT_THAT(planned.plan.seconds_per_step.working, HasSubstr("x 1.100, measured"));
  EXPECT_THAT(planned.plan.seconds_per_step.working, testing::Not(HasSubstr("dequantise")));
}

TEST(MeasuredStep, knows_what_passes_take_and_adds_the_layers_that_were_not_measured) {
  const auto item_of = [](const Plan& plan, const std::string& name) {
    for (const MemoryItem& entry : plan.items) {
      if (entry.home == MemoryItem::Home::host && entry.name == name) return entry.bytes;
    }
    return 0.0;
  };
  MeasuredStep all = measured_for({});
  all.layers[0].measured = all.layers[1].measured = 15;
  const Plan plan = plan_with(all, {}).plan;
  EXPECT_NEAR(item_of(plan, "activations and scratch"), 1e8, 1);
  EXPECT_EQ(item_of(plan, "kept activations"), 0);
  // Twice the tokens take twice as much.
  EXPECT_NEAR(item_of(plan_with(all, {"training.gradient_accumulation_steps=2"}).plan,
                      "activations and scratch"),
              2e8, 1);
  // Of 26 layers that were not measured, what the formula says that they keep.
  MeasuredStep none = measured_for({});
  none.kept = false;  // another kind of step: all by formula
  const Plan formula = plan_with(none, {}).plan;
  EXPECT_EQ(item_of(formula, "activations and scratch"), 0);
  const double kept = item_of(formula, "kept activations") + item_of(formula, "kept layer inputs");
  EXPECT_GT(kept, 1e8);
  EXPECT_NEAR(item_of(plan_with(measured_for({}), {}).plan, "activations and scratch"),
              1e8 + kept * 26 / 30, 1);
}

TEST(MeasuredStep, grows_with_the_numbers_of_rows_that_the_run_meets) {
  MeasuredStep step = measured();
  EXPECT_EQ(step.kernels_after(100), 0);
  step.kernel_bytes = 1e6;
  step.row_counts = {1, 2, 4, 7, 9};  // after 1, 2, 4, 8 and 16 steps
  EXPECT_DOUBLE_EQ(step.kernels_after(1), 0);
  EXPECT_DOUBLE_EQ(step.kernels_after(4), 2e6);
  EXPECT_DOUBLE_EQ(step.kernels_after(6), 3.5e6);
  EXPECT_DOUBLE_EQ(step.kernels_after(16), 7e6);
  EXPECT_DOUBLE_EQ(step.kernels_after(1e9), 7e6);
  step.evaluation_row_counts = 4;
  EXPECT_DOUBLE_EQ(step.kernels_after(16), 9e6);
}

TEST(MeasuredStep, of_a_busy_machine_comes_with_a_warning) {
  MeasuredStep step = measured_for({});
  step.busy_share = 0.5;
  EXPECT_THAT(plan_with(step, {}).plan.warnings,
              testing::ElementsAre(HasSubstr("while others used this machine")));
}

}  // namespace
}  // namespace tailor
