#include "recipes/stream_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "base/json.h"
#include "recipes/plan.h"
#include "recipes/read.h"

namespace tailor {
namespace {

const fs::path kRecipes = fs::path(TAILOR_SOURCE_DIR) / "recipes";

/// What make_stream_model_golden.py wrote.
const Json& golden() {
  static const Json json =
      read_json(fs::path(TAILOR_SOURCE_DIR) / "tests/recipes/golden/stream_model.json");
  return json;
}

double number(const Json& json, const char* key) { return json.at(key).get<double>(); }
std::string word(const Json& json, const char* key) { return json.at(key).get<std::string>(); }

/// A row's list under its names: number_of(row, "step")["t"].
std::map<std::string, double> named(const Json& row, const char* list) {
  std::map<std::string, double> out;
  const Json& names = golden().at("names").at(list);
  for (std::size_t i = 0; i < names.size(); ++i)
    out[names[i].get<std::string>()] = row.at(list)[i].get<double>();
  return out;
}

/// What can carry factors in a model that is known by its sizes alone.
void add_factors(ModelFacts& model) {
  const auto add = [&](const char* group, std::int64_t out, std::int64_t in) {
    model.factors.push_back({group, "", "", group == std::string("experts"), out, in, 1});
  };
  for (std::int64_t l = 0; l < model.layers; ++l) {
    const bool moe = l < model.moe_layers;
    for (const MatrixShape& shape : model.attention) add("attention", shape.out, shape.in);
    const std::int64_t width = moe ? model.shared_width() : model.dense_width;
    for (int i = 0; i < 3; ++i) {
      if (width > 0) add(moe ? "shared_expert" : "dense_mlp", width, model.hidden);
      if (moe) add("experts", model.expert_width, model.hidden);
    }
    if (moe) add("router", model.experts, model.hidden);
  }
}

const ModelFacts& facts(const std::string& name) {
  static std::map<std::string, ModelFacts> known;
  if (known.contains(name)) return known[name];
  const Json& model = golden().at("models").at(name);
  const auto integer = [&](const char* key) { return model.at(key).get<std::int64_t>(); };
  ModelFacts out;
  out.name = name;
  out.layers = integer("layers");
  out.hidden = integer("d");
  out.vocab = integer("vocab");
  out.heads = integer("heads");
  out.qk_dim = integer("d_qk");
  out.v_dim = integer("d_v");
  for (const Json& pair : model.at("attn_mats")) {
    out.attention.push_back({pair[1].get<std::int64_t>(), pair[0].get<std::int64_t>()});
    out.attention_names.push_back("projection_" + std::to_string(out.attention.size()));
  }
  out.moe_layers = integer("moe_layers");
  out.experts = integer("experts");
  out.top_k = integer("topk");
  out.expert_width = integer("ff_expert");
  out.shared_experts = integer("shared");
  out.dense_layers = integer("dense_layers");
  out.dense_width = integer("ff_dense");
  add_factors(out);
  return known[name] = out;
}

// The published configs, read as a user's are, describe the models the oracle has by hand.
TEST(ModelFacts, of_published_configs_are_the_oracles) {
  const std::map<std::string, std::string> published = {
      {"MAVERICK", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"},
      {"R1", "deepseek-ai/DeepSeek-R1"}};
  for (const auto& [name, repository] : published) {
    SCOPED_TRACE(name);
    const ModelFacts& oracle = facts(name);
    const ModelFacts ours = read_model_facts(repository, kRecipes / "models");
    EXPECT_EQ(ours.layers, oracle.layers);
    EXPECT_EQ(ours.hidden, oracle.hidden);
    EXPECT_EQ(ours.vocab, oracle.vocab);
    EXPECT_EQ(ours.heads, oracle.heads);
    EXPECT_EQ(ours.qk_dim, oracle.qk_dim);
    EXPECT_EQ(ours.v_dim, oracle.v_dim);
    ASSERT_EQ(ours.attention.size(), oracle.attention.size());
    ASSERT_EQ(ours.attention_names.size(), oracle.attention.size());
    for (std::size_t i = 0; i < oracle.attention.size(); ++i) {
      EXPECT_EQ(ours.attention[i].in, oracle.attention[i].in) << ours.attention_names[i];
      EXPECT_EQ(ours.attention[i].out, oracle.attention[i].out) << ours.attention_names[i];
    }
    EXPECT_EQ(ours.moe_layers, oracle.moe_layers);
    EXPECT_EQ(ours.experts, oracle.experts);
    EXPECT_EQ(ours.top_k, oracle.top_k);
    EXPECT_EQ(ours.expert_width, oracle.expert_width);
    EXPECT_EQ(ours.shared_experts, oracle.shared_experts);
    EXPECT_EQ(ours.dense_layers, oracle.dense_layers);
    EXPECT_EQ(ours.dense_width, oracle.dense_width);
    EXPECT_EQ(ours.tied_head, oracle.tied_head);
    EXPECT_EQ(ours.total_parameters(), oracle.total_parameters());
    EXPECT_EQ(ours.active_parameters(), oracle.active_parameters());
  }
}

const std::map<std::string, BaseFormat> kFormats = {{"int4_g128", BaseFormat::int4},
                                                    {"nf4_dq64", BaseFormat::nf4},
                                                    {"fp8_b128x128", BaseFormat::fp8},
                                                    {"bf16", BaseFormat::bf16}};
const std::map<BaseFormat, std::string> kWords = {{BaseFormat::int4, "int4"},
                                                  {BaseFormat::nf4, "nf4"},
                                                  {BaseFormat::fp8, "fp8"},
                                                  {BaseFormat::bf16, "bf16"}};
const std::map<std::string, std::string> kProfiles = {
    {"A100_40", "a100-40gb"}, {"A100_80", "a100-80gb"}, {"H100x4", "4xh100-80gb"}};

Node node_of(const std::string& name) {
  const Json& json = golden().at("nodes").at(name);
  Node node;
  node.ranks = number(json, "gpus");
  node.peak_flops = number(json, "peak");
  node.flops_per_second = number(json, "peak") * number(json, "eta");
  node.device_bytes = number(json, "hbm");
  node.device_rate = number(json, "hbm_bw") * number(json, "hbm_eff");
  node.to_device_rate = number(json, "h2d");
  node.from_device_rate = number(json, "d2h");
  node.between_devices_rate = number(json, "nvlink");
  node.disk_rate = number(json, "disk");
  return node;
}

/// Bytes of experts in RAM; null: all of them.
std::optional<double> ram_of(const Json& row) {
  const Json& host = row.at("case").at("host");
  return host.is_string() ? std::nullopt : std::optional(host.get<double>());
}

struct Setting {
  Geometry geometry;
  Node node;
  StepOptions options;
};
Setting setting_of(const Json& row) {
  const Json& from = row.at("case");
  Recipe recipe;
  recipe.lora.rank = from.at("r").get<int>();
  recipe.lora.expert_rank = from.at("r_expert").get<int>();
  recipe.data.sequence_len = from.at("seq").get<std::int64_t>();
  recipe.base.format = kFormats.at(word(from, "fmt"));
  recipe.base.non_expert_format = kFormats.at(word(from, "ne_fmt"));
  StepSchedule schedule = StepSchedule::oracle();
  schedule.loss_positions = true;  // its loss_frac, 1 in most rows
  Setting out;
  out.geometry =
      stream_geometry(recipe, facts(word(from, "model")), schedule, number(from, "loss_frac"));
  out.node = node_of(word(from, "node"));
  out.options.schedule = schedule;
  out.options.tokens = number(from, "tokens");
  out.options.micro_tokens = number(from, "mb_tokens");
  out.options.kept_inputs =
      word(from, "ckpt") == "hbm" ? ActivationHome::device : ActivationHome::host;
  if (from.at("resident").is_number()) out.options.resident_fraction = number(from, "resident");
  out.options.host_tile_bytes = ram_of(row);
  return out;
}

void expect_same(const char* what, double ours, double oracle, double relative) {
  EXPECT_NEAR(ours, oracle, relative * std::max(std::abs(oracle), 1e-30)) << what;
}

constexpr double kSame = 1e-9;  // the same arithmetic in another order

TEST(StreamModel, device_memory_is_the_oracles_part_by_part) {
  const std::map<std::string, std::string> names = {
      {"context+NCCL", "context"},
      {"non-expert base", "weights outside experts"},
      {"lm_head bf16 (embedding rows from host)", "vocabulary head"},
      {"non-expert LoRA, 18 B/param", "factors outside experts"},
      {"expert ring", "expert ring"},
      {"dequant scratch (2 experts bf16)", "dequantised experts"},
      {"residual + grad stream", "residual stream"},
      {"MoE gather/scatter pool", "routed rows pool"},
      {"expert workspace", "expert workspace"},
      {"microbatch workspace", "micro-batch workspace"},
      {"CE chunk (logits fp32 + bf16)", "head chunk"},
      {"checkpoints", "kept layer inputs"}};
  ASSERT_GE(golden().at("rows").size(), 200U);
  for (const Json& row : golden().at("rows")) {
    SCOPED_TRACE(row.at("case").dump());
    Setting setting = setting_of(row);
    setting.options.resident_fraction.reset();  // hbm_plan() reckons with what fits
    const GpuMemory memory = device_memory(setting.geometry, setting.node, setting.options);
    std::map<std::string, double> ours;
    for (const MemoryPart& part : memory.parts) {
      ours[part.name] = part.bytes;
      EXPECT_FALSE(part.working.empty()) << part.name;
    }
    const auto parts = named(row, "hbm_parts");
    ASSERT_EQ(ours.size(), parts.size());
    for (const auto& [name, bytes] : parts)
      expect_same(name.c_str(), ours.at(names.at(name)), bytes, kSame);
    const auto oracle = named(row, "hbm");
    expect_same("used", memory.used, oracle.at("used"), kSame);
    EXPECT_NEAR(memory.room(), oracle.at("room"), kSame * oracle.at("used"));
    // What fits into a room that is nearly nothing carries the room's rounding.
    EXPECT_NEAR(memory.resident_fraction, oracle.at("resident_frac"), kSame);
    expect_same("experts_per_gpu", memory.expert_bytes, oracle.at("experts_per_gpu"), kSame);
  }
}

TEST(StreamModel, host_memory_is_the_oracles_part_by_part) {
  const std::map<std::string, std::string> names = {
      {"expert base", "experts in RAM"},
      {"embedding", "embedding"},
      {"expert LoRA + grads + Adam (20 B/param)", "expert factors and optimizer"},
      {"checkpoints", "kept layer inputs"},
      {"process + pinned staging", "process and pinned staging"}};
  for (const Json& row : golden().at("rows")) {
    SCOPED_TRACE(row.at("case").dump());
    Setting setting = setting_of(row);
    setting.options.host_tile_bytes.reset();  // host_plan() holds all experts
    const HostMemory all = host_memory(setting.geometry, setting.node, setting.options);
    std::map<std::string, double> ours;
    for (const MemoryPart& part : all.parts) ours[part.name] = part.bytes;
    for (const auto& [name, bytes] : named(row, "host_parts"))
      expect_same(name.c_str(), ours[names.at(name)], bytes, kSame);
    expect_same("total", all.used, number(row, "host_total"), kSame);
    if (const std::optional<double> ram = ram_of(row)) {
      setting.options.host_tile_bytes = ram;
      const HostMemory part = host_memory(setting.geometry, setting.node, setting.options);
      expect_same("part", part.used, all.used - all.tile_bytes + *ram, kSame);
    }
  }
}

TEST(StreamModel, a_step_takes_the_oracles_seconds) {
  for (const Json& row : golden().at("rows")) {
    SCOPED_TRACE(row.at("case").dump());
    const Setting setting = setting_of(row);
    const StreamEstimate step = estimate(setting.geometry, setting.node, setting.options);
    const auto oracle = named(row, "step");
    const auto same = [&](const char* name, double ours) {
      expect_same(name, ours, oracle.at(name), kSame);
    };
    // The oracle's link waits for the disk where that is slower.
    same("link_fwd", std::max(step.link_forward, step.disk_forward));
    same("link_bwd", std::max(step.link_backward, step.disk_backward));
    same("comp_fwd", step.compute_forward);
    same("comp_bwd", step.compute_backward);
    same("nv_fwd", step.network_forward);
    same("nv_bwd", step.network_backward);
    same("dequant", step.dequantise);
    same("t", step.seconds());
    same("stream_bytes", step.stream_bytes);
    same("tok_s", step.tokens_per_second());
    EXPECT_NEAR(step.resident_fraction, oracle.at("resident"), kSame);
    same("flop_tok", setting.geometry.flops.total());
    same("hfu", step.peak_share);
    same("mfu4", step.model_peak_share);
    EXPECT_EQ(step.stream() > step.compute(), word(row, "bound") == "link");
  }
}

TEST(StreamModel, computing_covers_the_stream_from_the_oracles_step_on) {
  for (const Json& row : golden().at("rows")) {
    SCOPED_TRACE(row.at("case").dump());
    const Setting setting = setting_of(row);
    const std::optional<double> tokens = crossover(setting.geometry, setting.node, setting.options);
    ASSERT_TRUE(tokens.has_value());
    EXPECT_EQ(*tokens, number(row, "crossover"));
  }
}

TEST(StreamModel, a_stream_that_no_step_hides_has_no_crossover) {
  Setting setting = setting_of(golden().at("rows").front());
  setting.options.resident_fraction = 0;
  setting.node.to_device_rate = 1e8;
  EXPECT_FALSE(crossover(setting.geometry, setting.node, setting.options).has_value());
}

// ------------------------------------------------------------------ our schedule's own terms

double part_of(const GpuMemory& memory, const std::string& name) {
  for (const MemoryPart& part : memory.parts) {
    if (part.name == name) return part.bytes;
  }
  return 0;
}

TEST(StepSchedule, whole_tiles_cross_whether_touched_or_not) {
  Setting setting = setting_of(golden().at("rows").front());
  setting.options.resident_fraction = 0.5;
  setting.options.tokens = 64;  // 128 experts, one each: 39 % are met
  const double oracle = estimate(setting.geometry, setting.node, setting.options).stream_bytes;
  setting.options.schedule.whole_tiles_cross = true;
  const StreamEstimate ours = estimate(setting.geometry, setting.node, setting.options);
  EXPECT_DOUBLE_EQ(ours.stream_bytes, setting.geometry.base.routed);  // half of them, twice
  EXPECT_NEAR(oracle / ours.stream_bytes, 1 - std::pow(127.0 / 128, 64), 1e-12);
}

TEST(StepSchedule, a_slot_holds_a_tile_with_its_header) {
  Setting setting = setting_of(golden().at("rows").front());
  const double oracle =
      part_of(device_memory(setting.geometry, setting.node, setting.options), "expert ring");
  setting.options.schedule.whole_tile_slots = true;
  const double ours =
      part_of(device_memory(setting.geometry, setting.node, setting.options), "expert ring");
  // An expert of Maverick in int4 is 15,840 pages exactly, so only the header comes on top.
  EXPECT_DOUBLE_EQ(ours - oracle, 16 * 4096);
}

TEST(StepSchedule, a_streamed_head_leaves_the_device_and_is_read_once) {
  Setting setting = setting_of(golden().at("rows").front());
  setting.options.resident_fraction = 0;
  const GpuMemory held = device_memory(setting.geometry, setting.node, setting.options);
  const HostMemory host_without = host_memory(setting.geometry, setting.node, setting.options);
  const StreamEstimate step = estimate(setting.geometry, setting.node, setting.options);
  setting.options.stream_head = true;
  const double head = setting.geometry.base.head;
  const GpuMemory streamed = device_memory(setting.geometry, setting.node, setting.options);
  EXPECT_NEAR(held.used - streamed.used, head - 2 * (16 << 20), 1);
  EXPECT_NEAR(host_memory(setting.geometry, setting.node, setting.options).used,
              host_without.used + head, 1);
  const StreamEstimate slower = estimate(setting.geometry, setting.node, setting.options);
  EXPECT_NEAR(slower.stream_bytes - step.stream_bytes, head, 1e3);
  EXPECT_NEAR(slower.link_backward - step.link_backward, head / 25e9, 1e-9);
  EXPECT_EQ(slower.link_forward, step.link_forward);
  EXPECT_EQ(slower.compute_backward, step.compute_backward);
}

TEST(StepSchedule, kept_inputs_on_disk_pass_over_it_twice) {
  Setting setting = setting_of(golden().at("rows").front());
  setting.options.kept_inputs = ActivationHome::disk;
  EXPECT_EQ(estimate(setting.geometry, setting.node, setting.options).disk(), 0);
  setting.options.schedule.kept_inputs_on_disk = true;
  EXPECT_NEAR(estimate(setting.geometry, setting.node, setting.options).disk(),
              2 * 2048.0 * 48 * 5120 * 2 / 7e9, 1e-12);
}

// ------------------------------------------------------------------ through the recipe and the
// plan

const PriceBook& prices() {
  static const PriceBook book = PriceBook::read(kRecipes / "prices.yaml");
  return book;
}

Plan plan_with(std::vector<std::string> overrides, const ModelFacts& model,
               const std::string& profile, PlanExtras extras) {
  RecipeFile file = read_recipe(kRecipes / "maverick-a100.yaml", overrides);
  resolve(file, model.traits());
  extras.at_unix_ms = 1'772'800'000'000;  // 2026-03-06
  return make_plan(file.recipe, model, find_machine(profile, kRecipes / "machines"), prices(),
                   extras);
}

std::vector<std::string> overrides_of(const Json& row) {
  const Json& from = row.at("case");
  const auto integer = [&](const char* key) { return from.at(key).get<std::int64_t>(); };
  const std::int64_t seq = integer("seq"), micro = integer("mb_tokens") / seq;
  const int ranks = word(from, "node") == "H100x4" ? 4 : 1;
  const auto set = [](const std::string& key, auto value) {
    return key + "=" + std::to_string(value);
  };
  std::vector<std::string> out = {
      set("data.sequence_len", seq),
      set("training.micro_batch_size", micro),
      set("lora.rank", integer("r")),
      set("lora.expert_rank", integer("r_expert")),
      set("machine.ranks", ranks),
      "base.format=" + kWords.at(kFormats.at(word(from, "fmt"))),
      "base.non_expert_format=" + kWords.at(kFormats.at(word(from, "ne_fmt"))),
      std::string("base.activations=") + (word(from, "ckpt") == "hbm" ? "device" : "host")};
  if (integer("tokens") % (seq * micro * ranks) == 0) {
    out.push_back(
        set("training.gradient_accumulation_steps", integer("tokens") / (seq * micro * ranks)));
  } else {  // a step shorter than a micro-batch
    out.push_back(set("training.global_batch_rows", integer("tokens") / seq));
  }
  if (from.at("resident").is_number()) {
    out.push_back(set("base.device_memory", std::llround(number(from, "resident") *
                                                         named(row, "hbm").at("experts_per_gpu"))));
  }
  if (const std::optional<double> ram = ram_of(row))
    out.push_back(set("base.host_memory", std::llround(*ram)));
  return out;
}

TEST(Plan, with_oracle_assumptions_gives_the_oracles_figures) {
  constexpr double kSamePlan = 1e-6;  // budgets are whole bytes
  int checked = 0;
  for (const Json& row : golden().at("rows")) {
    if (number(row.at("case"), "loss_frac") != 1) continue;  // without data the plan takes all
    SCOPED_TRACE(row.at("case").dump());
    PlanExtras extras;
    extras.oracle_assumptions = true;
    const Plan plan = plan_with(overrides_of(row), facts(word(row.at("case"), "model")),
                                kProfiles.at(word(row.at("case"), "node")), extras);
    const auto step = named(row, "step"), hbm = named(row, "hbm"), host = named(row, "host_parts");
    expect_same("seconds_per_step", *plan.seconds_per_step.value, step.at("t"), kSamePlan);
    expect_same("tokens_per_second", *plan.tokens_per_second.value, step.at("tok_s"), kSamePlan);
    expect_same("stream_bytes_per_step", *plan.stream_bytes_per_step.value, step.at("stream_bytes"),
                kSamePlan);
    expect_same("flops_per_token", *plan.flops_per_token.value, step.at("flop_tok"), kSamePlan);
    // With every expert resident the oracle still counts factors.
    ASSERT_TRUE(plan.crossover_tokens_per_step.value.has_value());
    EXPECT_NEAR(*plan.crossover_tokens_per_step.value, number(row, "crossover"), 32);
    expect_same("device_bytes_peak", *plan.device_bytes_peak.value,
                hbm.at("used") + step.at("resident") * hbm.at("experts_per_gpu"), kSamePlan);
    expect_same("host_bytes_peak", *plan.host_bytes_peak.value,
                number(row, "host_total") - host.at("expert base") +
                    ram_of(row).value_or(host.at("expert base")),
                kSamePlan);
    EXPECT_TRUE(plan.differences.empty());
    ++checked;
  }
  EXPECT_GE(checked, 250);
}

std::map<std::string, PlanDifference> differences_of(const Plan& plan) {
  std::map<std::string, PlanDifference> out;
  for (const PlanDifference& difference : plan.differences) {
    EXPECT_FALSE(difference.working.empty()) << difference.name;
    out[difference.name] = difference;
  }
  return out;
}

TEST(Plan, lists_where_it_departs_from_the_oracle) {
  const auto plain = differences_of(plan_with({}, facts("MAVERICK"), "a100-40gb", PlanExtras{}));
  EXPECT_THAT(plain, testing::SizeIs(4));
  EXPECT_NEAR(plain.at("untouched experts").value, 0, 1e-9);  // 32,768 tokens meet every expert
  EXPECT_DOUBLE_EQ(plain.at("ring of whole tiles").value, 16 * 4096);
  EXPECT_NEAR(plain.at("routers in bfloat16").value, 24 * 5120 * 128 * (2 - 0.515625), 1);
  EXPECT_EQ(plain.at("placement").value, 0);

  // 128 tokens a step meet 63 % of 128 experts; 16 RAM budgets and data say the rest.
  PlanExtras extras;
  extras.data = DataStats{1000, 1000 * 128 / 4, 0, 0};
  const auto odd = differences_of(
      plan_with({"data.sequence_len=128", "training.micro_batch_size=2",
                 "training.global_batch_rows=1", "base.format=bf16", "base.activations=disk"},
                facts("MAVERICK"), "a100-40gb", extras));
  EXPECT_GT(odd.at("untouched experts").value, 1);
  EXPECT_EQ(odd.at("untouched experts").unit, "seconds");
  EXPECT_LT(odd.at("short micro-batch").value, 0);
  EXPECT_EQ(odd.at("short micro-batch").unit, "bytes");
  EXPECT_THAT(odd.at("tokens that carry loss").working, testing::HasSubstr("25.0 %"));
  EXPECT_GT(odd.at("experts beyond RAM").value, 1);
  EXPECT_TRUE(odd.contains("layer inputs on disk"));

  const Json json = plan_json(plan_with({}, facts("MAVERICK"), "a100-40gb", PlanExtras{}));
  ASSERT_TRUE(json.at("differences").is_array());
  for (const Json& entry : json.at("differences")) {
    EXPECT_TRUE(entry.contains("name") && entry.contains("working"));
    EXPECT_NE(entry.contains("seconds"), entry.contains("bytes"));
  }
}

TEST(Plan, computes_the_head_for_tokens_that_carry_loss) {
  const auto step = [](std::int64_t trained) {
    PlanExtras extras;
    extras.data = DataStats{1000, trained, 0, 0};
    return plan_with({}, facts("MAVERICK"), "a100-40gb", extras);
  };
  const Plan all = step(1000 * 2048), quarter = step(1000 * 2048 / 4);
  const double head = 4.0 * 202'048 * 5120;
  EXPECT_NEAR(*all.flops_per_token.value - *quarter.flops_per_token.value, 0.75 * head, 1);
  EXPECT_LT(*quarter.seconds_per_step.value, *all.seconds_per_step.value);
  const PlanDifference difference = differences_of(quarter).at("tokens that carry loss");
  EXPECT_NEAR(difference.value, *quarter.seconds_per_step.value - *all.seconds_per_step.value,
              1e-9);
}

TEST(Plan, streams_the_head_only_where_the_device_is_too_small_for_it) {
  // R1 outside its experts in bf16 is 30.5 GB; the head's 1.9 GB decide on a 40 GB card.
  const auto plan = [](std::int64_t tokens) {
    return plan_with({"base.non_expert_format=bf16", "data.sequence_len=512",
                      "training.micro_batch_size=8", "lora.expert_rank=1", "lora.rank=8",
                      "training.global_batch_rows=" + std::to_string(tokens / 512)},
                     facts("R1"), "a100-40gb", PlanExtras{});
  };
  const Plan small = plan(2048), large = plan(12'288);
  EXPECT_FALSE(small.stream_head) << *small.device_bytes_peak.value;
  EXPECT_TRUE(large.stream_head) << *large.device_bytes_peak.value;
  EXPECT_TRUE(small.fits && large.fits) << large.fits_working;
  // It crosses once, and the room it leaves keeps experts that would cross twice.
  EXPECT_LT(differences_of(large).at("streamed vocabulary head").value, 0);
  EXPECT_EQ(differences_of(small).count("streamed vocabulary head"), 0U);
}

TEST(Plan, oracle_assumptions_are_refused_on_the_cpu) {
  PlanExtras extras;
  extras.oracle_assumptions = true;
  EXPECT_THROW(plan_with({"compute.device=auto"}, facts("MAVERICK"), "cpu", extras), Error);
}

}  // namespace
}  // namespace tailor
