#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <random>

#include "base/error.h"
#include "base/text.h"
#include "base/url.h"
#include "recipes/choices.h"
#include "recipes/plan.h"
#include "recipes/read.h"
#include "recipes/scalars.h"
#include "recipes/schema.h"
#include "recipes/shipped.h"
#include "recipes/write.h"
#include "recipes/yaml.h"

namespace tailor {
namespace {

const fs::path kRecipes = fs::path(TAILOR_SOURCE_DIR) / "recipes";
const std::string kLeast = "base_model: m\noutput_dir: o\ndata: {train: [a.jsonl]}\n";

RecipeFile read(const std::string& text, std::vector<std::string> overrides = {}) {
  return read_recipe_text(text, "least.yaml", overrides);
}
std::string error_of(const std::string& text, std::vector<std::string> overrides = {}) {
  try {
    read(text, overrides);
  } catch (const Error& error) {
    return to_text(error);
  }
  return "no error";
}

/// A recipe in which no key has its default.
const std::string kEverything = R"(name: all keys
base_model: org/model
output_dir: "runs/with: colon # and hash"
seed: 7
lora:
  rank: 4
  alpha: 0.1
  dropout: 0.25
  rslora: true
  targets: [experts, q_proj, router, "odd.name's_proj"]
  expert_rank: 2
  expert_alpha: 3.5
  experts: chosen.json
  expert_state: disk
  learning_rate_ratio_b: 16
  init_from: adapters/old
data:
  train: [a.jsonl, {path: "b *.jsonl", weight: 0.5, format: alpaca}]
  validation: {split: 0.015}
  format: sharegpt
  chat_template: my.jinja
  train_on: [assistant, tool]
  sequence_len: 512
  packing: false
  too_long: split
  store: tokens.h5
training:
  micro_batch_size: 3
  gradient_accumulation_steps: 5
  global_batch_rows: 17
  num_epochs: 2
  max_steps: 1e3
  shuffle: false
  learning_rate: 1e-3
  adam_beta1: 0.8
  adam_beta2: 0.999
  adam_epsilon: 1.0e-6
  weight_decay: .01
  lr_scheduler: linear
  warmup_steps: 11
  max_grad_norm: null
  eval_every_steps: 0
compute: {device: cpu, dtype: float32, threads: 3, keep_activations: all}
base:
  format: int4
  non_expert_format: nf4
  group_size: 64
  store: stores/x
  device_memory: 24GiB
  host_memory: 1.5GB
  activations: disk
machine: {profile: a100-40gb, ranks: 2}
cost: {price: {usd_per_gpu_hour: 1.19}, project: p, ledger: postgresql://host/db}
budget: {usd: 5.000001, gpu_hours: 2.5, warn: 0.5}
checkpoint: {every_steps: 9, every_minutes: null, keep: 3}
logging: {tensorboard: false, mlflow: "http://h:5000", metrics_every_steps: 4}
)";

TEST(Recipe, of_the_required_keys_has_every_default) {
  const RecipeFile file = read(kLeast);
  Recipe expected;
  expected.name = "least";
  expected.base_model = "m";
  expected.output_dir = "o";
  expected.data.train = {{"a.jsonl", 1, {}}};
  EXPECT_EQ(file.recipe, expected);
  EXPECT_THAT(file.given, testing::ElementsAre("base_model", "output_dir", "data.train"));
  EXPECT_EQ(file.origins.at("lora.rank").text, "default");
  EXPECT_EQ(file.origins.at("output_dir").text, "least.yaml:2");
  EXPECT_EQ(file.origins.size(), recipe_keys().size());
}

TEST(Recipe, with_every_key_set_is_read_as_written) {
  const RecipeFile file = read(kEverything);
  const Recipe& r = file.recipe;
  EXPECT_EQ(r.output_dir, "runs/with: colon # and hash");
  EXPECT_EQ(r.lora.targets,
            (LoraTargets{false, false, false, true, true, {"q_proj", "odd.name's_proj"}}));
  EXPECT_EQ(r.data.train.size(), 2U);
  EXPECT_EQ(r.data.train[1], (DataSource{"b *.jsonl", 0.5, RecordFormat::alpaca}));
  EXPECT_EQ(r.data.validation_split, 0.015);
  EXPECT_EQ(r.data.chat_template, (ChatTemplateChoice{ChatTemplateChoice::Kind::file, "my.jinja"}));
  EXPECT_EQ(r.training.max_steps, 1000);
  EXPECT_EQ(r.training.warmup_steps, 11);
  EXPECT_FALSE(r.training.warmup_ratio || r.training.max_grad_norm || r.checkpoint.every_minutes);
  EXPECT_EQ(r.base.device_memory, 24LL << 30);
  EXPECT_EQ(r.base.host_memory, 1'500'000'000);
  EXPECT_EQ(r.cost.price, (PriceChoice{PriceChoice::Kind::usd, "", 1'190'000}));
  EXPECT_EQ(r.budget.usd_micros, 5'000'001);
  EXPECT_EQ(r.global_batch_rows(), 17);
  EXPECT_EQ(r.tokens_per_step(), 17 * 512);
}

TEST(ResolvedRecipe, reads_back_as_the_same_recipe) {
  for (const std::string& text :
       {kLeast, kEverything, kLeast + "training: {warmup_ratio: null}\n",
        kLeast + "name: \"0x1F\"\n", kLeast + "name: \"yes\"\nbase: {store: \"null\"}\n",
        kLeast + "name: \"\\u00fc \\\"q\\\" \\\\ \\t x\"\n",
        kLeast + "lora: {experts: \"all\", init_from: '~'}\ncost: {price: \"auto\"}\n"}) {
    RecipeFile file = read(text);
    const std::string written = resolved_text(file);
    const RecipeFile again = read_recipe_text(written, "least.yaml");
    EXPECT_EQ(again.recipe, file.recipe) << written;
    resolve(file, {128, 8});
    const RecipeFile resolved = read_recipe_text(resolved_text(file), "least.yaml");
    EXPECT_EQ(resolved.recipe, file.recipe);
    for (const RecipeKey& key : recipe_keys()) {
      EXPECT_THAT(written, testing::HasSubstr(key.path.substr(key.path.find('.') + 1) + ": "));
    }
  }
}

TEST(ResolvedRecipe, names_origins_and_hides_passwords) {
  const RecipeFile file =
      read(kLeast + "cost: {ledger: \"postgresql://me:secret@h/db\"}\n",
           {"training.max_steps=20", "logging.mlflow=https://u:secret@h/?password=secret"});
  const std::string text = resolved_text(file);
  EXPECT_THAT(text, testing::HasSubstr("# override training.max_steps=20"));
  EXPECT_THAT(text, testing::HasSubstr("# least.yaml:1"));
  EXPECT_THAT(text, testing::HasSubstr("postgresql://me@h/db"));
  EXPECT_THAT(text, testing::Not(testing::HasSubstr("secret")));
}

TEST(Overrides, change_single_keys_and_the_last_one_wins) {
  const Recipe r =
      read(kEverything, {"training.max_steps=20", "training.max_steps=21", "lora.targets=[experts]",
                         "data.validation=null", "cost.price.usd_per_gpu_hour=2.5",
                         "name=other run", "budget={usd: 1}", "base.device_memory = auto"})
          .recipe;
  EXPECT_EQ(r.training.max_steps, 21);
  EXPECT_EQ(r.lora.targets, (LoraTargets{false, false, false, true, false, {}}));
  EXPECT_FALSE(r.data.validation_split.has_value());
  EXPECT_EQ(r.cost.price.usd_micros_per_gpu_hour, 2'500'000);
  EXPECT_EQ(r.name, "other run");
  EXPECT_EQ(r.budget.usd_micros, 1'000'000);
  EXPECT_EQ(r.budget.gpu_hours, 2.5);
  EXPECT_FALSE(r.base.device_memory.has_value());
}

TEST(Overrides, give_required_keys_and_mend_the_file) {
  const Recipe r = read("lora: {rank: 0}\n",
                        {"base_model=m", "output_dir=o", "data.train=a.jsonl", "lora.rank=4"})
                       .recipe;
  EXPECT_EQ(r.base_model, "m");
  EXPECT_EQ(r.lora.rank, 4);
  EXPECT_EQ(r.data.train.size(), 1U);
}

TEST(Overrides, can_turn_one_warmup_into_the_other) {
  const Recipe r = read(kLeast + "training: {warmup_ratio: 0.1}\n",
                        {"training.warmup_steps=10", "training.warmup_ratio=null"})
                       .recipe;
  EXPECT_EQ(r.training.warmup_steps, 10);
  EXPECT_FALSE(r.training.warmup_ratio.has_value());
}

TEST(Resolve, takes_expert_ranks_from_the_model) {
  RecipeFile file = read(kLeast + "lora: {rank: 16, alpha: 32}\n");
  EXPECT_TRUE(resolve(file, {256, 8}).empty());
  EXPECT_EQ(file.recipe.lora.expert_rank, 2);
  EXPECT_EQ(file.recipe.lora.expert_alpha, 4);
  EXPECT_DOUBLE_EQ(file.recipe.lora_scale(), file.recipe.expert_lora_scale());
  EXPECT_EQ(file.origins.at("lora.expert_rank").kind, Origin::Kind::model);
  RecipeFile dense = read(kLeast + "lora: {rank: 4, expert_rank: 2}\n");
  EXPECT_THAT(resolve(dense, {0, 0}),
              testing::ElementsAre("lora.expert_rank: the model has no routed experts"));
}

TEST(Targets, all_is_all_five_groups) {
  const LoraTargets targets = read(kLeast, {"lora.targets=all"}).recipe.lora.targets;
  EXPECT_EQ(targets, (LoraTargets{true, true, true, true, true, {}}));
}

TEST(Sizes, say_which_kilobyte) {
  EXPECT_EQ(parse_bytes("24GiB"), 24LL << 30);
  EXPECT_EQ(parse_bytes("24 GB"), 24'000'000'000);
  EXPECT_EQ(parse_bytes("24000000"), 24'000'000);
  EXPECT_EQ(parse_bytes("0"), 0);
  EXPECT_EQ(parse_bytes("1.5KiB"), 1536);
  EXPECT_EQ(parse_bytes("12B"), 12);
  for (const char* bad :
       {"24G", "24Gb", "-1GiB", "GiB", "1e400GB", "1 2GB", "", "1.5", "99999999TiB"}) {
    EXPECT_FALSE(parse_bytes(bad).has_value()) << bad;
  }
}

TEST(Scalars, are_told_apart) {
  using M = ScalarMeaning;
  const std::vector<std::pair<std::string, M>> cases = {
      {"8", M::integer},       {"-8", M::integer},      {"+8", M::integer},
      {"0", M::integer},       {"1e-3", M::number},     {"1.", M::number},
      {".5", M::number},       {"1E5", M::number},      {"010", M::ambiguous},
      {"00", M::ambiguous},    {"0x1F", M::ambiguous},  {"0o17", M::ambiguous},
      {"0b11", M::ambiguous},  {"1_000", M::ambiguous}, {"12:30", M::ambiguous},
      {"yes", M::ambiguous},   {"No", M::ambiguous},    {"ON", M::ambiguous},
      {"y", M::ambiguous},     {"true", M::boolean},    {"False", M::boolean},
      {"null", M::null},       {"~", M::null},          {"", M::null},
      {".inf", M::not_finite}, {".NaN", M::not_finite}, {"nan", M::text},
      {"e5", M::text},         {"1e", M::text},         {"-", M::text},
      {".", M::text},          {"a100-40gb", M::text},  {"8b", M::text},
      {"3.5.1", M::text}};
  for (const auto& [text, meaning] : cases) EXPECT_EQ(scalar_meaning(text), meaning) << text;
  EXPECT_EQ(parse_integer("1e3"), 1000);
  EXPECT_EQ(parse_integer("9223372036854775807"), INT64_MAX);
  EXPECT_FALSE(parse_integer("9223372036854775808") || parse_integer("1e300") ||
               parse_integer("1.0") || parse_integer("1e-3"));
  EXPECT_FALSE(parse_number("1e999").has_value());
}

TEST(ShippedRecipes, are_valid_described_and_open_with_their_command) {
  const auto shipped = shipped_recipes(kRecipes);
  std::vector<std::string> names;
  for (const ShippedRecipe& recipe : shipped) {
    names.push_back(recipe.name);
    EXPECT_GT(recipe.description.size(), 20U) << recipe.name;
    EXPECT_NO_THROW(read_recipe(recipe.path)) << recipe.name;
    EXPECT_THAT(read_text(recipe.path),
                testing::HasSubstr("./tools/tailor train recipes/" + recipe.name + ".yaml"));
  }
  EXPECT_THAT(names, testing::IsSupersetOf({"demo-dense", "demo-maverick", "maverick-a100",
                                            "r1-4xh100", "r1-1xh200", "r1-distill-qwen-7b"}));
}

TEST(ShippedRecipes, are_found_by_name_and_copied_once) {
  EXPECT_EQ(find_recipe("demo-maverick", kRecipes), kRecipes / "demo-maverick.yaml");
  EXPECT_EQ(find_recipe("demo-dense.yaml", kRecipes), kRecipes / "demo-dense.yaml");
  try {
    find_recipe("demo-mavrick", kRecipes);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), 2);
    EXPECT_THAT(error.parts().mend, testing::HasSubstr("Did you mean demo-maverick?"));
  }
  const fs::path folder =
      fs::temp_directory_path() / ("tailor-recipes-" + std::to_string(getpid()));
  fs::create_directories(folder);
  EXPECT_EQ(copy_recipe("demo-dense", kRecipes, folder), folder / "demo-dense.yaml");
  EXPECT_THROW(copy_recipe("demo-dense", kRecipes, folder), Error);
  fs::remove_all(folder);
}

TEST(ReadRecipe, of_a_missing_file_is_a_usage_error) {
  try {
    read_recipe("/nowhere/x.yaml");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), 2);
    EXPECT_EQ(error.parts().where, "/nowhere/x.yaml");
  }
}

TEST(ReadRecipe, paged_experts_need_experts_that_are_trained) {
  EXPECT_THAT(error_of(kLeast + "lora: {targets: [attention], expert_state: disk}\n"),
              testing::AllOf(
                  testing::HasSubstr("lora.expert_state is disk, but no routed expert is trained"),
                  testing::HasSubstr("Add experts to lora.targets")));
  for (const char* good : {"lora: {targets: [attention], expert_state: memory}\n",
                           "lora: {targets: [experts.down_proj], expert_state: disk}\n",
                           "lora: {expert_state: disk}\n"}) {
    EXPECT_EQ(error_of(kLeast + good), "no error") << good;
  }
}

TEST(ReadRecipe, bounds_size_depth_and_bombs) {
  EXPECT_THAT(error_of(kLeast + "#" + std::string(1U << 20U, 'x')),
              testing::HasSubstr("at most 1 MiB"));
  EXPECT_THAT(error_of(kLeast + "name: " + std::string(60, '[') + std::string(60, ']') + "\n"),
              testing::HasSubstr("nested deeper"));
  EXPECT_THAT(error_of(std::string(400'000, '[')), testing::HasSubstr("error:"));
  std::string wide = kLeast + "lora: {targets: [";
  for (int i = 0; i < 30'000; ++i) wide += "a" + std::to_string(i) + "_proj,";
  EXPECT_THAT(error_of(wide + "]}\n"), testing::HasSubstr("more than 20,000 values"));
  std::string many = kLeast;
  for (int i = 0; i < 500; ++i) many += "key_" + std::to_string(i) + ": 1\n";
  EXPECT_THAT(error_of(many), testing::HasSubstr("and 450 more"));
}

TEST(ReadRecipe, never_fails_otherwise_than_with_a_usage_error) {
  std::mt19937 random(1);
  const std::string alphabet = "abe:=-[]{}#&*!|>'\"%@`, \n\n  01.~?\t\x80\xC3\xA9\x01";
  for (int i = 0; i < 3000; ++i) {
    std::string text = i % 2 == 0 ? kEverything : kLeast;
    const int edits = 1 + static_cast<int>(random() % 6);
    for (int k = 0; k < edits; ++k) {
      const std::size_t at = random() % text.size();
      const char c = alphabet[random() % alphabet.size()];
      if (random() % 3 == 0) {
        text.erase(at, random() % 9);
      } else if (random() % 2 == 0) {
        text.insert(at, 1, c);
      } else {
        text[at] = c;
      }
      if (text.empty()) text = "x";
    }
    try {
      const RecipeFile file = read(text);
      const std::string written = resolved_text(file);
      const Recipe again = read_recipe_text(written, "least.yaml").recipe;
      // A password that an edit made of an address is not written.
      Recipe expected = file.recipe;
      for (auto* address : {&expected.cost.ledger, &expected.logging.mlflow}) {
        if (*address) *address = without_password(**address);
      }
      EXPECT_EQ(again, expected) << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.exit_code(), 2);
      EXPECT_TRUE(is_utf8(to_text(error))) << to_text(error);
    }
  }
}

// docs/recipes.md, the schema and the reader agree on every key, type and default.
TEST(RecipeDocs, have_every_key_with_type_default_and_meaning) {
  const std::string docs = read_text(fs::path(TAILOR_SOURCE_DIR) / "docs/recipes.md");
  std::vector<std::string> rows;
  for (const std::string& line : split(docs, '\n')) {
    if (line.starts_with("| `")) rows.push_back(line);
  }
  std::vector<std::string> expected;
  for (const RecipeKey& key : recipe_keys()) {
    expected.push_back("| `" + key.path + "` | " + key.type + " | " +
                       (key.required ? "required" : "`" + key.default_value + "`") + " | " +
                       key.meaning + " |");
  }
  EXPECT_EQ(rows, expected);
}

// The names that are fixed: a recipe with every key reads, and it has every key of the schema.
TEST(Schema, has_exactly_the_fixed_names) {
  std::vector<std::string> paths;
  for (const RecipeKey& key : recipe_keys()) paths.push_back(key.path);
  const std::vector<std::string> fixed = {"name",
                                          "base_model",
                                          "output_dir",
                                          "seed",
                                          "lora.rank",
                                          "lora.alpha",
                                          "lora.dropout",
                                          "lora.rslora",
                                          "lora.targets",
                                          "lora.expert_rank",
                                          "lora.expert_alpha",
                                          "lora.experts",
                                          "lora.expert_state",
                                          "lora.learning_rate_ratio_b",
                                          "lora.init_from",
                                          "data.train",
                                          "data.validation",
                                          "data.format",
                                          "data.chat_template",
                                          "data.train_on",
                                          "data.sequence_len",
                                          "data.packing",
                                          "data.too_long",
                                          "data.store",
                                          "training.micro_batch_size",
                                          "training.gradient_accumulation_steps",
                                          "training.global_batch_rows",
                                          "training.num_epochs",
                                          "training.max_steps",
                                          "training.shuffle",
                                          "training.optimizer",
                                          "training.learning_rate",
                                          "training.adam_beta1",
                                          "training.adam_beta2",
                                          "training.adam_epsilon",
                                          "training.weight_decay",
                                          "training.lr_scheduler",
                                          "training.warmup_ratio",
                                          "training.warmup_steps",
                                          "training.max_grad_norm",
                                          "training.eval_every_steps",
                                          "compute.device",
                                          "compute.dtype",
                                          "compute.threads",
                                          "compute.keep_activations",
                                          "base.format",
                                          "base.non_expert_format",
                                          "base.group_size",
                                          "base.store",
                                          "base.device_memory",
                                          "base.host_memory",
                                          "base.activations",
                                          "machine.profile",
                                          "machine.ranks",
                                          "cost.price",
                                          "cost.project",
                                          "cost.ledger",
                                          "budget.usd",
                                          "budget.gpu_hours",
                                          "budget.warn",
                                          "budget.action",
                                          "checkpoint.every_steps",
                                          "checkpoint.every_minutes",
                                          "checkpoint.keep",
                                          "logging.tensorboard",
                                          "logging.mlflow",
                                          "logging.metrics_every_steps"};
  EXPECT_EQ(paths, fixed);
}

}  // namespace
}  // namespace tailor
