// Every form a checkpoint may be published in is read exactly, and what cannot be read is refused
// before a byte is written.

#include "data/store/source_forms.h"
#include "tests/data/store/store_fixture.h"

namespace tailor::testing_support {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;

template <class T>
T element_of(const std::vector<std::byte>& bytes, std::int64_t index) {
  T value;
  std::memcpy(&value, bytes.data() + index * static_cast<std::int64_t>(sizeof(T)), sizeof value);
  return value;
}

/// e4m3 by its definition: 4 exponent bits of bias 7, 3 of mantissa.
double e4m3(std::uint8_t code) {
  const int exponent = code >> 3U & 15U, mantissa = code & 7U;
  const double size =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (code & 128U) != 0 ? -size : size;
}

double number_of(const MadeTensor& tensor, std::int64_t index) {
  switch (tensor.dtype) {
    case Dtype::f32:
      return double{element_of<float>(tensor.bytes, index)};
    case Dtype::bf16:
      return double{bf16_to_float(element_of<std::uint16_t>(tensor.bytes, index))};
    case Dtype::f16: {
      const auto bits = element_of<std::uint16_t>(tensor.bytes, index);
      const int exponent = bits >> 10U & 31U;
      const double size = exponent == 0 ? std::ldexp(bits & 1023U, -24)
                                        : std::ldexp(1024 + (bits & 1023U), exponent - 25);
      return (bits & 0x8000U) != 0 ? -size : size;
    }
    case Dtype::f8_e4m3:
      return e4m3(element_of<std::uint8_t>(tensor.bytes, index));
    default:
      throw std::runtime_error("a type of weights");
  }
}

/// Of a matrix's blocks of 128 x 128 the one that holds (r, c), and where the first one's scale is.
std::int64_t block_of(const PublishedMatrix& matrix, std::int64_t r, std::int64_t c) {
  return r / 128 * div_ceil(matrix.columns, 128) + c / 128;
}
std::int64_t first_block(const PublishedMatrix& matrix) {
  if (!matrix.fused) return 0;
  const std::int64_t of_one = div_ceil(matrix.rows, 128) * div_ceil(matrix.columns, 128);
  if (matrix.role == MatrixRole::down) return matrix.expert * of_one;
  return (2 * matrix.expert + (matrix.role == MatrixRole::up ? 1 : 0)) * of_one;
}

/// What the published tensors say an element is, one at a time.
float published_value(ModelMaker& maker, const PublishedMatrix& matrix, Published as_published,
                      const TinyModel& tiny, std::int64_t r, std::int64_t c) {
  if (as_published == Published::int4) {
    const std::string module = matrix.name.substr(0, matrix.name.rfind('.'));
    const auto word = element_of<std::uint32_t>(maker.tensor(module + ".weight_packed").bytes,
                                                r * div_ceil(matrix.columns, 8) + c / 8);
    const int code = static_cast<int>(word >> (4 * (c % 8)) & 15U) - 8;
    const auto& scales = maker.tensor(module + ".weight_scale");
    const auto scale = static_cast<float>(
        number_of(scales, r * div_ceil(matrix.columns, tiny.int4_group) + c / tiny.int4_group));
    const float product = static_cast<float>(code) * scale;
    return scales.dtype == Dtype::f32   ? product
           : scales.dtype == Dtype::f16 ? static_cast<float>(static_cast<_Float16>(product))
                                        : bf16_to_float(bf16_from_float(product));
  }
  const MadeTensor& tensor = maker.tensor(matrix.name);
  const auto value = static_cast<float>(number_of(tensor, element_at(matrix, r, c)));
  if (as_published == Published::fp8_blocks) {
    return value * static_cast<float>(number_of(maker.tensor(matrix.name + "_scale_inv"),
                                                first_block(matrix) + block_of(matrix, r, c)));
  }
  if (as_published == Published::fp8_rows) {
    const std::int64_t row = matrix.fused ? matrix.expert * matrix.width + matrix.first + r : r;
    return value * static_cast<float>(number_of(maker.tensor(matrix.name + "_scale"), row));
  }
  return value;
}

struct SourceCase {
  const char* name;
  Published published;
  bool fused = false;
  Dtype scale_dtype = Dtype::bf16;
  bool narrow_scales = false, scales_last = false;
  std::int64_t group = 32;
  std::int64_t deepseek_width = 0;  ///< of its experts; 0: Llama 4
};
const std::vector<SourceCase> kSources = {
    {"f32", Published::f32},
    {"f16", Published::f16},
    {"bf16", Published::bf16},
    {"f32_fused", Published::f32, true},
    {"f16_fused", Published::f16, true},
    {"bf16_fused", Published::bf16, true},
    {"fp8_blocks", Published::fp8_blocks},
    {"fp8_blocks_bf16_scales", Published::fp8_blocks, false, Dtype::bf16, true},
    {"fp8_rows", Published::fp8_rows},
    {"fp8_fused", Published::fp8_rows, true},
    {"fp8_fused_scales_last", Published::fp8_rows, true, Dtype::bf16, false, true},
    {"fp8_fused_bf16_scales", Published::fp8_rows, true, Dtype::bf16, true},
    {"int4_32", Published::int4},
    {"int4_64_ragged", Published::int4, false, Dtype::bf16, false, false, 64},
    {"int4_128_ragged", Published::int4, false, Dtype::bf16, false, false, 128},
    {"int4_f16_scales", Published::int4, false, Dtype::f16},
    {"int4_f32_scales", Published::int4, false, Dtype::f32},
    {"bf16_fused_outputs_first", Published::bf16, true, Dtype::bf16, false, false, 32, 136},
    {"fp8_fused_blocks", Published::fp8_blocks, true, Dtype::bf16, false, false, 32, 256},
    {"fp8_fused_blocks_of_one", Published::fp8_blocks, true, Dtype::bf16, false, false, 32, 72},
    {"fp8_fused_blocks_bf16_scales", Published::fp8_blocks, true, Dtype::bf16, true, false, 32,
     128},
};

class Source : public StoreTest {
 protected:
  static TinyModel tiny_of(const SourceCase& source) {
    TinyModel tiny;
    tiny.fused = source.fused;
    tiny.experts_as = source.published;
    tiny.scale_dtype = source.scale_dtype;
    tiny.narrow_scales = source.narrow_scales;
    tiny.scales_last = source.scales_last;
    tiny.int4_group = source.group;
    if (source.deepseek_width > 0) {
      tiny.deepseek = true;
      tiny.expert_width = source.deepseek_width;
      tiny.hidden = 200;
      if (source.published == Published::fp8_blocks) tiny.others_as = source.published;
    }
    if (!source.fused) tiny.others_as = source.published;
    return tiny;
  }
};

TEST_F(Source, every_form_is_read_exactly_whole_and_in_pieces) {
  for (const SourceCase& source : kSources) {
    SCOPED_TRACE(source.name);
    const TinyModel tiny = tiny_of(source);
    ModelMaker maker(tiny);
    maker.write(model());
    const Checkpoint checkpoint = Checkpoint::open(model());
    SourceReader reader(checkpoint);
    for (std::int64_t e = 0; e < tiny.experts; ++e) {
      for (const auto& matrix : expert_matrices(maker.spec(), 1, e, tiny.fused)) {
        std::vector<float> whole(static_cast<std::size_t>(matrix.rows * matrix.columns)), pieces;
        reader.read_rows(matrix, 0, matrix.rows, whole.data());
        for (std::int64_t r = 0; r < matrix.rows; r += 37) {
          const std::int64_t end = std::min(matrix.rows, r + 37);
          std::vector<float> piece(static_cast<std::size_t>((end - r) * matrix.columns));
          reader.read_rows(matrix, r, end, piece.data());
          pieces.insert(pieces.end(), piece.begin(), piece.end());
        }
        EXPECT_EQ(pieces, whole) << matrix.name;
        std::int64_t wrong = 0;
        for (std::int64_t r = 0; r < matrix.rows; ++r) {
          for (std::int64_t c = 0; c < matrix.columns; ++c) {
            const float wanted = published_value(maker, matrix, source.published, tiny, r, c);
            wrong += whole[static_cast<std::size_t>(r * matrix.columns + c)] != wanted ? 1 : 0;
          }
        }
        EXPECT_EQ(wrong, 0) << matrix.name << " " << role_name(matrix.role);
      }
    }
    fs::remove_all(model());
  }
}

/// A published fp8 or INT4 model keeps codes and scales bit for bit, as it is and when the format
/// is asked for by name.
TEST_F(Source, codes_and_scales_of_the_same_format_are_kept) {
  for (const SourceCase& source : kSources) {
    if (source.published != Published::int4 && source.published != Published::fp8_blocks &&
        source.published != Published::fp8_rows) {
      continue;
    }
    if (source.scale_dtype != Dtype::bf16) continue;  // see below
    const TinyModel tiny = tiny_of(source);
    ModelMaker maker(tiny);
    maker.write(model());
    const WeightKind kind =
        source.published == Published::int4 ? WeightKind::int4 : WeightKind::fp8;
    for (const FormatChoice& choice : {FormatChoice{}, FormatChoice{false, kind, source.group}}) {
      SCOPED_TRACE(source.name);
      fs::remove_all(store());
      const PackReport report = pack_store(model(), store(), options(choice));
      EXPECT_THAT(report.errors, IsEmpty()) << "nothing was quantised";
      const Store packed = Store::open(store());
      for (std::int64_t e = 0; e < tiny.experts; ++e) {
        const StoredUnit& unit = *packed.layout().find({UnitKind::expert, 1, e});
        const std::string file = read_text(packed.path_of(unit));
        const auto* bytes = reinterpret_cast<const std::byte*>(file.data()) + unit.offset;
        const auto matrices = expert_matrices(maker.spec(), 1, e, tiny.fused);
        for (std::size_t i = 0; i < matrices.size(); ++i) {
          const PublishedMatrix& matrix = matrices[i];
          const MatrixPlace& place = unit.matrices[i];
          std::vector<std::byte> codes(bytes + place.codes_offset,
                                       bytes + place.codes_offset + place.codes_bytes);
          std::vector<std::byte> scales(bytes + place.scales_offset,
                                        bytes + place.scales_offset + place.scales_bytes);
          if (source.published == Published::int4) {
            const std::string module = matrix.name.substr(0, matrix.name.rfind('.'));
            EXPECT_EQ(codes, maker.tensor(module + ".weight_packed").bytes);
            EXPECT_EQ(scales, maker.tensor(module + ".weight_scale").bytes);
            continue;
          }
          const MadeTensor& tensor = maker.tensor(matrix.name);
          std::vector<std::byte> wanted(codes.size());
          for (std::int64_t r = 0; r < matrix.rows; ++r) {
            for (std::int64_t c = 0; c < matrix.columns; ++c) {
              wanted[static_cast<std::size_t>(r * matrix.columns + c)] =
                  tensor.bytes[static_cast<std::size_t>(element_at(matrix, r, c))];
            }
          }
          EXPECT_EQ(codes, wanted);
          const MadeTensor& published = maker.tensor(
              matrix.name + (source.published == Published::fp8_rows ? "_scale" : "_scale_inv"));
          const std::int64_t first = source.published == Published::fp8_blocks ? first_block(matrix)
                                     : matrix.fused ? e * matrix.width + matrix.first
                                                    : 0;
          for (std::int64_t s = 0; s < static_cast<std::int64_t>(scales.size()) / 4; ++s) {
            ASSERT_EQ(double{element_of<float>(scales, s)}, number_of(published, first + s));
          }
        }
      }
      EXPECT_THAT(problems(store(), model()), IsEmpty());
    }
    fs::remove_all(model());
  }
}

TEST_F(Source, wider_scales_of_int4_are_rounded_and_the_codes_kept) {
  for (const Dtype type : {Dtype::f16, Dtype::f32}) {
    SourceCase source{"", Published::int4};
    source.scale_dtype = type;
    ModelMaker maker(tiny_of(source));
    maker.write(model());
    pack_store(model(), store(), options());
    const Store packed = Store::open(store());
    const StoredUnit& unit = *packed.layout().find({UnitKind::expert, 1, 2});
    const std::string file = read_text(packed.path_of(unit));
    const MatrixPlace& gate = unit.matrices[0];
    const std::string module = "model.layers.1.feed_forward.experts.2.gate_proj";
    const auto* bytes = reinterpret_cast<const std::byte*>(file.data()) + unit.offset;
    const MadeTensor& codes = maker.tensor(module + ".weight_packed");
    EXPECT_EQ(std::memcmp(bytes + gate.codes_offset, codes.bytes.data(), codes.bytes.size()), 0);
    const MadeTensor& scales = maker.tensor(module + ".weight_scale");
    for (std::int64_t i = 0; i < gate.scales_bytes / 2; ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, bytes + gate.scales_offset + 2 * i, 2);
      ASSERT_EQ(bits, bf16_from_float(static_cast<float>(number_of(scales, i))));
    }
    fs::remove_all(model());
    fs::remove_all(store());
  }
}

TEST(Int4Group, follows_from_the_number_of_scales) {
  EXPECT_EQ(int4_group_of(256, 2), 128);
  EXPECT_EQ(int4_group_of(200, 2), 128);  // 128 and 72, not 100 and 100
  EXPECT_EQ(int4_group_of(200, 4), 64);
  EXPECT_EQ(int4_group_of(96, 3), 32);
  EXPECT_EQ(int4_group_of(96, 1), 96);
  EXPECT_EQ(int4_group_of(7168, 56), 128);
  EXPECT_EQ(int4_group_of(60, 5), 12);
  EXPECT_EQ(int4_group_of(61, 5), 0);
  EXPECT_EQ(int4_group_of(8, 9), 0);
  EXPECT_EQ(int4_group_of(8, 0), 0);
}

// ------------------------------------------------------------------ what cannot be read

struct BadCase {
  const char* name;
  Published published;
  bool fused;
  void (*spoil)(ModelMaker&);
  const char* what;
  const char* tensor;
  std::int64_t deepseek_width = 0;
};
const std::string kGate = "model.layers.1.feed_forward.experts.1.gate_proj";
const std::string kQ = "model.layers.0.self_attn.q_proj";
const std::string kFused = "model.layers.1.feed_forward.experts.gate_up_proj";
const std::string kDeepseek = "model.layers.1.mlp.experts.gate_up_proj";
const std::string kKvA = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight";

const std::vector<BadCase> kBad = {
    {"fp8_without_scales", Published::fp8_blocks, false,
     [](ModelMaker& m) { m.remove(kGate + ".weight_scale_inv"); }, "fp8 weights without scales",
     "experts.1.gate_proj.weight"},
    {"fused_fp8_without_scales", Published::fp8_rows, true,
     [](ModelMaker& m) { m.remove(kFused + "_scale"); }, "fp8 weights without scales",
     "experts.gate_up_proj"},
    {"wrong_block_size", Published::fp8_blocks, false,
     [](ModelMaker& m) {
       m.tensor(kGate + ".weight_scale_inv") = {Dtype::f32, {3, 2}, std::vector<std::byte>(24)};
     },
     "fp8 scales of shape [3, 2] fit neither blocks of 128 x 128 nor the outputs of weights of "
     "shape [136, 72]",
     "experts.1.gate_proj.weight_scale_inv"},
    {"one_scale_for_all", Published::fp8_rows, false,
     [](ModelMaker& m) {
       m.tensor(kGate + ".weight_scale") = {Dtype::f32, {1}, std::vector<std::byte>(4)};
     },
     "fp8 scales of shape [1] fit neither", "experts.1.gate_proj.weight_scale"},
    {"fused_scales_of_another_size", Published::fp8_rows, true,
     [](ModelMaker& m) {
       m.tensor(kFused + "_scale") = {Dtype::f32, {3, 72, 1}, std::vector<std::byte>(3 * 72 * 4)};
     },
     "fp8 scales of shape [3, 72, 1] are not one for every output", "experts.gate_up_proj_scale"},
    {"scales_of_another_type", Published::fp8_blocks, false,
     [](ModelMaker& m) {
       auto& scales = m.tensor(kGate + ".weight_scale_inv");
       scales = {Dtype::i32, scales.shape, scales.bytes};
     },
     "scales of type I32 are not supported", "experts.1.gate_proj.weight_scale_inv"},
    {"int4_zero_points", Published::int4, false,
     [](ModelMaker& m) {
       m.tensors().emplace_back(kGate + ".weight_zero_point",
                                MadeTensor{Dtype::i32, {1}, std::vector<std::byte>(4)});
     },
     "asymmetric or reordered INT4 weights", "experts.1.gate_proj.weight_zero_point"},
    {"int4_reordered", Published::int4, false,
     [](ModelMaker& m) {
       m.tensors().emplace_back(kGate + ".weight_g_idx",
                                MadeTensor{Dtype::i32, {72}, std::vector<std::byte>(288)});
     },
     "asymmetric or reordered INT4 weights", "experts.1.gate_proj.weight_g_idx"},
    {"int4_without_scales", Published::int4, false,
     [](ModelMaker& m) { m.remove(kGate + ".weight_scale"); },
     "tensor 'model.layers.1.feed_forward.experts.1.gate_proj.weight_scale' is missing", ""},
    {"int4_scales_of_another_size", Published::int4, false,
     [](ModelMaker& m) {
       m.tensor(kGate + ".weight_scale") = {Dtype::bf16, {136, 7}, std::vector<std::byte>(1904)};
     },
     "scales of shape [136, 7] do not cover a matrix of [136, 72]",
     "experts.1.gate_proj.weight_scale"},
    {"int4_of_another_shape", Published::int4, false,
     [](ModelMaker& m) {
       m.tensor(kGate + ".weight_shape").bytes = bytes_of(std::vector<std::int64_t>{136, 70});
     },
     "weight_shape says [136, 70], config.json asks for [136, 72]",
     "experts.1.gate_proj.weight_shape"},
    {"int8_packed", Published::int4, false,
     [](ModelMaker& m) {
       m.tensor(kGate + ".weight_packed") = {
           Dtype::i32, {136, 18}, std::vector<std::byte>(136 * 18 * 4)};
     },
     "is [136, 18], config.json asks for [136, 9]", "experts.1.gate_proj.weight_packed"},
    {"int4_in_bytes", Published::int4, false,
     [](ModelMaker& m) {
       m.tensor(kGate + ".weight_packed") = {Dtype::u8, {136, 36}, std::vector<std::byte>(4896)};
     },
     "packed weights are U8, not I32", "experts.1.gate_proj.weight_packed"},
    {"integers", Published::bf16, false,
     [](ModelMaker& m) {
       auto& gate = m.tensor(kGate + ".weight");
       gate = {Dtype::i16, gate.shape, gate.bytes};
     },
     "weights of type I16 are not supported", "experts.1.gate_proj.weight"},
    {"doubles", Published::bf16, false,
     [](ModelMaker& m) {
       m.tensor(kQ + ".weight") = {Dtype::f64, {72, 72}, std::vector<std::byte>(72 * 72 * 8)};
     },
     "weights of type F64 are not supported", "layers.0.self_attn.q_proj.weight"},
    {"another_shape", Published::bf16, false,
     [](ModelMaker& m) {
       m.tensor(kGate + ".weight") = {Dtype::bf16, {72, 136}, std::vector<std::byte>(72 * 136 * 2)};
     },
     "is [72, 136], config.json asks for [136, 72]", "experts.1.gate_proj.weight"},
    {"fused_of_another_shape", Published::bf16, true,
     [](ModelMaker& m) {
       auto& fused = m.tensor(kFused);
       fused.shape = {3, 272, 72};
     },
     "is [3, 272, 72], config.json asks for [experts, 72, 272]", "experts.gate_up_proj"},
    {"deepseek_fused_fp8_without_scales", Published::fp8_blocks, true,
     [](ModelMaker& m) { m.remove(kDeepseek + "_scale_inv"); }, "fp8 weights without scales",
     "hold model.layers.1.mlp.experts.gate_up_proj_scale_inv", 256},
    {"deepseek_fused_fp8_with_scales_of_outputs", Published::fp8_blocks, true,
     [](ModelMaker& m) { m.rename(kDeepseek + "_scale_inv", kDeepseek + "_scale"); },
     "fp8 weights without scales", "hold model.layers.1.mlp.experts.gate_up_proj_scale_inv", 256},
    {"deepseek_fused_blocks_of_another_size", Published::fp8_blocks, true,
     [](ModelMaker& m) {
       m.tensor(kDeepseek + "_scale_inv") = {
           Dtype::f32, {3, 8, 2}, std::vector<std::byte>(3 * 8 * 2 * 4)};
     },
     "fp8 scales of shape [3, 8, 2] are not [3, 4, 2], one for 128 x 128 of weights of shape "
     "[3, 512, 200]",
     "experts.gate_up_proj_scale_inv", 256},
    {"deepseek_fused_blocks_not_square", Published::fp8_blocks, true,
     [](ModelMaker& m) {
       m.tensor(kDeepseek + "_scale_inv") = {
           Dtype::f32, {3, 4, 4}, std::vector<std::byte>(3 * 4 * 4 * 4)};
     },
     "fp8 scales of shape [3, 4, 4] are not [3, 4, 2]", "experts.gate_up_proj_scale_inv", 256},
    {"deepseek_fused_scales_turned", Published::fp8_blocks, true,
     [](ModelMaker& m) {
       m.tensor(kDeepseek + "_scale_inv").shape = {3, 2, 4};
     },
     "fp8 scales of shape [3, 2, 4] are not [3, 4, 2]", "experts.gate_up_proj_scale_inv", 256},
    {"deepseek_fused_weights_turned", Published::fp8_blocks, true,
     [](ModelMaker& m) {
       m.tensor(kDeepseek).shape = {3, 200, 512};
     },
     "is [3, 200, 512], config.json asks for [experts, 512, 200]", "experts.gate_up_proj", 256},
    {"deepseek_fused_blocks_in_gate_and_up", Published::fp8_blocks, true, [](ModelMaker&) {},
     "blocks of 128 rows do not divide the 136 outputs of gate and of up, which share this tensor",
     "experts.gate_up_proj", 136},
    {"deepseek_fp8_without_scales", Published::fp8_blocks, true,
     [](ModelMaker& m) { m.remove(kKvA + "_scale_inv"); }, "fp8 weights without scales",
     "hold model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", 256},
    {"deepseek_blocks_not_square", Published::fp8_blocks, true,
     [](ModelMaker& m) {
       m.tensor(kKvA + "_scale_inv") = {Dtype::f32, {1, 4}, std::vector<std::byte>(16)};
     },
     "fp8 scales of shape [1, 4] fit neither blocks of 128 x 128 nor the outputs of weights of "
     "shape [24, 200]",
     "layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", 256},
    {"a_missing_expert", Published::bf16, false, [](ModelMaker& m) { m.remove(kGate + ".weight"); },
     "experts.1.gate_proj.weight' is missing", ""},
};

TEST_F(Source, what_cannot_be_read_is_refused_before_anything_is_written) {
  for (const BadCase& bad : kBad) {
    SCOPED_TRACE(bad.name);
    SourceCase source{bad.name, bad.published, bad.fused};
    source.deepseek_width = bad.deepseek_width;
    TinyModel tiny = tiny_of(source);
    if (bad.deepseek_width == 0) tiny.others_as = Published::bf16;
    ModelMaker maker(tiny);
    bad.spoil(maker);
    maker.write(model());
    const std::string error =
        error_of([&] { pack_store(model(), store(), options(int4_of())); }, folder_);
    EXPECT_THAT(error, AllOf(HasSubstr(bad.what), HasSubstr(bad.tensor)));
    EXPECT_FALSE(fs::exists(store()));
    fs::remove_all(store());
    fs::remove_all(model());
  }
}

/// config.json is judged before a shard is opened: here there is none that could be.
TEST_F(Source, a_model_of_another_family_is_refused_before_its_weights_are_opened) {
  TinyModel tiny;
  tiny.deepseek = true;
  ModelMaker(tiny).write(model());
  write_atomically(model() / "model.safetensors", "these are no weights");
  for (const auto& [key, value, what] :
       {std::tuple{"model_type", Json("deepseek_v4"), "model_type 'deepseek_v4' is not supported"},
        std::tuple{"hc_mult", Json(4), "hc_mult is 4, which Tailor does not implement"},
        std::tuple{"num_key_value_heads", Json(1), "num_key_value_heads is 1, needed: 4"},
        std::tuple{"topk_method", Json("greedy"), "topk_method is \"greedy\", which"}}) {
    Json config = tiny.config();
    config[key] = value;
    write_atomically(model() / "config.json", config.dump());
    const std::string error =
        error_of([&] { pack_store(model(), store(), options(int4_of())); }, folder_);
    EXPECT_THAT(error, AllOf(HasSubstr(what), HasSubstr("DIR/model/config.json")));
    EXPECT_FALSE(fs::exists(store() / kManifestName));
    fs::remove_all(store());
  }
}

TEST_F(Source, a_type_nobody_knows_is_refused_before_anything_is_written) {
  ModelMaker(TinyModel{}).write(model());
  std::string file = read_text(model() / "model.safetensors");
  const std::size_t at = file.find("\"BF16\"");
  change_bytes(model() / "model.safetensors", static_cast<std::int64_t>(at), "\"BF17\"", 6);
  EXPECT_THAT(error_of([&] { pack_store(model(), store(), options()); }, folder_),
              AllOf(HasSubstr("element type 'BF17' is not known"), HasSubstr("tensor model.")));
  EXPECT_FALSE(fs::exists(store()));
}

/// A number that is none shows only when it is read: the unit is not written, and the store is not
/// finished.
TEST_F(Source, numbers_that_are_none_are_refused_by_tensor_row_and_column) {
  struct NanCase {
    Published published;
    bool fused;
    std::string tensor;
    std::int64_t offset;
    std::vector<std::uint8_t> bytes;
    const char* place;
    std::int64_t deepseek_width = 0;
  };
  // Row 3, column 5 of the expert 1's gate matrix [136, 72]; of fused ones [3, 72, 272].
  const std::int64_t plain = 3 * 72 + 5, fused = (72 + 5) * 272 + 3;
  const std::vector<NanCase> cases = {
      {Published::f32, false, kGate + ".weight", plain * 4, {0, 0, 0xC0, 0x7F}, "row 3, column 5"},
      {Published::f16, false, kGate + ".weight", plain * 2, {0, 0x7C}, "row 3, column 5"},
      {Published::bf16, false, kGate + ".weight", plain * 2, {0x80, 0xFF}, "row 3, column 5"},
      {Published::bf16, true, kFused, fused * 2, {0xC0, 0x7F}, "row 3, column 5"},
      {Published::f32, true, kFused, fused * 4, {0, 0, 0x80, 0xFF}, "row 3, column 5"},
      {Published::fp8_blocks, false, kGate + ".weight", plain, {0x7F}, "row 3, column 5"},
      {Published::fp8_rows, true, kFused, fused, {0xFF}, "row 3, column 5"},
      // Of up, which begins at row 256 of expert 1's 512.
      {Published::fp8_blocks,
       true,
       kDeepseek,
       (512 + 256 + 3) * 200 + 5,
       {0x7F},
       "row 3, column 5",
       256},
  };
  for (const NanCase& bad : cases) {
    SourceCase source{"", bad.published, bad.fused};
    source.deepseek_width = bad.deepseek_width;
    TinyModel tiny = tiny_of(source);
    tiny.others_as = Published::bf16;
    ModelMaker maker(tiny);
    for (std::size_t i = 0; i < bad.bytes.size(); ++i) {
      maker.tensor(bad.tensor).bytes[static_cast<std::size_t>(bad.offset) + i] =
          std::byte{bad.bytes[i]};
    }
    maker.write(model());
    for (const FormatChoice& choice : {FormatChoice{}, int4_of(), as(WeightKind::nf4),
                                       as(WeightKind::fp8), as(WeightKind::bf16)}) {
      SCOPED_TRACE(bad.tensor + " as " + std::to_string(static_cast<int>(choice.kind)));
      fs::remove_all(store());
      const std::string error =
          error_of([&] { pack_store(model(), store(), options(choice)); }, folder_);
      EXPECT_THAT(error, AllOf(HasSubstr("a weight is "), HasSubstr(bad.tensor),
                               HasSubstr(bad.place), HasSubstr("DIR/model")));
      EXPECT_THAT(error, HasSubstr("expert"));
      EXPECT_FALSE(fs::exists(store() / kManifestName));
    }
    fs::remove_all(model());
  }
}

TEST_F(Source, scales_that_are_no_numbers_are_refused) {
  for (const auto& [published, name] :
       {std::pair{Published::fp8_blocks, kGate + ".weight_scale_inv"},
        std::pair{Published::fp8_rows, kGate + ".weight_scale"},
        std::pair{Published::int4, kGate + ".weight_scale"}}) {
    TinyModel tiny;
    tiny.fused = false;
    tiny.experts_as = published;
    ModelMaker maker(tiny);
    std::vector<std::byte>& scales = maker.tensor(name).bytes;
    std::fill_n(scales.begin(), 4, std::byte{0xFF});
    maker.write(model());
    for (const FormatChoice& choice : {FormatChoice{}, as(WeightKind::nf4)}) {
      fs::remove_all(store());
      EXPECT_THAT(error_of([&] { pack_store(model(), store(), options(choice)); }, folder_),
                  HasSubstr("experts.1.gate_proj"));
    }
    fs::remove_all(model());
  }
}

TEST_F(Source, a_shard_that_shrinks_while_it_is_read_is_an_error) {
  ModelMaker maker(TinyModel{});
  maker.write(model());
  const Checkpoint checkpoint = Checkpoint::open(model());
  SourceReader reader(checkpoint);
  fs::resize_file(model() / "model.safetensors",
                  fs::file_size(model() / "model.safetensors") - 200);
  const PublishedMatrix head = head_matrix(maker.spec());
  std::vector<float> rows(static_cast<std::size_t>(head.rows * head.columns));
  EXPECT_THAT(error_of([&] { reader.read_rows(head, 0, head.rows, rows.data()); }, folder_),
              AllOf(HasSubstr("the file ends inside a tensor"), HasSubstr("lm_head.weight")));
}

}  // namespace
}  // namespace tailor::testing_support
