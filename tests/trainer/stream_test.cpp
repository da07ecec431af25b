// The frozen base from a store: streamed is resident to the last bit, bytes are counted, and what
// goes wrong on the way ends the pass with its place named.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include "base/random.h"
#include "data/store/pack.h"
#include "tests/support/fake_device.h"
#include "tests/support/faulty_reader.h"
#include "tests/support/fixture.h"
#include "trainer/stream/store_weights.h"

namespace tailor {
namespace {

using namespace testing_support;
using testing::HasSubstr;

class TemporaryFolder {
 public:
  TemporaryFolder() {
    static int counter = 0;
    path_ = fs::temp_directory_path() /
            ("tailor-stream-" + std::to_string(::getpid()) + "-" + std::to_string(counter++));
    fs::create_directories(path_);
  }
  ~TemporaryFolder() { fs::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

StoreFormats formats_of(WeightKind kind, bool as_is = false) {
  const FormatChoice choice{as_is, kind, 0};
  return {choice, choice};
}

/// A tiny model packed into a store.
struct Packed {
  Packed(const std::string& model, const StoreFormats& formats) {
    PackOptions options;
    options.formats = formats;
    options.threads = 2;
    pack_store(golden(model) / "model", folder.path() / "store", options);
    reopen();
  }
  void reopen() { store = std::make_shared<Store>(Store::open(folder.path() / "store")); }

  std::unique_ptr<Decoder> decoder(const StreamOptions& options,
                                   at::ScalarType dtype = at::kBFloat16) const {
    return Decoder::create(StoreWeights::open(store, dtype, options), dtype);
  }
  /// Path of the file that holds a unit, and its place there.
  std::pair<fs::path, std::int64_t> place(const UnitId& id) const {
    const StoredUnit* unit = store->layout().find(id);
    return {store->path_of(*unit), unit->offset};
  }

  TemporaryFolder folder;
  std::shared_ptr<const Store> store;
};

void change_byte(const std::pair<fs::path, std::int64_t>& where, std::int64_t at, int mask) {
  std::fstream file(where.first, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(where.second + at);
  const int byte = file.get();
  file.seekp(where.second + at);
  file.put(static_cast<char>(byte ^ mask));
}

LoraOptions every_target() {
  LoraOptions options;
  options.rank = 3;
  options.alpha = 5;
  options.expert_rank = 2;
  options.expert_alpha = 3;
  options.targets = {"all"};
  return options;
}

Adapter random_adapter(const ModelSpec& spec) {
  Adapter adapter = Adapter::create(spec, every_target(), 7);
  for (std::size_t i = 0; i < adapter.factors().size(); ++i) {
    adapter.factors()[i] = static_cast<float>(0.4 * random_unit(11, RandomStream::sample, i) - 0.2);
  }
  return adapter;
}

/// `micro_batches` of two documents each.
Tokens documents(std::int64_t vocab, int micro_batches) {
  Tokens tokens;
  for (int m = 0; m < micro_batches; ++m) {
    for (const int length : {13, 6}) {
      std::vector<std::int32_t> ids;
      std::vector<std::int64_t> labels;
      for (int i = 0; i < length; ++i) {
        ids.push_back(static_cast<std::int32_t>(
            random_bits(3, RandomStream::sample, static_cast<std::uint64_t>(m * 2 + length),
                        static_cast<std::uint64_t>(i)) %
            static_cast<std::uint64_t>(vocab)));
        labels.push_back(ids.back());
      }
      tokens.add_document(ids, labels);
    }
    tokens.end_micro_batch();
  }
  return tokens;
}

struct Result {
  std::vector<double> losses;
  at::Tensor gradients;
  std::vector<double> eval_losses;
  RingCounters counters;
};

/// `steps` passes with an evaluation behind each.
Result run(Decoder& decoder, const Adapter& adapter, const Tokens& tokens, Activations keep,
           int steps = 2) {
  decoder.set_adapter(&adapter);
  const bool wide = decoder.factors().scalar_type() == at::kDouble;
  Result out;
  out.gradients = at::zeros({adapter.parameter_count()}, wide ? at::kDouble : at::kFloat);
  for (int s = 0; s < steps; ++s) {
    TrainPass pass;
    pass.gradient_scale = 1 / static_cast<double>(tokens.trained);
    pass.keep = keep;
    pass.another_follows = s % 2 == 0;  // rightly announced, wrongly, and not at all
    const LossResult loss = decoder.forward_backward(tokens.input(), pass, out.gradients);
    out.losses.insert(out.losses.end(), loss.losses.begin(), loss.losses.end());
    if (s == 1) continue;
    const LossResult eval = decoder.evaluate(tokens.input());
    out.eval_losses.insert(out.eval_losses.end(), eval.losses.begin(), eval.losses.end());
  }
  out.counters = decoder.weights().counters();
  return out;
}

void expect_same_bits(const Result& a, const Result& b, const std::string& how) {
  ASSERT_EQ(a.losses.size(), b.losses.size());
  EXPECT_EQ(std::memcmp(a.losses.data(), b.losses.data(), a.losses.size() * sizeof(double)), 0)
      << how;
  EXPECT_EQ(a.eval_losses, b.eval_losses) << how;
  EXPECT_EQ(std::memcmp(a.gradients.data_ptr(), b.gradients.data_ptr(), a.gradients.nbytes()), 0)
      << how;
}

StreamOptions homes(std::int64_t device, std::int64_t host, std::int64_t experts_per_tile = 0) {
  StreamOptions options;
  options.device_bytes = device;
  options.host_bytes = host;
  options.experts_per_tile = experts_per_tile;
  return options;
}

struct Case {
  std::string model;
  WeightKind kind;
  bool as_is;
  at::ScalarType dtype;
  std::string name() const {
    return model + "_" +
           (as_is                      ? "as_is"
            : kind == WeightKind::int4 ? "int4"
            : kind == WeightKind::nf4  ? "nf4"
            : kind == WeightKind::fp8  ? "fp8"
                                       : "bf16") +
           "_in_" +
           (dtype == at::kFloat    ? "float32"
            : dtype == at::kDouble ? "float64"
                                   : "bfloat16");
  }
};

class EveryHome : public testing::TestWithParam<Case> {};
/// Of deepseek_v3_fp8_tiny's weights as published, in blocks of 128 x 128 with ragged edges.
TEST(Fp8Blocks, are_read_as_transformers_dequantises_them) {
  const Packed packed("deepseek_v3_fp8_tiny", formats_of(WeightKind::fp8, true));
  const fs::path folder = golden("deepseek_v3_fp8_tiny");
  const auto decoder = packed.decoder({}, at::kFloat);
  const auto expected = load_tensors(folder / "expected_dequant.safetensors");
  ASSERT_FALSE(expected.empty());
  for (const auto& [name, want] : expected) {
    bool found = false;
    for (const StoredUnit& unit : packed.store->layout().units) {
      const auto matrices = unit_matrices(packed.store->spec(), unit.id, false);
      for (std::size_t i = 0; i < matrices.size(); ++i) {
        if (matrices[i].name != name) continue;
        found = true;
        ASSERT_EQ(unit.matrices[i].format.kind, WeightKind::fp8) << name;
        std::ifstream file(packed.store->path_of(unit), std::ios::binary);
        std::vector<std::byte> bytes(static_cast<std::size_t>(unit.bytes));
        file.seekg(unit.offset);
        file.read(reinterpret_cast<char*>(bytes.data()), unit.bytes);
        const EncodedMatrix matrix = unit.matrices[i].in(bytes.data());
        const at::Tensor got = at::empty({matrix.rows, matrix.columns});
        kernels<float>().dequantise(0, matrix.rows, matrix, got.data_ptr<float>(), matrix.columns);
        EXPECT_TRUE(at::equal(got, want.to(at::kFloat))) << name;
      }
    }
    EXPECT_TRUE(found) << name;
  }
}

TEST(Fp8Blocks, forward_equals_transformers) {
  const Packed packed("deepseek_v3_fp8_tiny", formats_of(WeightKind::fp8, true));
  const fs::path folder = golden("deepseek_v3_fp8_tiny");
  const Tokens tokens = fixture_tokens(folder, {0});
  const auto expected = load_tensors(folder / "expected_forward.safetensors");
  const at::Tensor kept = at::tensor(tokens.kept, at::kLong);
  const auto rows = [&](const at::Tensor& tensor) {
    return tensor.flatten(0, 1).index_select(0, kept);
  };
  for (const StreamOptions& home : {StreamOptions{}, homes(0, 0)}) {
    const auto decoder = packed.decoder(home, at::kFloat);
    const Trace trace = decoder->trace(tokens.input());
    EXPECT_LE((trace.logits_TV - rows(expected.at("logits"))).abs().max().item<double>(), 2e-5);
    for (std::size_t i = 0; i < trace.hidden_TD.size(); ++i) {
      const at::Tensor want = rows(expected.at("hidden." + std::to_string(i)));
      EXPECT_LE((trace.hidden_TD[i] - want).abs().max().item<double>(), 5e-5) << i;
    }
    const LossResult loss = decoder->evaluate(tokens.input());
    EXPECT_NEAR(
        loss.loss_sum / static_cast<double>(loss.tokens) / expected.at("loss").item<double>(), 1,
        1e-5);
  }
}

/// A layer's experts of deepseek_v3_tiny: one tensor an expert, or as newer transformers save them,
/// all in one, outputs first; as they are, or as fp8 with a scale for 128 x 128.
fs::path deepseek_with(const fs::path& folder, bool all_in_one, bool fp8) {
  const fs::path from = golden("deepseek_v3_tiny") / "model";
  std::map<std::string, at::Tensor> tensors;
  for (const auto& entry : fs::directory_iterator(from)) {
    if (entry.path().extension() == ".safetensors") tensors.merge(load_tensors(entry.path()));
  }
  const ModelSpec spec = read_model_spec(from);
  const auto put = [&](const std::string& name, const at::Tensor& codes, const at::Tensor& scales) {
    tensors[name] = codes;
    if (fp8) tensors[name + "_scale_inv"] = scales;
  };
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    if (!spec.layers[static_cast<std::size_t>(l)].moe) continue;
    std::vector<at::Tensor> codes[3], scales[3];
    for (std::int64_t e = 0; e < spec.experts; ++e) {
      const auto names = expert_matrices(spec, l, e, false);
      for (std::size_t i = 0; i < 3; ++i) {
        at::Tensor matrix = tensors.at(names[i].name);
        TAILOR_CHECK(matrix.size(0) <= 128 && matrix.size(1) <= 128, "a block holds it all");
        const at::Tensor scale = (matrix.to(at::kFloat).abs().max() / 448).reshape({1, 1});
        if (fp8) matrix = (matrix.to(at::kFloat) / scale).to(at::kFloat8_e4m3fn);
        codes[i].push_back(matrix);
        scales[i].push_back(scale);
        tensors.erase(names[i].name);
        if (!all_in_one) put(names[i].name, matrix, scale);
      }
    }
    if (!all_in_one) continue;
    const auto bytes = [](const at::Tensor& tensor) {  // fp8 cannot be concatenated
      return tensor.scalar_type() == at::kFloat8_e4m3fn ? tensor.view(at::kByte) : tensor;
    };
    std::vector<at::Tensor> gate_up, gate_up_scales, down;
    for (std::size_t e = 0; e < codes[0].size(); ++e) {
      gate_up.push_back(at::cat({bytes(codes[0][e]), bytes(codes[1][e])}));
      gate_up_scales.push_back(at::cat({scales[0][e], scales[1][e]}));
      down.push_back(bytes(codes[2][e]));
    }
    const auto all = expert_matrices(spec, l, 0, true);
    put(all[0].name, at::stack(gate_up), at::stack(gate_up_scales));
    put(all[2].name, at::stack(down), at::stack(scales[2]));
  }
  fs::create_directories(folder);
  fs::copy_file(from / "config.json", folder / "config.json");
  std::vector<TensorToWrite> files;
  for (auto& [name, tensor] : tensors) {
    tensor = tensor.contiguous();
    const Dtype dtype = tensor.scalar_type() == at::kFloat      ? Dtype::f32
                        : tensor.scalar_type() == at::kBFloat16 ? Dtype::bf16
                                                                : Dtype::f8_e4m3;
    files.push_back({name,
                     dtype,
                     tensor.sizes().vec(),
                     {static_cast<const std::byte*>(tensor.data_ptr()), tensor.nbytes()}});
  }
  write_safetensors(folder / "model.safetensors", files);
  return folder;
}

/// Bytes of a packed store's matrices: the headers name the model's fingerprint.
std::vector<std::byte> packed_bytes(const fs::path& model, const StoreFormats& formats) {
  const TemporaryFolder folder;
  PackOptions options;
  options.formats = formats;
  pack_store(model, folder.path() / "store", options);
  const Store store = Store::open(folder.path() / "store");
  std::vector<std::byte> all;
  for (const StoredUnit& unit : store.layout().units) {
    std::ifstream file(store.path_of(unit), std::ios::binary);
    std::vector<std::byte> bytes(static_cast<std::size_t>(unit.bytes));
    file.seekg(unit.offset);
    file.read(reinterpret_cast<char*>(bytes.data()), unit.bytes);
    for (const MatrixPlace& place : unit.matrices) {
      const auto codes = bytes.begin() + place.codes_offset;
      const auto scales = bytes.begin() + place.scales_offset;
      all.insert(all.end(), codes, codes + place.codes_bytes);
      all.insert(all.end(), scales, scales + place.scales_bytes);
    }
  }
  return all;
}

TEST(FusedExperts, of_deepseek_are_those_of_one_tensor_an_expert) {
  for (const bool fp8 : {false, true}) {
    const TemporaryFolder folder;
    const fs::path fused = deepseek_with(folder.path() / "fused", true, fp8);
    const fs::path single = deepseek_with(folder.path() / "single", false, fp8);
    const Tokens tokens = documents(read_model_spec(single).vocab, 2);
    const auto losses = [&](const fs::path& model) {
      return load_tiny(model, at::kFloat).decoder->evaluate(tokens.input()).losses;
    };
    const auto want = losses(single), got = losses(fused);
    ASSERT_EQ(got.size(), want.size());
    for (std::size_t t = 0; t < want.size(); ++t) EXPECT_NEAR(got[t], want[t], 1e-6);
    const auto plain = losses(golden("deepseek_v3_tiny") / "model");
    double apart = 0;
    for (std::size_t t = 0; t < want.size(); ++t) apart += std::abs(want[t] - plain[t]);
    if (fp8) {
      EXPECT_GT(apart, 1e-3) << "these are other numbers";
      EXPECT_EQ(packed_bytes(fused, formats_of(WeightKind::fp8, true)),
                packed_bytes(single, formats_of(WeightKind::fp8, true)));
    } else {
      EXPECT_EQ(apart, 0);
    }
    for (const WeightKind kind : {WeightKind::bf16, WeightKind::int4}) {
      EXPECT_EQ(packed_bytes(fused, formats_of(kind)), packed_bytes(single, formats_of(kind)));
    }
  }
}

/// Loaded into memory as what fp8 and INT4 stand for: the numbers of a store of the same codes.
TEST(QuantisedCheckpoint, loads_into_memory_as_its_store_streams) {
  const fs::path folder = golden("deepseek_v3_fp8_tiny");
  const Tokens tokens = fixture_tokens(folder, {0});
  const Packed packed("deepseek_v3_fp8_tiny", formats_of(WeightKind::fp8, true));
  const auto want = packed.decoder({}, at::kFloat)->evaluate(tokens.input()).losses;
  const auto got = load_tiny(folder / "model", at::kFloat).decoder->evaluate(tokens.input());
  ASSERT_EQ(got.losses.size(), want.size());
  for (std::size_t t = 0; t < want.size(); ++t) EXPECT_NEAR(got.losses[t], want[t], 1e-6);
  EXPECT_NEAR(got.loss_sum / static_cast<double>(got.tokens) /
                  load_tensors(folder / "expected_forward.safetensors").at("loss").item<double>(),
              1, 1e-5);
}

TEST(QuantisedCheckpoint, a_code_that_is_no_number_is_refused_by_tensor_row_and_column) {
  const TemporaryFolder folder;
  const fs::path model = deepseek_with(folder.path() / "model", true, true);
  const ModelSpec spec = read_model_spec(model);
  const PublishedMatrix up = expert_matrices(spec, 1, 2, true)[1];
  {
    const Checkpoint checkpoint = Checkpoint::open(model);
    const TensorInfo& info = checkpoint.find(up.name).info;
    std::fstream file(model / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(info.offset + (up.first_row() + 3) * up.columns + 5);
    file.put(static_cast<char>(0x7F));
  }
  try {
    load_tiny(model, at::kFloat);
    FAIL() << "a NaN was loaded";
  } catch (const Error& error) {
    const std::string text = to_text(error);
    EXPECT_NE(text.find("a weight is infinite or not a number"), std::string::npos) << text;
    EXPECT_NE(text.find(up.name), std::string::npos) << text;
    EXPECT_NE(text.find("expert 2, up, row 3, column 5"), std::string::npos) << text;
    EXPECT_EQ(error.fault(), Fault::bad_file);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Formats, EveryHome,
    testing::Values(Case{"llama4_maverick_tiny", WeightKind::int4, false, at::kBFloat16},
                    Case{"llama4_maverick_tiny", WeightKind::nf4, false, at::kBFloat16},
                    Case{"llama4_maverick_tiny", WeightKind::fp8, false, at::kFloat},
                    Case{"llama4_maverick_tiny", WeightKind::bf16, false, at::kBFloat16},
                    Case{"llama4_maverick_tiny", WeightKind::bf16, true, at::kFloat},
                    Case{"llama4_scout_tiny", WeightKind::int4, false, at::kDouble},
                    Case{"deepseek_v3_tiny", WeightKind::int4, false, at::kBFloat16},
                    Case{"deepseek_v3_tiny", WeightKind::nf4, false, at::kFloat},
                    Case{"deepseek_v3_tiny", WeightKind::bf16, true, at::kBFloat16},
                    Case{"deepseek_v3_fp8_tiny", WeightKind::fp8, true, at::kBFloat16},
                    Case{"deepseek_v3_fp8_tiny", WeightKind::int4, false, at::kFloat},
                    Case{"qwen2_tiny", WeightKind::bf16, true, at::kFloat},
                    Case{"llama_tiny", WeightKind::int4, false, at::kBFloat16},
                    Case{"llama_tiny", WeightKind::bf16, true, at::kFloat}),
    [](const auto& parameter) { return parameter.param.name(); });

TEST_P(EveryHome, gives_the_bits_of_all_resident) {
  const Case& which = GetParam();
  const Packed packed(which.model, formats_of(which.kind, which.as_is));
  const Adapter adapter = random_adapter(packed.store->spec());
  const Tokens tokens = documents(packed.store->spec().vocab, 3);
  for (const Activations keep : {Activations::kept, Activations::recomputed}) {
    const auto resident = packed.decoder({}, which.dtype);
    const Result want = run(*resident, adapter, tokens, keep, 3);
    EXPECT_EQ(want.counters.streamed_bytes, 0);
    const std::int64_t all = packed.store->layout().bytes();
    for (const std::int64_t per_tile : {1, 3, 0, 1000}) {
      for (const auto& [device, host] : {std::pair<std::int64_t, std::int64_t>{0, 0},
                                         {all / 2, 0},
                                         {0, all / 2},
                                         {all / 3, all / 3},
                                         {2 * all, 0}}) {
        const auto streamed = packed.decoder(homes(device, host, per_tile), which.dtype);
        const Result got = run(*streamed, adapter, tokens, keep, 3);
        expect_same_bits(got, want,
                         "device " + std::to_string(device) + ", host " + std::to_string(host) +
                             ", experts a tile " + std::to_string(per_tile));
      }
    }
  }
}

TEST(Stream, as_it_is_published_gives_what_the_checkpoint_gives) {
  for (const char* model : {"llama4_maverick_tiny", "llama4_scout_tiny", "llama_tiny"}) {
    const Packed packed(model, formats_of(WeightKind::bf16, true));
    const Adapter adapter = random_adapter(packed.store->spec());
    const Tokens tokens = documents(packed.store->spec().vocab, 2);
    const auto from_checkpoint = load_tiny(golden(model) / "model", at::kDouble);
    const Result want = run(*from_checkpoint.decoder, adapter, tokens, Activations::kept);
    const Result got =
        run(*packed.decoder(homes(0, 0), at::kDouble), adapter, tokens, Activations::recomputed);
    for (std::size_t i = 0; i < want.losses.size(); ++i) {
      EXPECT_NEAR(got.losses[i], want.losses[i], 1e-12 * want.losses[i]) << model;
    }
    EXPECT_LT((got.gradients - want.gradients).abs().max().item<double>(),
              1e-12 * want.gradients.abs().max().item<double>())
        << model;
  }
}

TEST(Stream, generates_what_the_resident_model_generates) {
  const Packed packed("llama4_maverick_tiny", formats_of(WeightKind::int4));
  const auto logits_of = [&](const StreamOptions& options) {
    const auto decoder = packed.decoder(options);
    GenerationState state = decoder->start_generation(12);
    std::vector<at::Tensor> out;
    for (std::int32_t id = 5; id < 12; ++id) {
      out.push_back(decoder->next_logits(state, std::span(&id, 1)));
    }
    return at::stack(out);
  };
  EXPECT_TRUE(at::equal(logits_of({}), logits_of(homes(0, 0))));
}

/// Bytes of every tile, and of the embedding's rows that are read by index.
std::int64_t tile_bytes(const Store& store) {
  std::int64_t total = 0;
  for (const StoredUnit& unit : store.layout().units) {
    const bool rows = unit.id.kind == UnitKind::embedding && !store.spec().tied_head;
    if (!rows && unit.id.kind != UnitKind::final_norm) total += unit.bytes;
  }
  return total;
}

std::int64_t embedding_bytes(const RingCounters& counters) { return counters.row_bytes; }

TEST(Stream, a_step_reads_layers_exactly_twice_and_the_head_once_whatever_the_micro_batches) {
  for (const char* model : {"llama4_maverick_tiny", "llama_tiny"}) {
    const Packed packed(model, formats_of(WeightKind::int4));
    const Adapter adapter = random_adapter(packed.store->spec());
    const std::int64_t all = tile_bytes(*packed.store);
    for (const Activations keep : {Activations::kept, Activations::recomputed}) {
      for (const std::int64_t budget : {std::int64_t{0}, all / 3}) {
        std::int64_t one = 0;
        for (const int micro_batches : {1, 2, 8}) {
          const Tokens tokens = documents(packed.store->spec().vocab, micro_batches);
          auto weights = StoreWeights::open(packed.store, at::kBFloat16, homes(budget, 0, 3));
          const StreamFacts facts = weights->facts();
          EXPECT_EQ(facts.streamed.forward + facts.resident_bytes, all);
          EXPECT_EQ(facts.streamed.forward == all, budget == 0);
          const auto decoder = Decoder::create(std::move(weights), at::kBFloat16);
          decoder->set_adapter(&adapter);
          const at::Tensor gradients = at::zeros({adapter.parameter_count()}, at::kFloat);
          TrainPass pass;
          pass.keep = keep;
          decoder->forward_backward(tokens.input(), pass, gradients);
          const RingCounters counters = decoder->weights().counters();
          const std::int64_t read = counters.streamed_bytes - embedding_bytes(counters);
          EXPECT_EQ(read, facts.streamed.step()) << model << ", " << micro_batches;
          if (micro_batches == 1) one = read;
          EXPECT_EQ(read, one);
        }
        // One pass per micro-batch, as other trainers do it: eight times the bytes.
        auto decoder = packed.decoder(homes(budget, 0, 3));
        decoder->set_adapter(&adapter);
        const at::Tensor gradients = at::zeros({adapter.parameter_count()}, at::kFloat);
        const Tokens single = documents(packed.store->spec().vocab, 1);
        for (int m = 0; m < 8; ++m) {
          TrainPass pass;
          pass.keep = keep;
          decoder->forward_backward(single.input(), pass, gradients);
        }
        const RingCounters counters = decoder->weights().counters();
        EXPECT_EQ(counters.streamed_bytes - embedding_bytes(counters), 8 * one);
      }
    }
  }
}

TEST(Stream, a_disk_at_its_worst_that_tells_no_lies_changes_nothing) {
  const Packed packed("llama4_maverick_tiny", formats_of(WeightKind::int4));
  const Adapter adapter = random_adapter(packed.store->spec());
  const Tokens tokens = documents(packed.store->spec().vocab, 2);
  const Result want = run(*packed.decoder({}), adapter, tokens, Activations::recomputed);
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    StreamOptions options = homes(0, 0, 1);
    options.wrap_reader = [&](std::unique_ptr<BlockReader> reader) {
      Faults faults;
      faults.seed = seed;
      faults.held_back = seed % 5;
      faults.delay_us_max = seed % 2 == 0 ? 0 : 300;
      return std::make_unique<FaultyReader>(std::move(reader), faults);
    };
    expect_same_bits(run(*packed.decoder(options), adapter, tokens, Activations::recomputed), want,
                     "seed " + std::to_string(seed));
  }
}

/// The error that a step with these weights ends with.
std::string error_of(const Packed& packed, const StreamOptions& options, Fault fault) {
  const Adapter adapter = random_adapter(packed.store->spec());
  const Tokens tokens = documents(packed.store->spec().vocab, 2);
  try {
    const auto decoder = packed.decoder(options);
    run(*decoder, adapter, tokens, Activations::recomputed);
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), fault) << to_text(error);
    return to_text(error);
  }
  ADD_FAILURE() << "no error";
  return "";
}

TEST(Stream, a_device_that_is_late_and_unordered_gives_the_same_bits_under_100_seeds) {
  const Packed packed("llama4_maverick_tiny", formats_of(WeightKind::int4));
  const Adapter adapter = random_adapter(packed.store->spec());
  const Tokens tokens = documents(packed.store->spec().vocab, 2);
  const Result want = run(*packed.decoder({}), adapter, tokens, Activations::recomputed);
  const std::int64_t all = packed.store->layout().bytes();
  for (std::uint32_t seed = 0; seed < 100; ++seed) {
    FakeDevice device(seed + 1);
    {
      StreamOptions options =
          homes(seed % 3 == 0 ? 0 : all / 4, seed % 2 == 0 ? 0 : all / 4, 1 + seed % 3);
      options.device = &device;
      options.poison_released = true;
      options.wrap_reader = [&](std::unique_ptr<BlockReader> reader) {
        Faults faults;
        faults.seed = seed;
        faults.held_back = seed % 4;
        return std::make_unique<FaultyReader>(std::move(reader), faults);
      };
      const auto decoder = packed.decoder(options);
      const Result got = run(*decoder, adapter, tokens, Activations::recomputed);
      expect_same_bits(got, want, "seed " + std::to_string(seed));
      EXPECT_GT(got.counters.link_bytes, 0);
      EXPECT_GE(got.counters.link_bytes, got.counters.streamed_bytes - got.counters.row_bytes);
    }
    EXPECT_THAT(device.violations(), testing::IsEmpty()) << "seed " << seed;
  }
}

TEST(Stream, through_a_device_errors_surface_too) {
  const Packed packed("llama4_maverick_tiny", formats_of(WeightKind::int4));
  for (std::uint64_t which = 1; which < 30; which += 7) {
    FakeDevice device(static_cast<std::uint32_t>(which));
    StreamOptions options = homes(0, 0, 1);
    options.device = &device;
    options.wrap_reader = [&](std::unique_ptr<BlockReader> reader) {
      Faults faults;
      faults.fail = which;
      return std::make_unique<FaultyReader>(std::move(reader), faults);
    };
    EXPECT_THAT(error_of(packed, options, Fault::io), HasSubstr(".tiles, offset "));
  }
}

TEST(Stream, a_read_that_fails_ends_the_step_with_its_place) {
  const Packed packed("llama4_maverick_tiny", formats_of(WeightKind::int4));
  for (std::uint64_t which = 0; which < 40; which += 3) {
    for (const bool cut : {false, true}) {
      StreamOptions options = homes(0, 0, 1);
      options.wrap_reader = [&](std::unique_ptr<BlockReader> reader) {
        Faults faults;
        faults.seed = which;
        (cut ? faults.cut_off : faults.fail) = which;
        return std::make_unique<FaultyReader>(std::move(reader), faults);
      };
      const std::string text = error_of(packed, options, Fault::io);
      EXPECT_THAT(text, HasSubstr(".tiles, offset ")) << text;
      EXPECT_THAT(text, HasSubstr("failed at byte ")) << text;
    }
  }
}

TEST(Stream, after_an_error_the_next_pass_is_whole_again) {
  const Packed packed("llama4_maverick_tiny", formats_of(WeightKind::int4));
  const Adapter adapter = random_adapter(packed.store->spec());
  const Tokens tokens = documents(packed.store->spec().vocab, 2);
  const Result want = run(*packed.decoder({}), adapter, tokens, Activations::kept, 1);
  StreamOptions options = homes(0, 0, 1);
  options.wrap_reader = [&](std::unique_ptr<BlockReader> reader) {
    Faults faults;
    faults.fail = 9;
    return std::make_unique<FaultyReader>(std::move(reader), faults);
  };
  const auto decoder = packed.decoder(options);
  EXPECT_THROW(run(*decoder, adapter, tokens, Activations::kept, 1), Error);
  expect_same_bits(run(*decoder, adapter, tokens, Activations::kept, 1), want, "second try");
}

TEST(Stream, a_damaged_tile_is_found_before_it_is_used) {
  const UnitId units[] = {{UnitKind::expert, 1, 2},
                          {UnitKind::attention, 0, 0},
                          {UnitKind::feed_forward, 1, 0},
                          {UnitKind::head, 0, 0}};
  for (const UnitId& id : units) {
    Packed packed("llama4_maverick_tiny", formats_of(WeightKind::int4));
    const StoredUnit unit = *packed.store->layout().find(id);
    for (int i = 0; i < 12; ++i) {
      const auto at = static_cast<std::int64_t>(
          random_bits(9, RandomStream::sample, static_cast<std::uint64_t>(i)) %
          static_cast<std::uint64_t>(unit.bytes));
      const int mask = 1 << (i % 8);
      change_byte(packed.place(id), at, mask);
      for (const std::int64_t budget : {std::int64_t{0}, 4 * packed.store->layout().bytes()}) {
        const std::string text = error_of(packed, homes(budget, 0), Fault::bad_file);
        EXPECT_THAT(text, HasSubstr(unit_text(id))) << "byte " << at;
      }
      change_byte(packed.place(id), at, mask);
    }
  }
}

TEST(Stream, damage_to_the_embedding_or_the_norm_is_found_where_they_are_loaded) {
  for (const UnitId& id : {UnitId{UnitKind::embedding, 0, 0}, UnitId{UnitKind::final_norm, 0, 0}}) {
    const Packed packed("llama4_maverick_tiny", formats_of(WeightKind::int4));
    change_byte(packed.place(id), kUnitHeaderBytes + 3, 4);
    EXPECT_THAT(error_of(packed, {}, Fault::bad_file), HasSubstr(unit_text(id)));
  }
}

TEST(Stream, a_file_pulled_away_mid_run_ends_the_step_and_nothing_hangs) {
  const Packed packed("llama4_maverick_tiny", formats_of(WeightKind::int4));
  const Adapter adapter = random_adapter(packed.store->spec());
  const Tokens tokens = documents(packed.store->spec().vocab, 2);
  const auto decoder = packed.decoder(homes(0, 0, 1));
  run(*decoder, adapter, tokens, Activations::kept, 1);
  const auto [file, offset] = packed.place({UnitKind::expert, 1, 1});
  fs::resize_file(file, static_cast<std::uintmax_t>(offset) + 4096);
  try {
    run(*decoder, adapter, tokens, Activations::kept, 1);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::io);
    EXPECT_THAT(to_text(error), HasSubstr("ends inside a tile"));
    EXPECT_THAT(to_text(error), HasSubstr("layer 1, expert 1"));
  }
}

TEST(Stream, a_budget_for_less_than_one_tile_says_what_would_do) {
  const Packed packed("llama4_maverick_tiny", formats_of(WeightKind::int4));
  std::int64_t smallest = 0;
  try {
    packed.decoder(homes(1, 0));
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::does_not_fit);
    const std::string text = to_text(error);
    EXPECT_THAT(text, HasSubstr("base.device_memory"));
    auto weights = StoreWeights::open(packed.store, at::kBFloat16, homes(0, 0));
    smallest = weights->facts().smallest_budget;
    EXPECT_THAT(text, HasSubstr(std::to_string(smallest)));
  }
  EXPECT_NO_THROW(packed.decoder(homes(smallest, 0)));
  EXPECT_THROW(packed.decoder(homes(smallest - 1, 0)), Error);
}

TEST(Stream, both_engines_and_the_page_cache_give_the_same_bits) {
  const Packed packed("llama4_maverick_tiny", formats_of(WeightKind::nf4));
  const Adapter adapter = random_adapter(packed.store->spec());
  const Tokens tokens = documents(packed.store->spec().vocab, 2);
  const Result want = run(*packed.decoder({}), adapter, tokens, Activations::kept);
  for (const bool direct : {true, false}) {
    for (const bool ring_is_forbidden : {false, true}) {
      StreamOptions options = homes(0, 0);
      options.reader.direct = direct;
      if (ring_is_forbidden) options.reader.pretend_queue_init_error = EPERM;
      auto weights = StoreWeights::open(packed.store, at::kBFloat16, options);
      if (ring_is_forbidden) {
        EXPECT_EQ(weights->facts().reader.engine, BlockReader::Engine::threads);
        EXPECT_THAT(weights->facts().reader.why, HasSubstr("Operation not permitted"));
      }
      const auto decoder = Decoder::create(std::move(weights), at::kBFloat16);
      expect_same_bits(run(*decoder, adapter, tokens, Activations::kept), want, "engine");
    }
  }
}

}  // namespace
}  // namespace tailor
