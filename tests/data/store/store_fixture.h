#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/units.h"
#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/published.h"
#include "data/quant/codec.h"
#include "data/quant/numbers.h"
#include "data/store/pack.h"
#include "data/store/source.h"
#include "data/store/store.h"
#include "data/store/verify.h"

namespace tailor::testing_support {

/// How a matrix is published.
enum class Published { f32, f16, bf16, fp8_blocks, fp8_rows, int4 };

/// A small Llama 4, or DeepSeek V3, with random weights. Its sizes are ragged on purpose: no
/// multiple of 128 or 8.
struct TinyModel {
  std::int64_t hidden = 72, heads = 4, kv_heads = 2, head_dim = 18, vocab = 150;
  std::int64_t dense_width = 200, expert_width = 136, experts = 3, layers = 2;
  bool fused = true;
  Published experts_as = Published::bf16, others_as = Published::bf16;
  std::int64_t int4_group = 32;
  Dtype scale_dtype =
      Dtype::bf16;             ///< of int4; fp8's are f32 unless this is bf16 and narrow_scales
  bool narrow_scales = false;  ///< fp8's scales as BF16
  bool scales_last = false;    ///< fused fp8 scales as [E, outputs, 1]
  int shards = 1;
  std::uint32_t seed = 1;
  const char* dtype = "bfloat16";
  bool deepseek = false;

  Json config() const {
    if (deepseek) return deepseek_config();
    return {{"architectures", {"Llama4ForCausalLM"}},
            {"model_type", "llama4_text"},
            {"torch_dtype", dtype},
            {"hidden_size", hidden},
            {"num_attention_heads", heads},
            {"num_key_value_heads", kv_heads},
            {"head_dim", head_dim},
            {"vocab_size", vocab},
            {"num_hidden_layers", layers},
            {"intermediate_size_mlp", dense_width},
            {"intermediate_size", expert_width},
            {"num_local_experts", experts},
            {"num_experts_per_tok", 1},
            {"interleave_moe_layer_step", 2}};
  }
  Json deepseek_config() const {
    return {{"architectures", {"DeepseekV3ForCausalLM"}},
            {"model_type", "deepseek_v3"},
            {"torch_dtype", dtype},
            {"hidden_size", hidden},
            {"num_attention_heads", heads},
            {"q_lora_rank", 24},
            {"kv_lora_rank", 16},
            {"qk_nope_head_dim", 10},
            {"qk_rope_head_dim", 8},
            {"v_head_dim", 12},
            {"vocab_size", vocab},
            {"num_hidden_layers", layers},
            {"first_k_dense_replace", 1},
            {"intermediate_size", dense_width},
            {"moe_intermediate_size", expert_width},
            {"n_shared_experts", 1},
            {"n_routed_experts", experts},
            {"n_group", 1},
            {"topk_group", 1},
            {"num_experts_per_tok", 2}};
  }
};

/// Where element (r, c) of a matrix lies in its tensor.
inline std::int64_t element_at(const PublishedMatrix& matrix, std::int64_t r, std::int64_t c) {
  if (!matrix.fused) return r * matrix.columns + c;
  return matrix.outputs_first
             ? (matrix.expert * matrix.width + matrix.first + r) * matrix.columns + c
             : (matrix.expert * matrix.columns + c) * matrix.width + matrix.first + r;
}

/// Tensors by name, with their bytes.
struct MadeTensor {
  Dtype dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;
};
using MadeTensors = std::vector<std::pair<std::string, MadeTensor>>;  // in the order of the layers

template <class T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  std::vector<std::byte> out(values.size() * sizeof(T));
  if (!out.empty()) std::memcpy(out.data(), values.data(), out.size());
  return out;
}

/// As the compiler rounds.
inline std::uint16_t half_bits(float value) {
  return std::bit_cast<std::uint16_t>(static_cast<_Float16>(value));
}

/// Makes the tensors of a TinyModel.
class ModelMaker {
 public:
  explicit ModelMaker(const TinyModel& model)
      : model_(model), random_(model.seed), spec_(model_spec_from_config(model.config(), "test")) {
    add(embedding_matrix(spec_), Published::bf16);
    for (std::int64_t l = 0; l < spec_.layer_count(); ++l) {
      for (const auto& matrix : attention_matrices(spec_, l)) add(matrix, model_.others_as);
      for (const auto& matrix : feed_forward_matrices(spec_, l)) add(matrix, model_.others_as);
      if (!spec_.layers[static_cast<std::size_t>(l)].moe) continue;
      if (model_.fused) {
        add_fused(l);
      } else {
        for (std::int64_t e = 0; e < spec_.experts; ++e) {
          for (const auto& matrix : expert_matrices(spec_, l, e, false)) {
            add(matrix, model_.experts_as);
          }
        }
      }
    }
    add(final_norm_matrix(spec_), Published::bf16);
    add(head_matrix(spec_), Published::bf16);
  }

  const ModelSpec& spec() const { return spec_; }
  MadeTensors& tensors() { return tensors_; }
  MadeTensor& tensor(const std::string& name) {
    for (auto& [each, tensor] : tensors_) {
      if (each == name) return tensor;
    }
    throw std::runtime_error("no tensor " + name);
  }
  void rename(const std::string& from, const std::string& to) {
    for (auto& [each, tensor] : tensors_) {
      if (each == from) each = to;
    }
  }
  void remove(const std::string& name) {
    std::erase_if(tensors_, [&](const auto& entry) { return entry.first == name; });
  }

  /// config.json, shards and index in `folder`.
  void write(const fs::path& folder) const {
    make_folders(folder);
    write_atomically(folder / "config.json", model_.config().dump(1));
    write_atomically(folder / "tokenizer_config.json", "{}");
    Json map = Json::object();
    const auto count = static_cast<std::size_t>(model_.shards);
    for (std::size_t i = 0; i < count; ++i) {
      std::vector<TensorToWrite> part;
      const std::string name = count == 1 ? "model.safetensors" : shard_name(i);
      const std::size_t begin = tensors_.size() * i / count,
                        end = tensors_.size() * (i + 1) / count;
      for (std::size_t t = begin; t < end; ++t) {
        const auto& [tensor, made] = tensors_[t];
        part.push_back({tensor, made.dtype, made.shape, made.bytes});
        map[tensor] = name;
      }
      write_safetensors(folder / name, part);
    }
    if (count > 1) {
      write_atomically(folder / "model.safetensors.index.json", Json{{"weight_map", map}}.dump());
    }
  }
  std::string shard_name(std::size_t i) const {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05d.safetensors", i + 1, model_.shards);
    return name;
  }

 private:
  std::vector<float> random_floats(std::int64_t rows, std::int64_t columns) {
    std::vector<float> out;
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      double total = -2 * 0x1p20;
      for (int k = 0; k < 4; ++k) {
        random_ = random_ * 1664525U + 1013904223U;
        total += static_cast<double>(random_ >> 12U);
      }
      out.push_back(static_cast<float>(std::ldexp(total, static_cast<int>(i / columns % 5) - 28)));
    }
    return out;
  }

  static bool small(MatrixRole role) {
    return role == MatrixRole::input_norm || role == MatrixRole::post_norm ||
           role == MatrixRole::final_norm || role == MatrixRole::router ||
           role == MatrixRole::q_a_norm || role == MatrixRole::kv_a_norm ||
           role == MatrixRole::router_bias;
  }

  /// Codes and scales of a matrix in its published form.
  struct Encoded {
    std::vector<std::byte> codes, scales;
    WeightFormat format;
  };
  Encoded encode(const std::vector<float>& values, std::int64_t rows, std::int64_t columns,
                 Published as) const {
    Encoded out;
    if (as == Published::f32) return {bytes_of(values), {}, WeightFormat::f32()};
    if (as == Published::f16) {
      std::vector<std::uint16_t> halves;
      for (const float value : values) halves.push_back(half_bits(value));
      return {bytes_of(halves), {}, WeightFormat::f32()};
    }
    out.format = as == Published::bf16         ? WeightFormat::bf16()
                 : as == Published::fp8_blocks ? WeightFormat::fp8_blocks()
                 : as == Published::fp8_rows   ? WeightFormat::fp8_rows()
                                               : WeightFormat::int4(model_.int4_group);
    out.codes.resize(static_cast<std::size_t>(code_bytes(out.format, rows, columns)));
    out.scales.resize(static_cast<std::size_t>(scale_bytes(out.format, rows, columns)));
    MatrixEncoder encoder(out.format, rows, columns, out.codes.data(), out.scales.data());
    encoder.add_rows(0, rows, values.data());
    static_cast<void>(encoder.finish());
    return out;
  }

  /// bfloat16 scales as the model's type; of other types some bits more, so that they count.
  std::vector<std::byte> typed_scales(const std::vector<std::byte>& bf16, Dtype to) const {
    std::vector<float> wide;
    std::vector<std::uint16_t> halves;
    for (std::size_t i = 0; i < bf16.size() / 2; ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, bf16.data() + 2 * i, 2);
      const float value = bf16_to_float(bits) * 1.001F;
      wide.push_back(value);
      if (to == Dtype::f16) halves.push_back(half_bits(value));
    }
    return to == Dtype::bf16 ? bf16 : to == Dtype::f16 ? bytes_of(halves) : bytes_of(wide);
  }

  /// fp8's float scales as they are, or as BF16.
  MadeTensor fp8_scales(const std::vector<std::byte>& floats,
                        std::vector<std::int64_t> shape) const {
    if (!model_.narrow_scales) return {Dtype::f32, std::move(shape), floats};
    std::vector<std::uint16_t> narrow_ones;
    for (std::size_t i = 0; i < floats.size() / 4; ++i) {
      float value;
      std::memcpy(&value, floats.data() + 4 * i, 4);
      narrow_ones.push_back(bf16_from_float(value));
    }
    return {Dtype::bf16, std::move(shape), bytes_of(narrow_ones)};
  }

  void add(const PublishedMatrix& matrix, Published as) {
    if (small(matrix.role)) as = Published::bf16;
    const std::int64_t rows = matrix.rows, columns = matrix.columns;
    const Encoded made = encode(random_floats(rows, columns), rows, columns, as);
    std::vector<std::int64_t> shape = {rows, columns};
    if (rows == 1) shape = {columns};
    switch (as) {
      case Published::f32:
        tensors_.emplace_back(matrix.name, MadeTensor{Dtype::f32, shape, made.codes});
        break;
      case Published::f16:
        tensors_.emplace_back(matrix.name, MadeTensor{Dtype::f16, shape, made.codes});
        break;
      case Published::bf16:
        tensors_.emplace_back(matrix.name, MadeTensor{Dtype::bf16, shape, made.codes});
        break;
      case Published::fp8_blocks:
        tensors_.emplace_back(matrix.name, MadeTensor{Dtype::f8_e4m3, shape, made.codes});
        tensors_.emplace_back(
            matrix.name + "_scale_inv",
            fp8_scales(made.scales, {div_ceil(rows, 128), div_ceil(columns, 128)}));
        break;
      case Published::fp8_rows:
        tensors_.emplace_back(matrix.name, MadeTensor{Dtype::f8_e4m3, shape, made.codes});
        tensors_.emplace_back(matrix.name + "_scale", fp8_scales(made.scales, {rows, 1}));
        break;
      case Published::int4: {
        const std::string module = matrix.name.substr(0, matrix.name.rfind('.'));
        tensors_.emplace_back(module + ".weight_packed",
                              MadeTensor{Dtype::i32, {rows, div_ceil(columns, 8)}, made.codes});
        tensors_.emplace_back(module + ".weight_scale",
                              MadeTensor{model_.scale_dtype,
                                         {rows, div_ceil(columns, model_.int4_group)},
                                         typed_scales(made.scales, model_.scale_dtype)});
        tensors_.emplace_back(
            module + ".weight_shape",
            MadeTensor{Dtype::i64, {2}, bytes_of(std::vector<std::int64_t>{rows, columns})});
        break;
      }
    }
  }

  /// All experts' gate and up, and all experts' down: inputs first, of DeepSeek outputs first.
  void add_fused(std::int64_t layer) {
    MadeTensor tensors[2], scales[2];
    std::string names[2];
    std::vector<std::byte> raw_scales[2];
    for (std::int64_t e = 0; e < spec_.experts; ++e) {
      for (const PublishedMatrix& matrix : expert_matrices(spec_, layer, e, true)) {
        const int which = matrix.role == MatrixRole::down ? 1 : 0;
        const Encoded made = encode(random_floats(matrix.rows, matrix.columns), matrix.rows,
                                    matrix.columns, model_.experts_as);
        const auto size =
            static_cast<std::int64_t>(made.codes.size()) / matrix.rows / matrix.columns;
        MadeTensor& tensor = tensors[which];
        names[which] = matrix.name;
        tensor.shape = matrix.tensor_shape(spec_.experts);
        tensor.dtype = model_.experts_as == Published::f32    ? Dtype::f32
                       : model_.experts_as == Published::f16  ? Dtype::f16
                       : model_.experts_as == Published::bf16 ? Dtype::bf16
                                                              : Dtype::f8_e4m3;
        tensor.bytes.resize(
            static_cast<std::size_t>(spec_.experts * matrix.columns * matrix.width * size));
        for (std::int64_t r = 0; r < matrix.rows; ++r) {
          for (std::int64_t c = 0; c < matrix.columns; ++c) {
            std::memcpy(tensor.bytes.data() + element_at(matrix, r, c) * size,
                        made.codes.data() + (r * matrix.columns + c) * size,
                        static_cast<std::size_t>(size));
          }
        }
        raw_scales[which].insert(raw_scales[which].end(), made.scales.begin(), made.scales.end());
        const std::vector<std::int64_t> last = {spec_.experts, matrix.width, 1};
        const std::vector<std::int64_t> middle = {spec_.experts, 1, matrix.width};
        scales[which].shape = model_.scales_last ? last : middle;
        if (model_.experts_as == Published::fp8_blocks) {
          scales[which].shape = {spec_.experts,
                                 matrix.width / matrix.rows * div_ceil(matrix.rows, 128),
                                 div_ceil(matrix.columns, 128)};
        }
      }
    }
    for (int which : {0, 1}) {
      tensors_.emplace_back(names[which], tensors[which]);
      const bool blocks = model_.experts_as == Published::fp8_blocks;
      if (!blocks && model_.experts_as != Published::fp8_rows) continue;
      tensors_.emplace_back(names[which] + (blocks ? "_scale_inv" : "_scale"),
                            fp8_scales(raw_scales[which], scales[which].shape));
    }
  }

  TinyModel model_;
  std::uint32_t random_;
  ModelSpec spec_;
  MadeTensors tensors_;
};

/// A folder of the test's own, gone afterwards, with a model and a store in it.
class StoreTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = testing::UnitTest::GetInstance()->current_test_info()->name();
    std::replace(name.begin(), name.end(), '/', '_');
    folder_ =
        fs::path(testing::TempDir()) / ("tailor_store_" + std::to_string(::getpid()) + "_" + name);
    fs::remove_all(folder_);
    make_folders(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path model() const { return folder_ / "model"; }
  fs::path store() const { return folder_ / "store"; }
  static fs::path golden(const std::string& name) {
    return fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name / "model";
  }

  static PackOptions options(FormatChoice experts = {}, FormatChoice others = {}) {
    PackOptions out;
    out.formats = {experts, others};
    out.source = "test";
    out.threads = 2;
    out.poll_seconds = 0.02;
    return out;
  }

  /// Problems of a store against a checkpoint; without one of its hashes alone.
  static std::vector<std::string> problems(const fs::path& store, const fs::path& against = {}) {
    const Store opened = Store::open(store);
    std::optional<Checkpoint> checkpoint;
    if (!against.empty()) checkpoint = Checkpoint::open(against);
    VerifyOptions verify;
    verify.against = checkpoint ? &*checkpoint : nullptr;
    const VerifyReport report = verify_store(opened, verify);
    EXPECT_EQ(report.units, static_cast<std::int64_t>(opened.layout().units.size()));
    EXPECT_EQ(report.bytes, opened.layout().bytes());
    return report.problems;
  }

  fs::path folder_;
};

constexpr FormatChoice int4_of(std::int64_t group = 0) { return {false, WeightKind::int4, group}; }
constexpr FormatChoice as(WeightKind kind) { return {false, kind, 0}; }

/// Every file below a folder with its bytes.
inline std::map<std::string, std::string> files_of(const fs::path& folder) {
  std::map<std::string, std::string> out;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) {
      out[fs::relative(entry.path(), folder).string()] = read_text(entry.path());
    }
  }
  return out;
}

/// Two stores byte by byte; the names of files that differ.
inline std::vector<std::string> differing_files(const fs::path& a, const fs::path& b) {
  const auto left = files_of(a), right = files_of(b);
  std::vector<std::string> out;
  for (const auto& [name, bytes] : left) {
    const auto found = right.find(name);
    if (found == right.end() || found->second != bytes) out.push_back(name);
  }
  for (const auto& [name, bytes] : right) {
    if (left.count(name) == 0) out.push_back(name);
  }
  return out;
}

/// The text of the Error that `body` throws, with `folder` written as DIR; its fault must be
/// `fault`.
template <class Body>
std::string error_of(const Body& body, const fs::path& folder, Fault fault = Fault::bad_file) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), fault) << to_text(error);
    EXPECT_FALSE(error.parts().what.empty() || error.parts().where.empty() ||
                 error.parts().mend.empty())
        << to_text(error);
    std::string text = to_text(error);
    const std::string name = folder.string();
    for (std::size_t at = 0; !name.empty() && (at = text.find(name, at)) != std::string::npos;) {
      text.replace(at, name.size(), "DIR");
    }
    return text;
  }
  return "no error";
}

/// Changes bytes of a file in place.
inline void change_bytes(const fs::path& path, std::int64_t offset, const void* bytes,
                         std::size_t count) {
  std::string text = read_text(path);
  text.replace(static_cast<std::size_t>(offset), count, static_cast<const char*>(bytes), count);
  FileWriter writer(path);
  writer.write(text);
  writer.close();
}

}  // namespace tailor::testing_support
