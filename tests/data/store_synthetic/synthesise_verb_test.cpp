#include <gmock/gmock.h>

#include "data/store/store.h"
#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

using testing::HasSubstr;

const char* const kTiny = TAILOR_SOURCE_DIR "/tests/golden/llama4_maverick_tiny/model";

Outcome synthesise(const Sandbox& box, std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), {"model", "synthesise"});
  return run_tailor(box, arguments);
}

void expect_refused(const Outcome& outcome, const std::string& text, int code = 2) {
  EXPECT_EQ(outcome.code, code) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  EXPECT_THAT(outcome.err, HasSubstr(text));
}

TEST(Synthesise, WritesAStoreThatVerifies) {
  const Sandbox box;
  const Outcome made = synthesise(
      box, {kTiny, "--to", "store", "--layers", "2", "--format", "nf4", "--seed", "9", "--json"});
  ASSERT_EQ(made.code, 0) << made.err;
  const Json json = parse_json(made.out, "stdout");
  EXPECT_EQ(json.at("layers"), Json({0, 1}));
  EXPECT_EQ(json.at("seed"), 9);
  const Store store = Store::open(box.root() / "store");
  EXPECT_EQ(store.source(), "synthetic, seed 9");
  EXPECT_EQ(json.at("bytes"), store.layout().bytes());
  const StoredUnit* expert = store.layout().find({UnitKind::expert, 1, 0});
  ASSERT_NE(expert, nullptr);
  EXPECT_EQ(expert->matrices[0].format, WeightFormat::nf4());
  EXPECT_EQ(store.layout().find({UnitKind::attention, 0, 0})->matrices[1].format,
            WeightFormat::bf16());
  const Outcome verified = run_tailor(box, {"model", "verify", "store"});
  EXPECT_EQ(verified.code, 0) << verified.err;
  expect_refused(synthesise(box, {kTiny, "--to", "store", "--layers", "2"}),
                 "a store is there already");
}

TEST(Synthesise, FormatsGroupAndConfigFileAreHonoured) {
  const Sandbox box;
  const Outcome made = synthesise(
      box, {std::string(kTiny) + "/config.json", "--to", "store", "--layers", "1,3", "--format",
            "int4", "--group", "16", "--non-expert-format", "fp8", "--threads", "2"});
  ASSERT_EQ(made.code, 0) << made.err;
  EXPECT_THAT(made.out, HasSubstr("2 of 4 layers"));
  const Store store = Store::open(box.root() / "store");
  EXPECT_TRUE(store.spec().layers[0].moe && store.spec().layers[1].moe);
  EXPECT_FALSE(store.spec().layers[1].rope);
  EXPECT_EQ(store.layout().find({UnitKind::expert, 1, 0})->matrices[0].format,
            WeightFormat::int4(16));
  EXPECT_EQ(store.layout().find({UnitKind::attention, 0, 0})->matrices[1].format,
            WeightFormat::fp8_blocks());
}

TEST(Synthesise, WrongArgumentsAreRefusedAndNothingIsMade) {
  const Sandbox box;
  expect_refused(synthesise(box, {kTiny, "--to", "store", "--layers", "0,4"}),
                 "layer 4 is asked for, the model has 4 (0 to 3)");
  // Found by the beginning of its name among the configs that come with Tailor.
  expect_refused(synthesise(box, {"Llama-4-Maverick", "--to", "store", "--layers", "49"}),
                 "49 layers are asked for, the model has 48");
  expect_refused(synthesise(box, {kTiny, "--to", "store", "--layers", "first"}), "--layers");
  expect_refused(synthesise(box, {"no/such-model", "--to", "store", "--layers", "1"}),
                 "no config of a model 'no/such-model' is known");
  expect_refused(synthesise(box, {box.root(), "--to", "store", "--layers", "1"}),
                 "config.json is missing");
  expect_refused(synthesise(box, {kTiny, "--to", "store", "--layers", "1", "--format", "as_is"}),
                 "no value of --format");
  expect_refused(synthesise(box, {kTiny, "--to", "store"}), "--layers is required");
  box.write_text("r1/config.json",
                 R"({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"})");
  expect_refused(synthesise(box, {"r1", "--to", "store", "--layers", "2"}),
                 "key 'hidden_size' is missing", 65);
  EXPECT_FALSE(fs::exists(box.root() / "store"));
}

}  // namespace
}  // namespace tailor::testing_support
