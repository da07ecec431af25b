// Slots that are paid for from the budget: what a large base holds in memory, and the same bits.
// Experts of Maverick's true shape, 2.1 GB of them a layer.

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "base/json.h"
#include "data/store/synthetic.h"
#include "recipes/ring.h"
#include "tests/support/fixture.h"
#include "trainer/stream/store_weights.h"

namespace tailor {
namespace {

using namespace testing_support;

TEST(RingShare, memory_is_the_budget_and_what_comes_on_top) {
  const fs::path folder =
      fs::temp_directory_path() / ("tailor-ring-share-" + std::to_string(::getpid()));
  std::ifstream file(fs::path(TAILOR_SOURCE_DIR) /
                     "recipes/models/meta-llama--Llama-4-Maverick-17B-128E-Instruct.json");
  Json config = Json::parse(file);
  Json& text = config.contains("text_config") ? config["text_config"] : config;
  text["num_local_experts"] = 32;
  text["vocab_size"] = 1'000;
  SynthesisOptions synthesis;
  synthesis.formats = {{false, WeightKind::int4, 0}, {false, WeightKind::int4, 0}};
  synthesis.threads = 2;
  synthesise_store(config, {1, 3}, folder, synthesis);
  const auto store = std::make_shared<const Store>(Store::open(folder));

  Tokens tokens;
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 40; ++i) ids.push_back(i * i % 1'000);
  tokens.add_document(ids, std::vector<std::int64_t>(ids.begin(), ids.end()));
  tokens.end_micro_batch();
  std::vector<double> losses;
  for (const std::int64_t budget : {std::int64_t{0}, std::int64_t{1'600'000'000}}) {
    StreamOptions options;
    options.device_bytes = 0;
    options.host_bytes = budget;
    auto weights = StoreWeights::open(store, at::kBFloat16, options);
    const StreamFacts facts = weights->facts();
    EXPECT_GT(facts.streamed.forward, std::int64_t{2'500'000'000});
    // Beside the slots of experts: two of attention and two of the rest of a layer, and the head's.
    const std::int64_t rest = std::int64_t{700} << 20;
    EXPECT_LE(weights->memory_bytes(), budget + kRingBytes + rest);
    if (budget > 0) {
      EXPECT_GT(facts.ring_bytes, budget / 4) << "slots have their quarter";
      EXPECT_GT(facts.resident_bytes + facts.ring_bytes, budget) << "and the budget is used";
    }
    const auto decoder = Decoder::create(std::move(weights), at::kBFloat16);
    const auto got = decoder->evaluate(tokens.input()).losses;
    if (losses.empty()) losses = got;
    EXPECT_EQ(got, losses);
  }
  fs::remove_all(folder);
}

}  // namespace
}  // namespace tailor
