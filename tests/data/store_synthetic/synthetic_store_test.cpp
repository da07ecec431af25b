#include <gmock/gmock.h>

#include <map>

#include "base/error.h"
#include "base/json.h"
#include "data/quant/codec.h"
#include "data/store/store.h"
#include "data/store/synthetic.h"
#include "data/store/verify.h"
#include "tests/data/checkpoint/folder_fixture.h"

namespace tailor::testing_support {
namespace {

Json golden_config(const std::string& name) {
  return read_json(fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name / "model/config.json");
}

ModelSpec spec_of(const Json& config) { return model_spec_from_config(config, "config.json"); }

class SyntheticStoreTest : public FolderTest {
 protected:
  static SynthesisOptions options(WeightKind kind, std::uint64_t seed = 5, int threads = 1) {
    SynthesisOptions out;
    out.formats.experts = {false, kind, 0};
    out.formats.others = {false, kind, 0};
    out.seed = seed;
    out.threads = threads;
    return out;
  }
  fs::path make(const std::string& name, const SynthesisOptions& options,
                const std::vector<std::int64_t>& layers = {0, 1},
                const Json& config = golden_config("llama4_maverick_tiny")) {
    synthesise_store(config, layers, folder_ / name, options);
    return folder_ / name;
  }
  /// Path below the folder -> what is in it.
  static std::map<std::string, std::string> contents(const fs::path& folder) {
    std::map<std::string, std::string> out;
    for (const auto& entry : fs::recursive_directory_iterator(folder)) {
      if (!entry.is_regular_file()) continue;
      out[fs::relative(entry.path(), folder)] = read_text(entry.path());
    }
    return out;
  }
  static void expect_good(const fs::path& folder) {
    const Store store = Store::open(folder);
    VerifyOptions verify;
    verify.threads = 2;
    const VerifyReport report = verify_store(store, verify);
    EXPECT_THAT(report.problems, testing::IsEmpty());
    EXPECT_EQ(report.units, static_cast<std::int64_t>(store.layout().units.size()));
  }
};

TEST_F(SyntheticStoreTest, EveryUnitIsGoodAndTheManifestSaysWhatItIs) {
  for (const WeightKind kind :
       {WeightKind::int4, WeightKind::nf4, WeightKind::fp8, WeightKind::bf16}) {
    const fs::path folder = make(std::to_string(static_cast<int>(kind)), options(kind));
    expect_good(folder);
    const Store store = Store::open(folder);
    EXPECT_EQ(store.source(), "synthetic, seed 5");
    EXPECT_EQ(store.fingerprint().size(), 64U);
    ASSERT_EQ(store.spec().layer_count(), 2);
    const StoredUnit* expert = store.layout().find({UnitKind::expert, 1, 7});
    ASSERT_NE(expert, nullptr);
    EXPECT_EQ(expert->matrices[0].format.kind, kind);
    const StoredUnit* mlp = store.layout().find({UnitKind::feed_forward, 1, 0});
    ASSERT_EQ(mlp->matrices[1].role, MatrixRole::router);
    EXPECT_EQ(mlp->matrices[1].format, WeightFormat::bf16());
    EXPECT_FALSE(fs::exists(folder / kJournalName));
  }
}

TEST_F(SyntheticStoreTest, TheSameBytesForAnyThreadsAndARerun) {
  const auto one = contents(make("one", options(WeightKind::int4, 5, 1)));
  EXPECT_THAT(one, testing::Contains(testing::Key("layers/00001.tiles")));
  EXPECT_EQ(contents(make("three", options(WeightKind::int4, 5, 3))), one);
  EXPECT_EQ(contents(make("again", options(WeightKind::int4, 5, 1))), one);
  const auto other = contents(make("other", options(WeightKind::int4, 6, 1)));
  EXPECT_NE(other.at("layers/00001.tiles"), one.at("layers/00001.tiles"));
  EXPECT_NE(Store::open(folder_ / "other").fingerprint(),
            Store::open(folder_ / "one").fingerprint());
}

/// Every matrix of a small store by its own number of columns, those of 4,096 elements or more.
TEST_F(SyntheticStoreTest, MatricesOfAStoreHaveTheWantedVariance) {
  Json config = golden_config("llama4_maverick_tiny");
  config["hidden_size"] = 512;
  config["intermediate_size"] = 768;
  config["vocab_size"] = 1000;
  const fs::path folder = make("store", options(WeightKind::int4), {1}, config);
  const Store store = Store::open(folder);
  int seen = 0;
  for (const StoredUnit& unit : store.layout().units) {
    const std::string bytes =
        read_text(store.path_of(unit))
            .substr(static_cast<std::size_t>(unit.offset), static_cast<std::size_t>(unit.bytes));
    for (const MatrixPlace& place : unit.matrices) {
      SCOPED_TRACE(unit_text(unit.id) + ", " + role_name(place.role));
      std::vector<float> values(static_cast<std::size_t>(place.rows * place.columns));
      // The bytes' place in memory does not matter to the codec.
      decode_rows(place.in(reinterpret_cast<const std::byte*>(bytes.data())), 0, place.rows,
                  values.data());
      if (place.rows == 1) {
        EXPECT_THAT(values, testing::Each(1.0F));
        continue;
      }
      if (values.size() < 4096) continue;
      double squares = 0, sum = 0;
      for (const float value : values) {
        squares += double{value} * double{value};
        sum += double{value};
      }
      const double count = static_cast<double>(values.size());
      const double columns = static_cast<double>(place.columns);
      // Five standard errors of what was drawn, and the 3 % of the tables.
      EXPECT_NEAR(squares / count * columns, 1, 0.03 + 5 * std::sqrt(2 / count));
      EXPECT_NEAR(sum / count * std::sqrt(columns), 0, 0.005 + 5 / std::sqrt(count));
      ++seen;
    }
  }
  EXPECT_GT(seen, 8 * 3 + 3 + 4 + 2);
}

TEST_F(SyntheticStoreTest, LayersHaveTheSizesOfTheWholeModels) {
  const Json config = golden_config("llama4_maverick_tiny");
  const ModelSpec whole = spec_of(config);
  const SynthesisOptions asked = options(WeightKind::int4);
  const StoreLayout of_whole = make_layout(
      whole, asked.formats, false, [](const PublishedMatrix&) { return WeightFormat::bf16(); });
  const std::vector<std::int64_t> layers = {3, 0, 1, 1};
  const Store store = Store::open(make("store", asked, layers));
  ASSERT_EQ(store.spec().layer_count(), 4);
  for (std::int64_t l = 0; l < 4; ++l) {
    const std::int64_t from = layers[static_cast<std::size_t>(l)];
    const LayerSpec& wanted = whole.layers[static_cast<std::size_t>(from)];
    const LayerSpec& found = store.spec().layers[static_cast<std::size_t>(l)];
    EXPECT_EQ(found.moe, wanted.moe);
    EXPECT_EQ(found.rope, wanted.rope);
    EXPECT_EQ(found.attention_chunk, wanted.attention_chunk);
  }
  std::size_t units = 0;
  for (const StoredUnit& unit : store.layout().units) {
    UnitId id = unit.id;
    if (id.kind == UnitKind::attention || id.kind == UnitKind::feed_forward ||
        id.kind == UnitKind::expert) {
      id.layer = layers[static_cast<std::size_t>(id.layer)];
      ++units;
    }
    const StoredUnit* same = of_whole.find(id);
    ASSERT_NE(same, nullptr) << unit_text(unit.id);
    EXPECT_EQ(same->matrices, unit.matrices) << unit_text(unit.id);
  }
  EXPECT_EQ(units, 4 * 2 + 3 * 8U);
  // A layer that is there twice has weights of its own each time.
  EXPECT_NE(read_text(folder_ / "store/layers/00002.tiles"),
            read_text(folder_ / "store/layers/00003.tiles"));
}

TEST_F(SyntheticStoreTest, AnEarlyEndIsGoneOnWith) {
  Json config = golden_config("llama4_maverick_tiny");
  config["hidden_size"] = 1024;
  config["intermediate_size"] = 1024;
  config["num_local_experts"] = 40;
  SynthesisOptions asked = options(WeightKind::bf16);
  asked.stop = [] { return true; };
  const fs::path folder = folder_ / "store";
  EXPECT_THAT(
      error_of([&] { synthesise_store(config, {1}, folder, asked); }, folder_, Fault::stopped),
      testing::HasSubstr("Run the same command again"));
  EXPECT_TRUE(fs::exists(folder / kJournalName));
  EXPECT_THAT(error_of([&] { Store::open(folder); }), testing::HasSubstr("not finished"));
  // With another seed it is another store.
  EXPECT_THAT(error_of([&] { synthesise_store(config, {1}, folder, options(WeightKind::bf16, 6)); },
                       folder_, Fault::usage),
              testing::HasSubstr("begun"));
  asked.stop = nullptr;
  const SynthesisReport report = synthesise_store(config, {1}, folder, asked);
  EXPECT_LT(report.units_before, report.units);
  expect_good(folder);
  synthesise_store(config, {1}, folder_ / "unbroken", asked);
  EXPECT_EQ(read_text(folder / kManifestName), read_text(folder_ / "unbroken" / kManifestName));
}

TEST_F(SyntheticStoreTest, WhatIsThereIsLeftAlone) {
  make("store", options(WeightKind::int4));
  const auto before = contents(folder_ / "store");
  EXPECT_THAT(error_of([&] { make("store", options(WeightKind::int4)); }, folder_, Fault::usage),
              testing::HasSubstr("a store is there already"));
  make_folders(folder_ / "other");
  write_atomically(folder_ / "other/notes.txt", "mine");
  EXPECT_THAT(error_of([&] { make("other", options(WeightKind::int4)); }, folder_, Fault::usage),
              testing::HasSubstr("nothing was changed"));
  EXPECT_EQ(contents(folder_ / "store"), before);
  EXPECT_EQ(contents(folder_ / "other").size(), 1U);
}

TEST_F(SyntheticStoreTest, ADiskThatIsTooSmallIsToldFirst) {
  Json config = golden_config("llama_tiny");
  config["hidden_size"] = 1 << 16;
  config["intermediate_size"] = 1 << 24;
  config["num_hidden_layers"] = 60;  // 400 TB
  EXPECT_THAT(error_of(
                  [&] {
                    std::vector<std::int64_t> layers(60);
                    synthesise_store(config, layers, folder_ / "big", options(WeightKind::bf16));
                  },
                  folder_, Fault::io),
              testing::HasSubstr("of disk"));
  EXPECT_FALSE(fs::exists(folder_ / "big"));
  config["intermediate_size"] = std::int64_t{1} << 32;
  config["hidden_size"] = std::int64_t{1} << 32;
  EXPECT_THAT(error_of([&] { make("big", options(WeightKind::bf16), {0}, config); }),
              testing::HasSubstr("beyond what a store can hold"));
}

TEST(ChooseLayers, CountsTakeTheFirstOfEachKind) {
  ModelSpec spec;
  spec.layers.resize(8);
  for (std::size_t l = 3; l < 8; ++l) spec.layers[l].moe = true;  // as DeepSeek's: dense ones first
  using Layers = std::vector<std::int64_t>;
  EXPECT_EQ(choose_layers(spec, "1"), (Layers{0}));
  EXPECT_EQ(choose_layers(spec, "2"), (Layers{0, 3}));
  EXPECT_EQ(choose_layers(spec, "4"), (Layers{0, 1, 2, 3}));
  EXPECT_EQ(choose_layers(spec, "8").size(), 8U);
  EXPECT_EQ(choose_layers(spec, "0,1"), (Layers{0, 1}));
  EXPECT_EQ(choose_layers(spec, "2-4,7,3-3"), (Layers{2, 3, 4, 7, 3}));
  for (const char* wrong : {"0", "9", "8,1", "0-8", "3-1", "", ",", "1,", "-1", "two", "1.5",
                            "0,-1", "99999999999999999999"}) {
    EXPECT_THAT(error_of([&] { choose_layers(spec, wrong); }, {}, Fault::usage),
                testing::HasSubstr("layers from 0 to 7"))
        << wrong;
  }
}

TEST(ConfigOfLayers, IsReadBackByOursAndByReadersOfTheInterval) {
  const Json maverick =
      read_json(fs::path(TAILOR_SOURCE_DIR) /
                "recipes/models/meta-llama--Llama-4-Maverick-17B-128E-Instruct.json");
  const auto step_of = [&](const std::vector<std::int64_t>& layers) {
    const Json made = config_of_layers(maverick, layers, "config.json");
    EXPECT_EQ(made["text_config"]["num_hidden_layers"], layers.size());
    EXPECT_EQ(spec_of(made).layer_count(), static_cast<std::int64_t>(layers.size()));
    return made["text_config"]["interleave_moe_layer_step"].get<int>();
  };
  EXPECT_EQ(step_of({0, 1}), 2);
  EXPECT_EQ(step_of({1}), 1);
  EXPECT_EQ(step_of({1, 3, 5}), 1);
  EXPECT_EQ(step_of({0, 2, 1}), 3);
  EXPECT_EQ(step_of({0, 2}), 3);  // none of two
  const Json made = config_of_layers(maverick, {3, 0, 1}, "config.json");
  EXPECT_EQ(made["text_config"]["moe_layers"], Json({0, 2}));
  EXPECT_EQ(made["text_config"]["no_rope_layers"], Json({0, 1, 1}));
  EXPECT_EQ(made["text_config"]["layer_types"],
            Json({"full_attention", "chunked_attention", "chunked_attention"}));
  const Json llama = config_of_layers(golden_config("llama_tiny"), {1}, "config.json");
  EXPECT_EQ(spec_of(llama).layer_count(), 1);
}

}  // namespace
}  // namespace tailor::testing_support
