// Products with experts' matrices as a store has them: the bits of decoding first, on any number of
// threads and in a whole step.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include "base/aligned_memory.h"
#include "base/json.h"
#include "base/random.h"
#include "data/quant/codec.h"
#include "data/store/export.h"
#include "data/store/synthetic.h"
#include "tests/support/fixture.h"
#include "trainer/ops.h"
#include "trainer/stream/store_weights.h"

namespace tailor {
namespace {

using namespace testing_support;

/// Gate above up, encoded; and what they decode to.
struct GateUp {
  std::vector<AlignedMemory> memory;
  ops::ProductWeights stored, decoded;

  GateUp(const WeightFormat& format, std::int64_t rows, std::int64_t columns) {
    const at::Tensor w_NK = at::empty({2 * rows, columns}, at::kBFloat16);
    stored.stored_count = 2;
    for (std::int64_t i = 0; i < 2; ++i) {
      const auto codes = take(code_bytes(format, rows, columns));
      const auto scales = take(scale_bytes(format, rows, columns));
      const at::Tensor published = at::randn({rows, columns});
      MatrixEncoder encoder(format, rows, columns, codes, scales);
      encoder.add_rows(0, rows, published.data_ptr<float>());
      encoder.finish();
      EncodedMatrix& matrix = stored.stored[static_cast<std::size_t>(i)];
      matrix = {format, rows, columns, codes, scales};
      kernels<Bf16>().dequantise(0, rows, matrix, data<Bf16>(w_NK) + i * rows * columns, columns);
    }
    decoded.w_KN = w_NK.t();
  }
  std::byte* take(std::int64_t bytes) {
    memory.emplace_back(bytes);
    return memory.back().data();
  }
};

TEST(StoredProducts, have_the_bits_of_decoded_ones_on_any_threads) {
  if (kernels<Bf16>().few_rows_stored == nullptr) GTEST_SKIP() << kernel_level();
  at::manual_seed(4);
  const int before = at::get_num_threads();
  constexpr std::int64_t F = 448, D = 640;
  for (const WeightFormat& format :
       {WeightFormat::int4(128), WeightFormat::nf4(), WeightFormat::fp8_blocks()}) {
    const GateUp w(format, F, D);
    for (const std::int64_t rows : {1, 18, 77}) {
      SCOPED_TRACE(testing::Message() << format_text(format) << ", " << rows << " rows");
      ASSERT_TRUE(ops::multiplies_stored(w.stored.stored[0], 2 * F, rows));
      const at::Tensor x = at::randn({rows, D}).to(at::kBFloat16);
      const at::Tensor dy = at::randn({rows, 2 * F}).to(at::kBFloat16);
      const at::Tensor want = at::empty({rows, 2 * F}, at::kBFloat16);
      const at::Tensor want_dx = at::empty({rows, D}, at::kBFloat16);
      at::set_num_threads(1);
      ops::multiply(x, w.decoded, want);
      ops::multiply_t(dy, w.decoded, want_dx);
      for (const int threads : {1, 2, 3}) {
        at::set_num_threads(threads);
        const at::Tensor y = at::zeros_like(want), dx = at::zeros_like(want_dx);
        ops::multiply(x, w.stored, y);
        ops::multiply_t(dy, w.stored, dx);
        EXPECT_TRUE(at::equal(y, want)) << threads << " threads";
        EXPECT_TRUE(at::equal(dx, want_dx)) << threads << " threads";
      }
    }
  }
  at::set_num_threads(before);
}

TEST(StoredProducts, are_not_for_matrices_that_end_within_a_block_nor_for_many_rows) {
  if (kernels<Bf16>().few_rows_stored == nullptr) GTEST_SKIP() << kernel_level();
  const auto may = [](const WeightFormat& format, std::int64_t rows, std::int64_t columns,
                      std::int64_t x_rows) {
    const EncodedMatrix matrix{format, rows, columns, nullptr, nullptr};
    return ops::multiplies_stored(matrix, rows, x_rows);
  };
  EXPECT_TRUE(may(WeightFormat::int4(128), 64, 128, 16));
  EXPECT_FALSE(may(WeightFormat::int4(128), 65, 128, 16));
  EXPECT_FALSE(may(WeightFormat::int4(64), 64, 192, 16));
  EXPECT_FALSE(may(WeightFormat::bf16(), 64, 128, 16));
  EXPECT_FALSE(may(WeightFormat::int4(128), 64, 128, 10'000));
}

struct Result {
  std::vector<double> losses;
  at::Tensor gradients;
  std::int64_t streamed_bytes = 0;
};

Result run(Decoder& decoder) {
  LoraOptions options;
  options.rank = 3;
  options.expert_rank = 2;
  options.targets = {"all"};
  Adapter adapter = Adapter::create(decoder.weights().spec(), options, 7);
  for (std::size_t i = 0; i < adapter.factors().size(); ++i) {
    adapter.factors()[i] = static_cast<float>(0.4 * random_unit(11, RandomStream::sample, i) - 0.2);
  }
  decoder.set_adapter(&adapter);
  Tokens tokens;
  for (const int length : {41, 90}) {
    std::vector<std::int32_t> ids;
    std::vector<std::int64_t> labels;
    for (int i = 0; i < length; ++i) {
      ids.push_back(static_cast<std::int32_t>(random_bits(3, RandomStream::sample,
                                                          static_cast<std::uint64_t>(length),
                                                          static_cast<std::uint64_t>(i)) %
                                              97));
      labels.push_back(ids.back());
    }
    tokens.add_document(ids, labels);
  }
  tokens.end_micro_batch();
  Result out;
  out.gradients = at::zeros({adapter.parameter_count()}, at::kFloat);
  TrainPass pass;
  pass.gradient_scale = 1 / static_cast<double>(tokens.trained);
  out.losses = decoder.forward_backward(tokens.input(), pass, out.gradients).losses;
  out.streamed_bytes = decoder.weights().counters().streamed_bytes;
  decoder.set_adapter(nullptr);
  return out;
}

void expect_same_bits(const Result& a, const Result& b) {
  EXPECT_EQ(a.losses, b.losses);
  EXPECT_TRUE(at::equal(a.gradients, b.gradients));
}

/// A tiny model whose experts' sides are whole blocks, as those of the true models are.
Json config_of(const std::string& model) {
  std::ifstream file(golden(model) / "model/config.json");
  Json config = Json::parse(file);
  config["hidden_size"] = 384;
  config["vocab_size"] = 97;
  if (config.contains("moe_intermediate_size")) {
    config["moe_intermediate_size"] = 128;
  } else {
    config["intermediate_size"] = 128;
    config["num_local_experts"] = 5;
  }
  return config;
}

TEST(StoredProducts, a_step_from_a_store_has_the_bits_of_its_decoded_checkpoint) {
  const fs::path folder =
      fs::temp_directory_path() / ("tailor-stored-products-" + std::to_string(::getpid()));
  for (const char* model : {"llama4_maverick_tiny", "deepseek_v3_tiny"}) {
    for (const WeightKind kind : {WeightKind::int4, WeightKind::nf4, WeightKind::fp8}) {
      SCOPED_TRACE(testing::Message() << model << " " << static_cast<int>(kind));
      fs::remove_all(folder);
      fs::create_directories(folder);
      const Json config = config_of(model);
      std::vector<std::int64_t> layers;
      for (int l = 0; l < config["num_hidden_layers"].get<int>(); ++l) layers.push_back(l);
      SynthesisOptions synthesis;
      synthesis.formats = {{false, kind, 0}, {false, WeightKind::bf16, 0}};
      synthesise_store(config, layers, folder / "store", synthesis);
      const auto store = std::make_shared<Store>(Store::open(folder / "store"));
      export_store(*store, folder / "decoded", {true, {}, 5'000'000'000, {}, {}});

      const Result want = run(*load_tiny(folder / "decoded", at::kBFloat16).decoder);
      StreamOptions disk;
      disk.device_bytes = disk.host_bytes = 0;
      const Result streamed =
          run(*Decoder::create(StoreWeights::open(store, at::kBFloat16, disk), at::kBFloat16));
      EXPECT_GT(streamed.streamed_bytes, 0);
      expect_same_bits(streamed, want);
      expect_same_bits(
          run(*Decoder::create(StoreWeights::open(store, at::kBFloat16, {}), at::kBFloat16)), want);
    }
  }
  fs::remove_all(folder);
}

}  // namespace
}  // namespace tailor
