#include "recipes/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "recipes/read.h"
#include "recipes/ring.h"
#include "recipes/step_cost.h"

namespace tailor {
namespace {

const fs::path kRecipes = fs::path(TAILOR_SOURCE_DIR) / "recipes";
constexpr std::int64_t kDay = 1'772'800'000'000;  // 2026-03-06

const ModelFacts& maverick() {
  static const ModelFacts facts =
      read_model_facts("meta-llama/Llama-4-Maverick-17B-128E-Instruct", kRecipes / "models");
  return facts;
}
const ModelFacts& r1() {
  static const ModelFacts facts = read_model_facts("deepseek-ai/DeepSeek-R1", kRecipes / "models");
  return facts;
}
const PriceBook& prices() {
  static const PriceBook book = PriceBook::read(kRecipes / "prices.yaml");
  return book;
}

/// The shipped recipe with overrides, resolved and planned.
struct Planned {
  RecipeFile file;
  Plan plan;
};
Planned plan_of(const std::string& recipe, std::vector<std::string> overrides,
                const ModelFacts& model, const std::string& profile, PlanExtras extras = {}) {
  Planned out{read_recipe(kRecipes / recipe, overrides), {}};
  resolve(out.file, model.traits());
  if (extras.at_unix_ms == 0) extras.at_unix_ms = kDay;
  out.plan = make_plan(out.file.recipe, model, find_machine(profile, kRecipes / "machines"),
                       prices(), extras);
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

double device_item(const Plan& plan, const std::string& name) {
  for (const MemoryItem& item : plan.items) {
    if (item.home == MemoryItem::Home::device && item.name == name) return item.bytes;
  }
  return 0;
}

// Published totals of the text model: 400.7 B parameters, 386.5 B of them in routed experts, 16.15
// B (17 B with the embedding and vision) active.
TEST(ModelFacts, of_maverick_are_as_published) {
  const ModelFacts& model = maverick();
  EXPECT_EQ(model.layers, 48);
  EXPECT_EQ(model.moe_layers, 24);
  EXPECT_NEAR(static_cast<double>(model.total_parameters()) / 1e9, 400.71, 0.005);
  EXPECT_NEAR(static_cast<double>(model.routed_parameters()) / 1e9, 386.55, 0.005);
  EXPECT_NEAR(static_cast<double>(model.other_parameters()) / 1e9, 12.10, 0.005);
  EXPECT_NEAR(static_cast<double>(model.active_parameters()) / 1e9, 16.15, 0.005);
  EXPECT_EQ(model.expert_parameters(), 3 * 5120 * 8192);
}

// docs/models.md: 671.03 B parameters, 653.91 B of them in routed experts, 36.62 B a token.
TEST(ModelFacts, of_r1_are_as_published) {
  const ModelFacts& model = r1();
  EXPECT_NEAR(static_cast<double>(model.total_parameters()) / 1e9, 671.03, 0.005);
  EXPECT_NEAR(static_cast<double>(model.routed_parameters()) / 1e9, 653.91, 0.005);
  EXPECT_NEAR(static_cast<double>(model.other_parameters()) / 1e9, 15.26, 0.005);
  EXPECT_NEAR(static_cast<double>(model.active_parameters()) / 1e9, 36.62, 0.005);
  EXPECT_EQ(model.attention_names,
            (std::vector<std::string>{"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
                                      "o_proj"}));
  EXPECT_EQ(model.attention_kept, 2112 + 128 * 128 + 7168);
  EXPECT_EQ(model.published, BaseFormat::fp8);
}

TEST(ModelFacts, of_several_shared_experts_are_one_wide_mlp) {
  Json config = read_json(kRecipes / "models/deepseek-ai--DeepSeek-R1.json");
  config["n_shared_experts"] = 2;
  const ModelFacts model = model_facts(config, "config.json", "two shared");
  EXPECT_EQ(model.shared_experts, 2);
  EXPECT_EQ(model.shared_width(), 4096);
  EXPECT_EQ(model.total_parameters() - r1().total_parameters(), 58LL * 3 * 7168 * 2048);
  Recipe recipe = plan_of("r1-4xh100.yaml", {}, r1(), "4xh100-80gb").file.recipe;
  recipe.lora.targets = {false, false, true, false, false, {}};
  EXPECT_EQ(count_lora(recipe, model).total(), 58LL * 3 * 16 * (7168 + 4096));
  config["q_lora_rank"] = nullptr;
  const ModelFacts direct = model_facts(config, "config.json", "no latent of queries");
  EXPECT_EQ(direct.attention_names.front(), "q_proj");
  EXPECT_EQ(direct.attention.front().out, 128 * 192);
  EXPECT_EQ(direct.attention.front().in, 7168);
}

TEST(ModelFacts, of_a_dense_distill) {
  const ModelFacts model =
      read_model_facts("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", kRecipes / "models");
  EXPECT_EQ(model.experts, 0);
  EXPECT_EQ(model.dense_layers, 28);
  // Vectors aside: a norm before each half of a layer and one at the end, and biases.
  EXPECT_EQ(model.total_parameters(), 7'615'616'512 - 57 * 3584 - 28 * (3584 + 2 * 512));
}

TEST(ModelFacts, an_unknown_model_names_the_download_command) {
  try {
    read_model_facts("someone/no-such-model", kRecipes / "models");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.parts().mend, testing::HasSubstr("hf download someone/no-such-model"));
  }
}

TEST(MatrixBytes, follow_the_formats) {
  const ModelFacts& model = maverick();
  const MatrixShape gate{8192, 5120};
  const double n = 8192.0 * 5120;
  EXPECT_DOUBLE_EQ(matrix_bytes(model, gate, BaseFormat::as_is, {}), 2 * n);
  EXPECT_DOUBLE_EQ(matrix_bytes(model, gate, BaseFormat::int4, {}), n * 0.515625);
  EXPECT_DOUBLE_EQ(matrix_bytes(model, gate, BaseFormat::int4, 32), n * 0.5625);
  EXPECT_DOUBLE_EQ(matrix_bytes(model, gate, BaseFormat::nf4, {}), n * 0.515869140625);
  EXPECT_DOUBLE_EQ(matrix_bytes(model, gate, BaseFormat::fp8, {}), n + 4.0 * 64 * 40);
  // 36 inputs: no group of 128, 64 or 32 fits, so one group a row, codes padded to 40.
  EXPECT_DOUBLE_EQ(matrix_bytes(model, {10, 36}, BaseFormat::int4, {}), 10 * (20 + 2));
  // 96 inputs: groups of 32.
  EXPECT_DOUBLE_EQ(matrix_bytes(model, {10, 96}, BaseFormat::int4, {}), 10 * (48 + 3 * 2));
}

TEST(LoraCounts, of_maverick_follow_the_shapes) {
  Planned planned = plan_of("maverick-a100.yaml", {}, maverick(), "a100-40gb");
  const LoraCounts counts = count_lora(planned.file.recipe, maverick());
  EXPECT_EQ(counts.experts, 24LL * 128 * 3 * 8 * (5120 + 8192));
  EXPECT_EQ(counts.attention, 48LL * 16 * (2 * 10240 + 2 * 6144));
  EXPECT_EQ(counts.other(), 65'273'856);
}

// docs/models.md has these: a unit of rank on all routed experts of R1 is 410.5 M parameters.
TEST(LoraCounts, of_r1_leave_kv_b_proj_to_those_who_name_it) {
  Planned planned = plan_of("r1-4xh100.yaml", {}, r1(), "4xh100-80gb");
  Recipe& recipe = planned.file.recipe;
  const LoraCounts counts = count_lora(recipe, r1());
  EXPECT_EQ(counts.experts, 410'517'504);
  const std::int64_t attention = (7168 + 1536) + (1536 + 24576) + (7168 + 576) + (16384 + 7168);
  EXPECT_EQ(counts.attention, 61 * 16 * attention);
  EXPECT_EQ(counts.dense_mlp, 3LL * 3 * 16 * (7168 + 18432));
  EXPECT_EQ(counts.shared_expert, 58LL * 3 * 16 * (7168 + 2048));
  recipe.lora.targets.modules = {"kv_b_proj", "gate"};
  const LoraCounts more = count_lora(recipe, r1());
  EXPECT_EQ(more.attention - counts.attention, 61LL * 16 * (512 + 32768));
  EXPECT_EQ(more.router, 58LL * 16 * (7168 + 256));
  // With it the whole of attention is what the streaming model reckons: 126.4 M at rank 16.
  EXPECT_NEAR(static_cast<double>(more.attention + more.dense_mlp + more.shared_expert) / 1e6,
              126.4, 0.05);
}

struct ShippedPlan {
  const char* recipe;
  const char* model;
  const char* profile;
};
class ShippedR1 : public testing::TestWithParam<ShippedPlan> {};

TEST_P(ShippedR1, fits_its_machine) {
  const auto& [recipe, name, profile] = GetParam();
  const ModelFacts model = read_model_facts(name, kRecipes / "models");
  const Planned planned =
      plan_of(std::string(recipe) + ".yaml", {"training.max_steps=100"}, model, profile);
  EXPECT_EQ(planned.file.recipe.machine.profile, profile);
  EXPECT_EQ(planned.file.recipe.base_model, name);
  EXPECT_TRUE(planned.plan.fits) << planned.plan.fits_working;
  const Machine machine = find_machine(profile, kRecipes / "machines");
  EXPECT_LT(*planned.plan.device_bytes_peak.value, machine.device_bytes);
  EXPECT_LT(*planned.plan.host_bytes_peak.value, machine.host_bytes);
  EXPECT_GT(*planned.plan.tokens_per_second.value, 0);
}
INSTANTIATE_TEST_SUITE_P(
    Recipe, ShippedR1,
    testing::Values(ShippedPlan{"r1-4xh100", "deepseek-ai/DeepSeek-R1", "4xh100-80gb"},
                    ShippedPlan{"r1-1xh200", "deepseek-ai/DeepSeek-R1", "1xh200"},
                    ShippedPlan{"r1-distill-qwen-7b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
                                "a100-40gb"}),
    [](const auto& entry) { return std::to_string(entry.index); });

TEST(Plan, of_r1_on_one_h200_reads_from_disk_what_ram_does_not_hold) {
  const Plan small = plan_of("r1-1xh200.yaml", {}, r1(), "1xh200").plan;
  EXPECT_GT(small.resident_fraction, 0.25);
  EXPECT_LT(small.resident_fraction, 0.5);
  const double beyond =
      337.17e9 * (1 - small.resident_fraction) - static_cast<double>(small.host_tile_bytes);
  EXPECT_GT(beyond, 10e9) << "256 GB do not hold what the card does not";
}

TEST(Plan, of_r1_on_the_cpu_keeps_latents) {
  const auto bytes_of = [](const ModelFacts& model, const std::string& name) {
    const Plan plan = plan_of("r1-1xh200.yaml",
                              {"compute.device=cpu", "compute.keep_activations=all",
                               "training.gradient_accumulation_steps=1"},
                              model, "cpu")
                          .plan;
    for (const MemoryItem& item : plan.items) {
      if (item.name == name) return item.bytes;
    }
    return 0.0;
  };
  const double attention = 61.0 * (2112 + 128 * 128 + 7168);
  const double mlp = 3.0 * 2 * 18432 + 58.0 * 2 * (1 + 8) * 2048;
  EXPECT_DOUBLE_EQ(bytes_of(r1(), "kept activations"), 4096 * 2 * (attention + mlp));
  // A micro-batch expands them: keys of 192 and a result of 128 in each of 128 heads, twice.
  ModelFacts grouped = r1();
  grouped.attention_expanded = 0;
  EXPECT_DOUBLE_EQ(
      bytes_of(r1(), "micro-batch workspace") - bytes_of(grouped, "micro-batch workspace"),
      4096 * 4 * 2.0 * 128 * (192 + 128));
}

// The analytic model of docs/planning.md at 512-token sequences, rank 16, expert rank 16,
// non-expert weights in NF4: 2k..128k tokens a step give 142, 562, 1605, 1680 and 1720 tokens/s.
struct Anchor {
  int rows;
  double tokens_per_second;
};
class MaverickOnA100 : public testing::TestWithParam<Anchor> {};

TEST_P(MaverickOnA100, goes_as_the_streaming_model_says) {
  const Plan plan = plan_of("maverick-a100.yaml",
                            {"data.sequence_len=512", "training.micro_batch_size=8",
                             "lora.expert_rank=16", "base.non_expert_format=nf4",
                             "training.global_batch_rows=" + std::to_string(GetParam().rows)},
                            maverick(), "a100-40gb")
                        .plan;
  EXPECT_TRUE(plan.fits) << plan.fits_working;
  EXPECT_NEAR(*plan.tokens_per_second.value, GetParam().tokens_per_second,
              0.01 * GetParam().tokens_per_second);
}
INSTANTIATE_TEST_SUITE_P(RowsAStep, MaverickOnA100,
                         testing::Values(Anchor{4, 142}, Anchor{16, 562.4}, Anchor{64, 1605.2},
                                         Anchor{128, 1680}, Anchor{256, 1720}),
                         [](const auto& entry) { return std::to_string(entry.param.rows); });

TEST(Plan, of_maverick_on_a100_has_the_known_items) {
  const Plan plan =
      plan_of("maverick-a100.yaml",
              {"data.sequence_len=512", "training.micro_batch_size=8", "lora.expert_rank=16",
               "base.non_expert_format=nf4", "training.global_batch_rows=64"},
              maverick(), "a100-40gb")
          .plan;
  const double percent = 0.01;
  EXPECT_NEAR(device_item(plan, "weights outside experts"), 6.24e9, percent * 6.24e9);
  EXPECT_NEAR(device_item(plan, "vocabulary head"), 2.069e9, percent * 2.07e9);
  EXPECT_NEAR(device_item(plan, "factors outside experts"), 1.175e9, percent * 1.17e9);
  EXPECT_NEAR(device_item(plan, "expert ring"), 1.099e9, percent * 1.1e9);
  EXPECT_NEAR(device_item(plan, "micro-batch workspace"), 1.342e9, percent * 1.34e9);
  EXPECT_NEAR(device_item(plan, "head chunk"), 1.241e9, percent * 1.24e9);
  EXPECT_NEAR(plan.resident_fraction, 0.1216, 0.002);
  EXPECT_NEAR(*plan.stream_bytes_per_step.value, 350.2e9, 1e9);
  EXPECT_NEAR(*plan.host_bytes_peak.value, 262.7e9, 2.7e9);
  EXPECT_NEAR(*plan.crossover_tokens_per_step.value, 23'295, 0.03 * 23'295);
  EXPECT_EQ(plan.bound, Bound::compute);
}

TEST(Plan, from_disk_is_bound_by_the_disk) {
  const Plan plan =
      plan_of("maverick-a100.yaml",
              {"data.sequence_len=512", "training.micro_batch_size=8", "lora.expert_rank=16",
               "base.non_expert_format=nf4", "training.global_batch_rows=64", "base.host_memory=0"},
              maverick(), "a100-40gb")
          .plan;
  EXPECT_EQ(plan.bound, Bound::disk);
  EXPECT_NEAR(*plan.tokens_per_second.value, 652, 0.01 * 652);
}

TEST(Plan, four_h100_all_gathering_maverick_bill_four_devices) {
  const Planned planned =
      plan_of("maverick-a100.yaml", {"machine.ranks=4", "training.max_steps=100"}, maverick(),
              "4xh100-80gb");
  const Plan& plan = planned.plan;
  EXPECT_TRUE(plan.fits) << plan.fits_working;
  EXPECT_DOUBLE_EQ(*plan.gpu_hours.value, 4 * *plan.hours.value);
  EXPECT_NEAR(*plan.usd.value, *plan.gpu_hours.value * 2.69, 1e-9);
  EXPECT_EQ(plan.price.kind, "spot");
}

TEST(Plan, without_data_and_max_steps_says_why_there_is_no_price) {
  const Plan plan = plan_of("maverick-a100.yaml", {}, maverick(), "a100-40gb").plan;
  EXPECT_FALSE(plan.steps.value || plan.hours.value || plan.gpu_hours.value || plan.usd.value);
  EXPECT_THAT(plan.steps.working, testing::HasSubstr("training.max_steps"));
  const Json json = plan_json(plan);
  EXPECT_TRUE(json["usd"]["value"].is_null());
  EXPECT_THAT(json["usd"]["working"].get<std::string>(), testing::HasSubstr("not tokenised"));
}

TEST(Plan, with_data_counts_epochs_and_prices_them) {
  PlanExtras extras;
  extras.data = DataStats{7500, 15'360'000, 0, 0};
  const Plan plan =
      plan_of("maverick-a100.yaml", {"training.num_epochs=1"}, maverick(), "a100-40gb", extras)
          .plan;
  EXPECT_DOUBLE_EQ(*plan.steps.value, std::ceil(7500.0 / 16));
  EXPECT_NEAR(*plan.hours.value, 2.7, 0.15);
  EXPECT_NEAR(*plan.usd.value, *plan.hours.value * 1.19, 1e-9);
}

TEST(Plan, evaluations_are_in_the_hours) {
  const auto hours_of = [](std::int64_t validation_rows, std::vector<std::string> overrides) {
    PlanExtras extras;
    extras.data = DataStats{7500, 15'360'000, 0, validation_rows};
    overrides.push_back("training.num_epochs=1");
    return plan_of("maverick-a100.yaml", overrides, maverick(), "a100-40gb", extras).plan.hours;
  };
  const double without = *hours_of(0, {}).value, few = *hours_of(75, {}).value,
               twice = *hours_of(150, {}).value;
  EXPECT_GT(few, without);
  EXPECT_NEAR(twice - without, 2 * (few - without), 1e-9);
  // 469 steps: after every 50th and after the last.
  EXPECT_THAT(hours_of(75, {}).working, testing::HasSubstr("10 evaluations x "));
  EXPECT_THAT(hours_of(75, {"training.eval_every_steps=0"}).working,
              testing::HasSubstr("1 evaluation x "));
  EXPECT_THAT(hours_of(0, {"data.validation=null"}).working, testing::HasSubstr("no evaluation"));
}

TEST(Plan, json_has_every_promised_figure_with_its_working) {
  const Json json = plan_json(plan_of("demo-maverick.yaml", {}, demo(), "cpu").plan);
  for (const char* name :
       {"fits", "device_bytes_peak", "host_bytes_peak", "disk_bytes", "stream_bytes_per_step",
        "tokens_per_step", "seconds_per_step", "tokens_per_second", "crossover_tokens_per_step",
        "steps", "hours", "gpu_hours", "usd", "bound"}) {
    ASSERT_TRUE(json.contains(name)) << name;
    EXPECT_TRUE(json[name].contains("value") && json[name].contains("unit")) << name;
    EXPECT_FALSE(json[name]["working"].get<std::string>().empty()) << name;
  }
  EXPECT_TRUE(json["fits"]["value"].get<bool>());
  EXPECT_EQ(json["tokens_per_step"]["value"], 1024);
  EXPECT_EQ(json["steps"]["value"], 60);
}

TEST(Plan, on_the_cpu_is_flops_over_measured_speed) {
  PlanExtras extras;
  extras.calibration = Calibration{100, "measured", false};
  const Planned planned = plan_of("demo-maverick.yaml", {}, demo(), "cpu", extras);
  const double flops =
      token_flops(planned.file.recipe, demo(), planned.plan.keep_activations).total();
  EXPECT_NEAR(*planned.plan.seconds_per_step.value, flops * 1024 / 100e9, 1e-9);
  EXPECT_EQ(planned.plan.bound, Bound::compute);
  EXPECT_THAT(planned.plan.seconds_per_step.working, testing::HasSubstr("measured"));
  EXPECT_DOUBLE_EQ(planned.plan.resident_fraction, 1);
  EXPECT_DOUBLE_EQ(*planned.plan.stream_bytes_per_step.value, 0);
}

TEST(Plan, on_the_cpu_a_budget_of_zero_streams_the_head_once_and_layers_twice) {
  const Planned planned =
      plan_of("demo-maverick.yaml", {"base.device_memory=0", "base.host_memory=0"}, demo(), "cpu");
  const BaseBytes base = base_bytes(planned.file.recipe, demo());
  EXPECT_GT(base.embedding, 0);  // its rows are read by index
  EXPECT_NEAR(*planned.plan.stream_bytes_per_step.value,
              2 * (base.all() - base.embedding) - base.head, 1);
  EXPECT_TRUE(planned.plan.fits);
}

double host_item(const Plan& plan, const std::string& name) {
  for (const MemoryItem& item : plan.items) {
    if (item.home == MemoryItem::Home::host && item.name == name) return item.bytes;
  }
  return 0;
}

double disk_item(const Plan& plan, const std::string& name) {
  for (const MemoryItem& item : plan.items) {
    if (item.home == MemoryItem::Home::disk && item.name == name) return item.bytes;
  }
  return 0;
}

TEST(Plan, expert_state_on_disk_moves_its_bytes_and_lists_its_traffic) {
  const Planned memory = plan_of("demo-maverick.yaml", {"lora.expert_state=memory"}, demo(), "cpu");
  const LoraCounts lora = count_lora(memory.file.recipe, demo());
  const auto experts = static_cast<double>(lora.experts), other = static_cast<double>(lora.other());
  ASSERT_GT(experts, 0);
  EXPECT_EQ(memory.plan.expert_state, StateHome::memory);
  EXPECT_DOUBLE_EQ(*memory.plan.scratch_bytes_per_step.value, 0);
  EXPECT_EQ(disk_item(memory.plan, "expert state"), 0);

  const double value_bytes = memory.file.recipe.compute.dtype == ComputeType::float32 ? 4 : 2;
  const double each = value_bytes == 4 ? 16 : 18;  // in memory
  EXPECT_DOUBLE_EQ(host_item(memory.plan, "factors"), (experts + other) * each);
  const Plan disk = plan_of("demo-maverick.yaml", {"lora.expert_state=disk"}, demo(), "cpu").plan;
  EXPECT_EQ(disk.expert_state, StateHome::disk);
  EXPECT_DOUBLE_EQ(host_item(disk, "factors"), other * each);
  EXPECT_DOUBLE_EQ(disk_item(disk, "expert state"), experts * (16 + value_bytes));
  EXPECT_DOUBLE_EQ(*disk.scratch_bytes_per_step.value, experts * (36 + 2 * value_bytes));
  EXPECT_GE(*disk.disk_bytes.value, *memory.plan.disk_bytes.value + experts * 18);
  EXPECT_GE(*disk.seconds_per_step.value, *memory.plan.seconds_per_step.value);
  EXPECT_EQ(plan_json(disk).at("expert_state"), "disk");
  EXPECT_EQ(plan_json(disk).at("scratch_bytes_per_step").at("value"),
            std::llround(experts * (36 + 2 * value_bytes)));
}

TEST(Plan, chosen_experts_are_what_is_counted_and_an_adapter_holds_all) {
  RecipeFile file = plan_of("demo-maverick.yaml", {}, demo(), "cpu").file;
  const Machine machine = find_machine("cpu", kRecipes / "machines");
  PlanExtras extras;
  extras.at_unix_ms = kDay;
  const auto plan = [&] { return make_plan(file.recipe, demo(), machine, prices(), extras); };
  const Plan all = plan();
  const LoraCounts before = count_lora(file.recipe, demo());
  EXPECT_EQ(before.experts, before.all_experts);
  file.recipe.lora.chosen_experts = {30, 0.6};  // of 15 layers of 8
  const LoraCounts after = count_lora(file.recipe, demo());
  EXPECT_EQ(after.experts, 30 * before.per_expert);
  EXPECT_EQ(after.all_experts, before.all_experts);
  const Plan some = plan();
  EXPECT_DOUBLE_EQ(*all.trainable_parameters.value - *some.trainable_parameters.value,
                   static_cast<double>(90 * before.per_expert));
  EXPECT_THAT(some.trainable_parameters.working, testing::HasSubstr("in 30 of 120 routed experts"));
  EXPECT_LT(host_item(some, "factors"), host_item(all, "factors"));
  EXPECT_LT(disk_item(some, "checkpoints"), disk_item(all, "checkpoints"));
  EXPECT_EQ(disk_item(some, "adapter"), disk_item(all, "adapter")) << "zeros for the others";
  EXPECT_LE(*some.seconds_per_step.value, *all.seconds_per_step.value);
  EXPECT_LT(*some.flops_per_token.value, *all.flops_per_token.value);
}

TEST(Plan, expert_state_by_itself_goes_to_disk_where_memory_is_short) {
  const RecipeFile file =
      plan_of("demo-maverick.yaml", {"lora.expert_rank=4096"}, demo(), "cpu").file;
  PlanExtras extras;
  extras.at_unix_ms = kDay;
  Machine machine = find_machine("cpu", kRecipes / "machines");
  machine.host_bytes = 1e12;
  EXPECT_EQ(make_plan(file.recipe, demo(), machine, prices(), extras).expert_state,
            StateHome::memory);
  machine.host_bytes = 16e9;
  const Plan plan = make_plan(file.recipe, demo(), machine, prices(), extras);
  EXPECT_EQ(plan.expert_state, StateHome::disk);
  EXPECT_TRUE(plan.fits) << plan.fits_working;
  EXPECT_GT(disk_item(plan, "expert state"), machine.host_bytes);
  Recipe in_memory = file.recipe;
  in_memory.lora.expert_state = StateHome::memory;
  EXPECT_FALSE(make_plan(in_memory, demo(), machine, prices(), extras).fits);
  // A slow disk is then the brake.
  machine.disk_bytes_per_second = 10e6;
  const Plan slow = make_plan(file.recipe, demo(), machine, prices(), extras);
  EXPECT_EQ(slow.bound, Bound::disk);
  EXPECT_NEAR(*slow.seconds_per_step.value,
              (*slow.scratch_bytes_per_step.value + *slow.stream_bytes_per_step.value) / 10e6,
              1e-3);
}

TEST(Plan, layer_inputs_on_disk_leave_a_window_in_memory) {
  const Plan host =
      plan_of("demo-maverick.yaml", {"compute.keep_activations=none"}, demo(), "cpu").plan;
  const Plan disk =
      plan_of("demo-maverick.yaml", {"base.activations=disk", "compute.keep_activations=none"},
              demo(), "cpu")
          .plan;
  const double kept = host_item(host, "kept layer inputs");
  EXPECT_GT(kept, 0);
  EXPECT_DOUBLE_EQ(disk_item(disk, "kept layer inputs"), kept);
  EXPECT_DOUBLE_EQ(host_item(disk, "kept layer inputs in use"), kept / 10);
  EXPECT_DOUBLE_EQ(*disk.scratch_bytes_per_step.value, 2 * kept);
  EXPECT_NEAR(*host.host_bytes_peak.value - *disk.host_bytes_peak.value, 0.9 * kept, 1);
}

TEST(Plan, expert_state_on_disk_of_a_gpu_run_takes_no_ram_and_the_disks_time) {
  const Planned memory =
      plan_of("maverick-a100.yaml", {"lora.expert_state=memory"}, maverick(), "a100-40gb");
  const Plan disk =
      plan_of("maverick-a100.yaml", {"lora.expert_state=disk"}, maverick(), "a100-40gb").plan;
  const auto experts = static_cast<double>(count_lora(memory.file.recipe, maverick()).experts);
  EXPECT_DOUBLE_EQ(host_item(memory.plan, "expert factors and optimizer"), experts * 20);
  EXPECT_EQ(host_item(disk, "expert factors and optimizer"), 0);
  EXPECT_DOUBLE_EQ(host_item(disk, "expert factors in use"), experts * 20 / 12);
  EXPECT_DOUBLE_EQ(disk_item(disk, "expert state"), experts * 18);
  EXPECT_DOUBLE_EQ(*disk.scratch_bytes_per_step.value, experts * 40);
  EXPECT_GE(*disk.seconds_per_step.value, *memory.plan.seconds_per_step.value);
  EXPECT_EQ(plan_of("maverick-a100.yaml", {}, maverick(), "a100-40gb").plan.expert_state,
            StateHome::memory);
}

TEST(Plan, on_the_cpu_a_packed_store_costs_its_dequantising) {
  PlanExtras extras;
  extras.calibration = Calibration{100, "measured", false};
  const auto plan_with = [&](std::vector<std::string> overrides) {
    overrides.insert(overrides.end(), {"base.device_memory=0", "base.host_memory=0"});
    return plan_of("demo-maverick.yaml", overrides, demo(), "cpu", extras);
  };
  const Planned packed = plan_with({"base.format=int4"});
  const BaseBytes base = base_bytes(packed.file.recipe, demo());
  const ModelFacts model = demo();
  // 1,024 tokens meet all 8 experts; each pass reads the codes and writes bfloat16.
  const double moved = base.routed + 2 * static_cast<double>(model.routed_parameters());
  const double flops = token_flops(packed.file.recipe, model, packed.plan.keep_activations).total();
  const double busy = flops * 1024 / 100e9 + 2 * moved / 10e9;
  EXPECT_GT(busy, 2 * base.all() / 1e9);
  EXPECT_NEAR(*packed.plan.seconds_per_step.value, busy, 1e-9);
  EXPECT_EQ(packed.plan.bound, Bound::compute);
  EXPECT_THAT(packed.plan.seconds_per_step.working, testing::HasSubstr("dequantise 2 passes x "));
  EXPECT_THAT(packed.plan.bound_working, testing::HasSubstr("dequantise "));
  EXPECT_DOUBLE_EQ(host_item(packed.plan, "dequantise scratch"), 3.0 * 576 * 768 * 2);
  // Slots for tiles of eight experts, for runs of the head, and two for the rest of a layer.
  const auto layer =
      static_cast<double>(model.attention_parameters() + model.dense_mlp_parameters());
  const double experts = 8 * base.expert;
  // Of the experts' slots those of three layers, a tile each, are written to.
  ASSERT_GT(std::floor(static_cast<double>(kRingBytes) / experts), 3);
  EXPECT_NEAR(host_item(packed.plan, "ring"), 3 * experts + 6 * 16777216.0 + 2 * 2 * layer, 64);

  // As published, nothing is unpacked; all of it packed, the largest piece is the dense MLP.
  const Plan plain = plan_with({}).plan;
  EXPECT_THAT(plain.seconds_per_step.working, testing::Not(testing::HasSubstr("dequantise")));
  EXPECT_EQ(host_item(plain, "dequantise scratch"), 0);
  const Plan all = plan_with({"base.format=nf4", "base.non_expert_format=nf4"}).plan;
  EXPECT_DOUBLE_EQ(host_item(all, "dequantise scratch"), 3.0 * 576 * 1536 * 2);

  // A slow disk is the brake all the same, and fewer tokens would not change that.
  Machine slow = find_machine("cpu", kRecipes / "machines");
  slow.disk_bytes_per_second = 10e6;
  extras.at_unix_ms = kDay;
  const Plan waiting = make_plan(packed.file.recipe, model, slow, prices(), extras);
  EXPECT_EQ(waiting.bound, Bound::disk);
  const double streamed = base.all() - base.embedding;  // rows of the embedding are read by index
  const double per_token = flops / 100e9, reading = (2 * streamed - base.head) / 10e6;
  EXPECT_NEAR(*waiting.seconds_per_step.value, reading, 1e-6);
  EXPECT_DOUBLE_EQ(*waiting.crossover_tokens_per_step.value,
                   std::ceil((reading - 2 * moved / 10e9) / per_token));
}

TEST(Plan, names_what_does_not_fit_and_what_to_change) {
  const Plan plan =
      plan_of("maverick-a100.yaml", {"training.micro_batch_size=64"}, maverick(), "a100-40gb").plan;
  ASSERT_FALSE(plan.fits);
  const Error error = does_not_fit(plan);
  EXPECT_EQ(error.exit_code(), 66);
  EXPECT_THAT(error.parts().what, testing::StartsWith("device memory: "));
  EXPECT_THAT(error.parts().mend, testing::HasSubstr("training.micro_batch_size"));
}

TEST(Plan, refuses_more_resident_bytes_than_there_are) {
  const Plan plan =
      plan_of("maverick-a100.yaml", {"base.device_memory=39GiB"}, maverick(), "a100-40gb").plan;
  ASSERT_FALSE(plan.fits);
  EXPECT_THAT(plan.misfits.front().mend, testing::StartsWith("Set base.device_memory: "));
}

TEST(Plan, refuses_more_ranks_than_devices) {
  EXPECT_THROW(plan_of("maverick-a100.yaml", {"machine.ranks=2"}, maverick(), "a100-40gb"), Error);
}

TEST(Plan, is_never_slower_with_more_tokens_a_step_or_a_faster_link) {
  double before = 0;
  for (const int rows : {2, 8, 32, 128, 512}) {
    const Plan plan =
        plan_of("maverick-a100.yaml",
                {"training.global_batch_rows=" + std::to_string(rows), "base.device_memory=0"},
                maverick(), "a100-40gb")
            .plan;
    EXPECT_GE(*plan.tokens_per_second.value, before);
    before = *plan.tokens_per_second.value;
  }
}

TEST(ShippedProfiles, can_all_be_read) {
  for (const auto& entry : fs::directory_iterator(kRecipes / "machines")) {
    const Machine machine = read_machine(entry.path());
    EXPECT_FALSE(machine.sku.empty()) << entry.path();
  }
  EXPECT_THROW(find_machine("a100-40g", kRecipes / "machines"), Error);
  const Machine here = this_machine(".");
  EXPECT_GE(here.cores, 1);
  EXPECT_GT(here.host_bytes, 0);
  EXPECT_GT(here.disk_free_bytes.value_or(0), 0);
}

}  // namespace
}  // namespace tailor
